"""Tensors that workers hold shards of (DTensors): made whole, read from whole ones, written and read as shards."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(module: nn.Module) -> bool:
    """Whether workers hold shards of a module's parameters."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def whole_state(module: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """The state of a sharded module as whole tensors on the CPU, those with two names once; called on every worker.

    One tensor at a time is gathered, so a worker's memory need not hold the module.

    Args:
        module: whose tensors are gathered.
        keep: whether this worker wants the result; others get nothing.
    """
    buffers, state = dict(module.named_buffers()), module.state_dict(keep_vars=True)
    tensors = dict(module.named_parameters()) | {name: value for name, value in buffers.items() if name in state}
    return whole_tensors(tensors, keep=keep)


def whole_tensors(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """As `whole_state`, of tensors by name."""
    whole = {}
    for name, value in tensors.items():
        value = value.detach()
        if isinstance(value, DTensor):
            value = value.full_tensor()
        if keep:
            whole[name] = value.to("cpu", copy=True).contiguous()
    return whole


@torch.no_grad()
def copy_whole(name: str, target: Tensor, value: Tensor) -> None:
    """Copies a whole tensor into one of the same shape, which may be sharded; then every worker gives the same one.

    Raises:
        ValueError: the shapes differ.
    """
    if target.shape != value.shape:  # copy_ would stretch a single row
        raise ValueError(f"{name} is {tuple(value.shape)}, wanted {tuple(target.shape)}")
    target.copy_(shard_like(target, value))


def shard_like(target: Tensor, value: Tensor) -> Tensor:
    """A whole tensor, sharded as another one is; it is itself where that is whole too, or it is sharded already."""
    if not isinstance(target, DTensor) or isinstance(value, DTensor):
        return value
    # each worker has the value, so none needs to send it
    value = value.to(target.device)
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


def load_sharded(module: nn.Module, file: str) -> None:
    """Reads what `whole_state` gave into a sharded module, a tensor at a time.

    Raises:
        ValueError: the file is of another module.
    """
    state = module.state_dict(keep_vars=True)
    with safe_open(file, framework="pt") as stored:
        names = set(stored.keys())
        # what has two names is stored under one
        found = {id(value) for name, value in state.items() if name in names}
        wrong = [*(names - set(state)), *(name for name, value in state.items() if id(value) not in found)]
        if wrong:
            raise ValueError(f"it holds other tensors: {sorted(wrong)[:4]}")
        for name in names:
            copy_whole(name, state[name], stored.get_tensor(name))


def write_shards(tensors: Mapping[str, Tensor], folder: Path, group: dist.ProcessGroup) -> Future[Any]:
    """Begins to write sharded tensors, each worker its own shards in a safetensors file; called on every worker.

    Args:
        tensors: copied before this returns.
        folder: that exists.
        group: with a backend for the CPU, used by nothing else.

    Returns:
        The first worker's ends when all workers have written.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    detached = {name: value.detach() for name, value in tensors.items()}
    saved = async_save(detached, storage_writer=writer, process_group=group)
    assert isinstance(saved, Future)
    return saved


def read_shards(folder: Path, like: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
    """Reads what `write_shards` wrote, on any number of workers; each reads its part, and waits for no other.

    Args:
        folder: of the shards.
        like: for a name the tensor that it is to be sharded as, if that is sharded and has its shape.
    """
    reader = HuggingFaceStorageReader(str(folder))
    found: dict[str, Tensor] = {}
    for name, told in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(told, TensorStorageMetadata)
        target, kind = like(name), told.properties.dtype
        if isinstance(target, DTensor) and target.shape == told.size:
            found[name] = torch.empty_like(target, dtype=kind)
        else:
            found[name] = torch.empty(told.size, dtype=kind)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        load(found, storage_reader=reader, no_dist=True)
    return found
