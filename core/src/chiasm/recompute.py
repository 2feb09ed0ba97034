"""Activation checkpointing: a module's inner results are computed again in the backward pass and not kept."""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class _Recomputed(nn.Module):
    recomputed: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.recomputed and torch.is_grad_enabled():
            return checkpoint(super().__call__, *args, use_reentrant=False, **kwargs)
        return super().__call__(*args, **kwargs)


@cache  # one for all blocks of a model, or compiled code would be compiled anew for each
def _recomputed(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_Recomputed, kind), {"__module__": kind.__module__})


def recompute(module: nn.Module, on: bool) -> None:
    """Switches activation checkpointing of a module, in place.

    It acts in training and in eval mode alike, since a frozen module in eval mode keeps as much for what stands before
    it. Gradients are the same to the bit where the module is deterministic; dropout draws the same again. Names in the
    state stay. It acts around a module that `torch.compile` compiled in place, and around one that is sharded.
    """
    if not isinstance(module, _Recomputed):
        if not on:
            return
        # the call and not the forward is replaced, since what is compiled is the call; a call is looked up in the class
        kind: Any = type(module)
        module.__class__ = _recomputed(kind)
    cast(_Recomputed, module).recomputed = on
