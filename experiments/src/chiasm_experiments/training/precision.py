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


def place(vlm: VLM, run: RunConfig, device: torch.device) -> None:
    """Moves the model to the device: parts that any stage trains in float32, always frozen ones in the compute dtype.

    Small steps vanish in bfloat16 weights, so what learns keeps float32 and autocast computes in bfloat16.
    """
    dtype = compute_dtype(run, device)
    for part in PARTS:
        vlm.part(part).to(device, torch.float32 if part in run.trained else dtype)


def autocast(run: RunConfig, device: torch.device) -> AbstractContextManager[object]:
    """The context in which forward passes run."""
    dtype = compute_dtype(run, device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
