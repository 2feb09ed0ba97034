"""Optimiser and schedule of a stage."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from chiasm.config import StageConfig
from chiasm.errors import ConfigError
from chiasm.vlm import VLM


def make_optimizer(vlm: VLM, stage: StageConfig) -> Optimizer:
    """The stage's optimiser, with a group for each trained part and for what is decayed.

    Raises:
        ConfigError: nothing would be trained, or Adafactor is to train what workers hold shards of.
    """
    groups: list[dict[str, Any]] = []
    for part in stage.train:
        module = vlm.part(part)
        decays = decayed(module)
        trained = [p for p in module.parameters() if p.requires_grad]
        for decay in (True, False):
            params = [p for p in trained if (id(p) in decays) is decay]
            if params:
                weight_decay = stage.weight_decay if decay else 0.0
                groups.append({"params": params, "lr": stage.rate(part), "weight_decay": weight_decay, "part": part})
    if not groups:
        raise ConfigError(f"stage {stage.name!r}: none of {list(stage.train)} has a parameter that could be trained")
    if stage.optimizer == "adafactor":
        from chiasm_experiments.training.adafactor import Adafactor

        if any(isinstance(p, DTensor) for group in groups for p in group["params"]):
            raise ConfigError(
                f"stage {stage.name!r}: adafactor takes sums over whole rows and columns and cannot train shards; "
                "execute with strategy=ddp, or train with adamw"
            )
        return Adafactor(groups)
    return AdamW(groups, betas=stage.betas, fused=vlm.tokens.vectors.is_cuda)


def decayed(module: nn.Module) -> set[int]:
    """Ids of the parameters that weight decay draws to 0: the matrices that features are multiplied with.

    Never biases, normalisations and scalars, even where a layer stacks them; nor vectors that are learned themselves
    and would lose what they stand for: the learned tokens, positions, queries, class tokens, and tables of embeddings,
    unless the output head is tied to them. torch's layers, and those who follow them, call a matrix `weight` or
    `..._weight`.
    """
    found = set()
    for child in module.modules():
        if isinstance(child, nn.Embedding | nn.LayerNorm | nn.RMSNorm):
            continue
        for name, parameter in child.named_parameters(recurse=False):
            if parameter.ndim >= 2 and name.endswith("weight") and "norm" not in name:
                found.add(id(parameter))
    return found


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
