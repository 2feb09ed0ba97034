"""How the workers of a run learn one model together: each with all of it (DDP), or each with a shard (FSDP2).

The loss of a step is a sum over all workers, so gradients are added and never averaged.

Shape letters: B sequences, T positions.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, get_total_norm

from chiasm.batch import Batch
from chiasm.config import PARTS, RunConfig
from chiasm.prompt import IGNORE, Position
from chiasm.vlm import VLM
from chiasm_experiments.training.precision import compute_dtype, place
from chiasm_experiments.training.workers import Workers

Forward = Callable[[Batch], tuple[Tensor, Tensor]]

# buffers are not sent with every forward pass, of which workers make different numbers; the argument has two names
_SYNC = "forward_sync_buffers"
_KEEP_BUFFERS: dict[str, Any] = {
    _SYNC if _SYNC in inspect.signature(DistributedDataParallel).parameters else "broadcast_buffers": False
}


class Strategy(ABC):
    """What differs between one worker, several that hold all, and several that hold shards.

    Args:
        workers: this worker among all.
        vlm: the run's model.
    """

    name: ClassVar[str]

    def __init__(self, workers: Workers, vlm: VLM) -> None:
        self.workers = workers
        self.vlm = vlm

    def place(self, run: RunConfig) -> None:
        """Moves the model to where it is computed with, in the number formats of the run; once, before all stages."""
        place(self.vlm, run, self.workers.device)

    @abstractmethod
    def stage(self) -> Forward:
        """What computes the loss of a micro-batch in a stage whose trained parts are chosen already."""

    def rounds(self, parts: int) -> int:
        """Micro-batches that this worker computes in a step in which it has so many; the others are idle ones."""
        return parts

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        """The context of a micro-batch's forward and backward pass; `last` of this worker's in a step."""
        return nullcontext()

    def finish(self, trained: Sequence[nn.Parameter]) -> None:
        """Completes the sum of gradients over workers; one that no worker has stays absent."""
        return

    def clip(self, trained: Sequence[nn.Parameter], limit: float | None) -> Tensor:
        """Scales all gradients so that their common norm is at most `limit`, and gives the norm before."""
        return clip_grad_norm_(trained, limit or math.inf)

    def whole(self) -> AbstractContextManager[None]:
        """The context in which each worker can use the model by itself, as often as it likes."""
        return nullcontext()


class Alone(Strategy):
    """One worker."""

    name = "alone"

    def stage(self) -> Forward:
        assert self.workers.size == 1, "gradients of several workers would not be added"
        forward: Forward = self.vlm
        return forward


class Replicated(Strategy):
    """Each worker holds the whole model; gradients are added in buckets while the backward pass goes on (DDP)."""

    name = "ddp"

    def stage(self) -> Forward:
        # without images, or with an encoder's last blocks unused, a step leaves parameters out
        self._model = DistributedDataParallel(
            self.vlm, find_unused_parameters=True, gradient_as_bucket_view=True, **_KEEP_BUFFERS
        )
        self._model.register_comm_hook(None, lambda state, bucket: _added(bucket))
        forward: Forward = self._model
        return forward

    def rounds(self, parts: int) -> int:
        return max(1, parts)  # gradients are added in the last one's backward pass

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        return nullcontext() if last else self._model.no_sync()


class Sharded(Strategy):
    """Each worker holds a shard of the language model, and all of what is before it (FSDP2).

    Blocks are gathered one at a time, in the dtype of computation; embeddings and output head for the whole step.
    Gradients of shards are added after every micro-batch: sums of whole ones would take the memory that sharding
    saves. Encoders, fusion, adapter and learned tokens are whole on every worker, so that one whose batch has no image
    leaves none of the others waiting.
    """

    name = "fsdp"

    def place(self, run: RunConfig) -> None:
        device = self.workers.device
        # each block moves to the GPU by itself and leaves its shard there: the whole need never fit
        place(self.vlm, run, device, llm_device=torch.device("cpu"))
        mesh = init_device_mesh(device.type, (self.workers.size,))
        policy = MixedPrecisionPolicy(
            param_dtype=compute_dtype(run, device), reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        kept = {p for part in PARTS if part != "llm" for p in self.vlm.part(part).parameters()}
        for block in self.vlm.llm.block_modules():
            fully_shard(block, mesh=mesh, mp_policy=policy)
        # the model is the root, as embeddings and head are used outside of the language model's forward pass
        fully_shard(self.vlm, mesh=mesh, mp_policy=policy, ignored_params=kept)
        # the first pass settles what the root is, and a run may begin with answers
        register_fsdp_forward_method(self.vlm, "generate")
        for module in self._modules():
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

    def stage(self) -> Forward:
        for module in self._modules():
            # when it gathers by request FSDP2 looks at what learns, and otherwise takes it as settled
            module.unshard()
            module.reshard()
        forward: Forward = self.vlm
        return forward

    def rounds(self, parts: int) -> int:
        return self.workers.most(parts)  # shards are gathered from all workers in every pass

    def finish(self, trained: Sequence[nn.Parameter]) -> None:
        self.workers.sum_gradients([p for p in trained if not isinstance(p, DTensor)])

    def clip(self, trained: Sequence[nn.Parameter], limit: float | None) -> Tensor:
        gradients = [p.grad for p in trained if p.grad is not None]
        shards = [g.to_local() for g in gradients if isinstance(g, DTensor)]
        others = [g for g in gradients if not isinstance(g, DTensor)]
        squares = get_total_norm(shards).to(self.workers.device) ** 2
        dist.all_reduce(squares)
        norm = (squares + get_total_norm(others).to(self.workers.device) ** 2).sqrt()
        if limit is not None and gradients:
            torch._foreach_mul_(shards + others, (limit / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Holds the language model gathered on every worker, in the dtype of computation."""
        modules = self._modules()
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for place, module in enumerate(modules):  # the first is the root
                module.set_reshard_after_forward(place > 0, recurse=False)
                module.reshard()

    def _modules(self) -> list[FSDPModule]:
        return [module for module in self.vlm.modules() if isinstance(module, FSDPModule)]


def idle_batch(device: torch.device) -> Batch:
    """A batch that supervises nothing, for a worker that has none while others do: its loss and gradients are 0."""
    ids_BT = torch.zeros(1, 2, dtype=torch.int64)
    kinds_BT = torch.full_like(ids_BT, Position.TEXT)
    return Batch(ids_BT, kinds_BT, labels_BT=torch.full_like(ids_BT, IGNORE)).to(device)


def _added(bucket: Any) -> torch.futures.Future[Tensor]:
    """The sum of a bucket over workers, where DDP by itself takes the mean."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    future: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return future
