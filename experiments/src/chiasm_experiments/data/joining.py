"""Images' tensors one behind the other, in few operations.

Shape letters: I views of several images, V views of one image, L layers, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Span:
    """An image's features as a part of more, which is not cut out: each cut is an operation, and a thread that gives a
    GPU its work waits for every operation of another.

    Args:
        whole_ILND: features of several images.
        first: the first of the image's views.
        views: how many it has.
    """

    whole_ILND: Tensor
    first: int
    views: int

    def __len__(self) -> int:
        return self.views

    @property
    def tensor(self) -> Tensor:
        """Its features alone, `[V, L, N, D]`."""
        return self.whole_ILND[self.first : self.first + self.views]


def join(parts: Sequence[Tensor | Span], device: torch.device) -> Tensor:
    """Tensors one behind the other on a device, each neighbourhood in memory copied in one go and nothing copied twice.

    Pinned memory is copied without waiting.
    """
    spans = [part for part in parts if isinstance(part, Span)]
    if len(spans) == len(parts) and len({id(span.whole_ILND) for span in spans}) == 1:
        whole_ILND = spans[0].whole_ILND
        # what was read for a whole step is not sent for each of its micro-batches
        views = sum({span.first: span.views for span in spans}.values())
        if whole_ILND.device.type == device.type or views == len(whole_ILND):
            return _of_one(whole_ILND, spans, device)
    runs = _runs([part.tensor if isinstance(part, Span) else part for part in parts])
    if len(runs) == 1:
        return runs[0].to(device, non_blocking=True)
    if device.type == "cpu" and all(run.device == device for run in runs):
        return torch.cat(runs)
    joined = torch.empty(sum(map(len, runs)), *runs[0].shape[1:], dtype=runs[0].dtype, device=device)
    place = 0
    for run in runs:
        joined[place : place + len(run)].copy_(run, non_blocking=True)
        place += len(run)
    return joined


def _of_one(whole_ILND: Tensor, spans: Sequence[Span], device: torch.device) -> Tensor:
    """Spans of one tensor, in few operations: it is sent whole, and put in order where it lands."""
    there_ILND = whole_ILND.to(device, non_blocking=True)
    order = [view for span in spans for view in range(span.first, span.first + span.views)]
    if order == list(range(len(whole_ILND))):
        return there_ILND
    index_I = torch.tensor(order, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    return there_ILND.index_select(0, index_I)


def _runs(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same rows in fewer tensors, where neighbours are neighbours in memory too."""
    runs: list[Tensor] = []
    for tensor in tensors:
        last = runs[-1] if runs else None
        if (
            last is not None
            and tensor.is_contiguous()
            and last.is_contiguous()
            and last.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
            and last.data_ptr() + last.nbytes == tensor.data_ptr()
        ):
            shape = (len(last) + len(tensor), *last.shape[1:])
            runs[-1] = last.as_strided(shape, last.stride(), last.storage_offset())
        else:
            runs.append(tensor)
    return runs
