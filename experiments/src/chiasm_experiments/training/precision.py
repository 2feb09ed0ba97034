"""Number formats: what weights are held in, and what is computed in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from chiasm.config import PARTS, RunConfig
from chiasm.vlm import VLM


def compute_dtype(run: RunConfig, device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU and float32 on the CPU, unless the run says otherwise."""
    if run.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if run.precision == "bfloat16" else torch.float32


def place(vlm: VLM, run: RunConfig, device: torch.device, llm_device: torch.device | None = None) -> None:
    """Moves the model to the device: what any stage trains in float32, what is always frozen in the compute dtype.

    Small steps vanish in bfloat16 weights, so what learns keeps float32 and autocast computes in bfloat16. Of a
    language model with LoRA only its matrices learn: the rest is frozen.

    Args:
        vlm: the model.
        run: its run.
        device: where it is computed with.
        llm_device: where the language model is held instead, until it is sharded.
    """
    dtype = compute_dtype(run, device)
    for part in PARTS:
        if part != "llm":
            vlm.part(part).to(device, torch.float32 if part in run.trained else dtype)
    learned = {id(p) for p in vlm.trainable("llm").values()} if "llm" in run.trained else set()
    # buffers keep their dtype: bfloat16 frequencies turn a position of 2000 by up to 3 radians too much. Quantised
    # weights are integers, which are no number format to choose
    for parameter in vlm.llm.to(llm_device or device).parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if id(parameter) in learned else dtype)


def autocast(run: RunConfig, device: torch.device) -> AbstractContextManager[object]:
    """The context in which forward passes run."""
    dtype = compute_dtype(run, device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
