"""What `torch.compile` compiles of a run: the blocks of its language model, and of encoders that see images anew."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from chiasm.vlm import VLM
from chiasm_experiments.training.execution import Choice

ENOUGH_STEPS = 200
"""Optimiser steps of a run that earn back the half minute that its blocks take to compile."""

CASES = 64
"""Compiled cases of one function; beyond them torch runs it uncompiled."""


def compile_model(vlm: VLM, choice: Choice, device: torch.device, steps: int, *, live: bool) -> dict[str, Any]:
    """Compiles in place what pays, and says what that was, for the manifest.

    Block by block: the blocks of a model share one piece of code, which is compiled once.

    Args:
        vlm: not sharded yet.
        choice: the run's setting.
        device: that computes.
        steps: optimiser steps of the run.
        live: encoders compute the features of every step; kept features are those of the encoders as they are.
    """
    if choice == "off":
        return {"compiled": [], "why": "off"}
    if choice == "auto" and device.type != "cuda":
        return {"compiled": [], "why": "auto: not on the CPU"}
    if choice == "auto" and steps < ENOUGH_STEPS:
        return {"compiled": [], "why": f"auto: {steps} steps do not earn it back ({ENOUGH_STEPS} do)"}
    # blocks of several models share one function of transformers, and each length, mode and model is a case of it
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, CASES)
    vlm.llm.compile()
    compiled = ["llm"]
    if live:
        for encoder in vlm.encoders:
            for block in repeated_blocks(encoder):
                block.compile()
        compiled.append("encoders")
    return {"compiled": compiled, "why": "on" if choice == "on" else f"auto: {steps} steps on a GPU"}


def repeated_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The members of each list of modules that are all of one class, where there are at least two; outermost first."""
    for child in module.children():
        members = list(child.children())
        if isinstance(child, nn.ModuleList | nn.Sequential) and len(members) > 1 and len(set(map(type, members))) == 1:
            yield from members
        else:
            yield from repeated_blocks(child)
