"""The shared checks of what a module holds on to once a pass is over."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chiasm.testing.check import Check
from chiasm.testing.common import make_tiny, require
from chiasm.testing.probe import Probe

WARM, MORE = 2, 2
"""Passes that may fill caches, and those after them that may leave nothing."""


def memory_checks(probe: Probe) -> tuple[Check, ...]:
    """The shared check of memory, for one kind."""

    def keeps_nothing(cls: Any) -> None:
        """A pass that is over leaves no graph behind, and no tensor that the next pass does not replace."""
        module = make_tiny(cls).requires_grad_(True).train()
        kept: list[StorageWeakRef] = []
        for number in range(WARM + MORE):
            graph: list[weakref.ref[_Saved]] = []

            def pack(tensor: Tensor, graph: list[weakref.ref[_Saved]] = graph) -> _Saved:
                saved = _Saved(tensor)
                graph.append(weakref.ref(saved))
                return saved

            inputs = probe.inputs(module, 2)
            with _Made() as made, torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
                probe(module, inputs, " in training mode")
            del inputs
            if any(reference() is not None for reference in graph):
                gc.collect()
            left = sum(reference() is not None for reference in graph)
            require(
                not left,
                f"when its output is gone, the graph of a pass still holds {left} tensors: forward keeps one of its "
                "results on the module; detach what is kept, or keep nothing",
            )
            if number == WARM - 1:
                kept = made.storages
        if _alive(kept):
            gc.collect()
        held = _alive(kept)
        require(
            not held,
            f"every pass leaves {held} more tensors behind, so that memory grows with the steps: forward adds its "
            "results to something that is never emptied",
        )

    return (keeps_nothing,)


def _alive(storages: list[StorageWeakRef]) -> int:
    return sum(not storage.expired() for storage in storages)  # type: ignore[no-untyped-call]


class _Saved:
    """What autograd saves, so that one can see when it lets go."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # an output that its own node saved would hold the graph by itself


class _Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the memory of all tensors that are made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: list[StorageWeakRef] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {item.untyped_storage()._cdata for item in tree_leaves((args, kwargs)) if isinstance(item, Tensor)}
        for item in tree_leaves(made):
            if isinstance(item, Tensor) and item.untyped_storage()._cdata not in given:
                self.storages.append(StorageWeakRef(item.untyped_storage()))  # type: ignore[no-untyped-call]
        return made
