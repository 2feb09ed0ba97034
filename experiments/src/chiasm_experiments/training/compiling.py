"""What is made ready for the shapes of a run: by `torch.compile`, the blocks of its language model and of encoders that
see images anew; and by cuDNN, attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from chiasm.config import RunConfig
from chiasm.vlm import VLM
from chiasm_experiments.data.feed import Example
from chiasm_experiments.training.execution import Choice
from chiasm_experiments.training.operations import TERA, ModelOperations, device_peak

ENOUGH_SECONDS = 60.0
"""Of computing that earn back the half minute that blocks take to compile: what is compiled saves a fifth of the time
of large blocks and half of that of small ones."""
ENOUGH_IN_A_STUDY = 15.0
"""The same where the process goes on to trials of the same models, and keeps what it has compiled."""

UTILISATION = 0.3
"""Of the device's peak, without compiling."""
UNKNOWN_PEAK = 50 * TERA
BLOCK_SECONDS = 1e-3
"""That the host takes to give a GPU one block's work, forward and backward, however small it is."""

CASES = 64
"""Compiled cases of one function; beyond them torch runs it uncompiled."""


def compile_model(
    vlm: VLM, choice: Choice, device: torch.device, *, live: bool, seconds: float = 0.0, enough: float = ENOUGH_SECONDS
) -> dict[str, Any]:
    """Compiles in place what pays, and says what that was, for the manifest.

    Block by block: the blocks of a model share one piece of code, which is compiled once.

    Args:
        vlm: not sharded yet.
        choice: the run's setting.
        device: that computes.
        live: encoders compute the features of every step; kept features are those of the encoders as they are.
        seconds: that the run would take uncompiled.
        enough: of them earn it back.
    """
    if choice == "off":
        return {"compiled": [], "why": "off"}
    if choice == "auto" and device.type != "cuda":
        return {"compiled": [], "why": "auto: not on the CPU"}
    if choice == "auto" and seconds < enough:
        return {"compiled": [], "why": f"auto: about {seconds:.1f} s of computing do not earn it back ({enough:g} do)"}
    # blocks of several models share one function of transformers, and each length, mode and model is a case of it
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, CASES)
    vlm.llm.compile()
    compiled = ["llm"]
    for encoder in vlm.encoders if live else ():
        blocks = list(repeated_blocks(encoder))
        for block in blocks:
            block.compile()
        if blocks and "encoders" not in compiled:
            compiled.append("encoders")
    return {"compiled": compiled, "why": "on" if choice == "on" else f"auto: about {seconds:.0f} s of computing"}


def choose_attention(device: torch.device, *, long: bool) -> None:
    """Lets a run use cuDNN's attention, or keeps it from it, for all that this process does until the next run.

    cuDNN's is the fastest on Hopper, where torch prefers it, but takes about a second to be made ready for each shape
    of a batch: a run of small batches of many lengths would spend most of its time on that.

    Args:
        device: that computes.
        long: the run is long enough for it.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(long)


def uncompiled_seconds(
    vlm: VLM,
    run: RunConfig,
    examples: Mapping[str, Sequence[Example]],
    steps: Mapping[str, int],
    device: torch.device,
    workers: int = 1,
    *,
    live: bool = True,
) -> float:
    """About how long the steps of a run take a device, from the operations that a few samples of each stage need.

    Args:
        vlm: the model.
        run: its stages.
        examples: some of each stage.
        steps: of each stage.
        device: that computes.
        workers: that share a step.
        live: as `compile_model` takes it; what is encoded once for many steps is not counted.
    """
    dtype = torch.bfloat16 if run.precision == "bfloat16" else torch.float32
    rate = UTILISATION * (device_peak(device, dtype) or UNKNOWN_PEAK)
    least = BLOCK_SECONDS * vlm.llm.geometry.depth
    total = 0.0
    for stage in run.stages:
        some = [example if live else replace(example, pixels=()) for example in examples[stage.name]]
        operations = ModelOperations(vlm, run, stage)(some) / len(some) * stage.batch_size / workers
        total += steps[stage.name] * max(operations / rate, least)
    return total


def repeated_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The members of each list of at least two modules of one class and with weights of one shape; outermost first.

    Blocks of other shapes, as in convolutional networks, would each be compiled anew, for minutes.
    """
    for child in module.children():
        members = list(child.children())
        alike = len({(type(member), tuple(p.shape for p in member.parameters())) for member in members}) == 1
        if isinstance(child, nn.ModuleList | nn.Sequential) and len(members) > 1 and alike:
            yield from members
        else:
            yield from repeated_blocks(child)
