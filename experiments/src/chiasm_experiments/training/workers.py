"""The workers of a run as Ray Train gives them: how many, which one this is, and sums over all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Workers:
    """This worker among all."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def current(cls) -> Workers:
        """This process's place, from Ray Train's context; local mode is one worker."""
        import ray.train
        from ray.train.torch import get_device

        context = ray.train.get_context()
        return cls(context.get_world_rank(), context.get_world_size(), get_device())

    @property
    def first(self) -> bool:
        """Whether this worker writes files and reports."""
        return self.rank == 0

    def sum(self, value: float) -> float:
        """The sum of a number over all workers."""
        return self.sums(value)[0]

    def sums(self, *values: float) -> list[float]:
        """The sums of some numbers over all workers, in one message."""
        if self.size == 1:
            return list(values)
        return self._reduced(values, dist.ReduceOp.SUM)

    def total(self, value: Tensor) -> Tensor:
        """The sum over all workers of a tensor that is on the device and stays there."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def most(self, value: int) -> int:
        """The largest of a number over all workers."""
        if self.size == 1:
            return value
        return int(self._reduced([value], dist.ReduceOp.MAX)[0])

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Adds the gradients of all workers in place, in one message; one that no worker has stays absent.

        Every worker sends the same tensors, so workers whose batch has no image cannot leave others waiting.
        """
        if self.size == 1:
            return
        parameters = list(parameters)
        held = self.sums(*[parameter.grad is not None for parameter in parameters])
        used = [parameter for parameter, count in zip(parameters, held, strict=True) if count]
        if not used:
            return
        gradients = []
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, total in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))

    def barrier(self) -> None:
        """Waits for all workers."""
        if self.size > 1:
            dist.barrier()

    def _reduced(self, values: Sequence[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
        """Numbers of the host over all workers."""
        group = host_group(self.size)
        # NCCL takes no CPU tensor
        device = self.device if group is None else torch.device("cpu")
        reduced = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(reduced, operation, group=group)
        found: list[float] = reduced.tolist()
        return found


_groups: dict[dist.ProcessGroup, dist.ProcessGroup] = {}


def host_group(size: int) -> dist.ProcessGroup | None:
    """All workers as they talk without their GPUs; None: they talk through those. Called on every worker.

    A GPU adds numbers after all that it was given before, and the host that waits for them gives it nothing meanwhile.
    Between machines no way is certain but the one that the workers have found already.

    Args:
        size: the number of workers.
    """
    everyone = dist.group.WORLD
    assert everyone is not None
    if dist.get_backend() == "gloo":
        return everyone
    if int(os.environ.get("LOCAL_WORLD_SIZE", "0")) != size:
        return None
    if everyone not in _groups:
        _groups.clear()  # those of an earlier run of this process
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        _groups[everyone] = group
    return _groups[everyone]
