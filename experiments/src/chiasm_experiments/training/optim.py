"""Optimiser and schedule of a stage."""

from __future__ import annotations

import math

from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from chiasm.config import StageConfig
from chiasm.vlm import VLM


def make_optimizer(vlm: VLM, stage: StageConfig) -> Optimizer:
    """AdamW with a group for each trained part and for what is decayed.

    Weight decay acts on matrices of the parts alone: never on biases, normalisations or the learned tokens.
    """
    groups = []
    for part in stage.train:
        trained = [p for p in vlm.part(part).parameters() if p.requires_grad]
        decayed = [p for p in trained if p.ndim >= 2 and part != "tokens"]
        plain = [p for p in trained if p.ndim < 2 or part == "tokens"]
        for params, decay in ((decayed, stage.weight_decay), (plain, 0.0)):
            if params:
                groups.append({"params": params, "lr": stage.rate(part), "weight_decay": decay, "part": part})
    fused = vlm.tokens.vectors.is_cuda
    return AdamW(groups, betas=stage.betas, fused=fused)


def make_schedule(optimizer: Optimizer, stage: StageConfig, steps: int) -> LambdaLR:
    """A linear rise over the warm-up, then cosine to 0 or constant; counted in optimiser steps of the whole stage."""
    warmup = math.ceil(stage.warmup * steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if stage.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return LambdaLR(optimizer, factor)
