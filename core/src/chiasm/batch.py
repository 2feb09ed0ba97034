"""Batches: prompts padded to one length or packed into one row, with the pixels or the features of their images.

Shape letters: B sequences, T positions, I views of all images of the batch in reading order, H and W pixels,
X visual, Y text and Z learned positions of the batch, S supervised positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from chiasm.documents import Documents
from chiasm.features import Features
from chiasm.prompt import IGNORE, Position, Prompt, Row

Padding = Literal["left", "right", "packed"]

ROW_MULTIPLE = 64
"""Rows for a GPU end on a multiple of it: packed ones for its matrix products, padded ones so that there are few
lengths, for each of which kernels are chosen anew."""


def row_length(longest: int, context: int) -> int:
    """Positions of the padded rows for a GPU: a multiple of `ROW_MULTIPLE` where the context has room for it.

    Args:
        longest: positions of the longest sequence.
        context: that the language model has room for.
    """
    return max(longest, min(-(-longest // ROW_MULTIPLE) * ROW_MULTIPLE, context))


@dataclass(frozen=True, slots=True)
class Batch:
    """What the model takes.

    What follows from `kinds_BT` and `labels_BT` is worked out once, where the batch is made: a GPU that had to be asked
    how many positions there are would stand still until it has answered.

    Args:
        ids_BT: int64; the token id at TEXT, the row of the learned vector at LEARNED, 0 elsewhere.
        kinds_BT: int64; a `Position` for each place.
        labels_BT: int64; the id that belongs at a supervised place, `IGNORE` elsewhere.
        vision: for each encoder its pixels `[I, 3, H, W]`, or its features where they are already known; empty where
            the batch has no image.
        view_tokens: for each of the I views the visual tokens that stand in the sequence; empty: all of them.
        sample_ids: for messages.
        documents: of a packed batch, whose B is 1; None: each row is one sequence.
        visual_X: int64; the places of visual tokens in the batch as one long row, in order.
        text_Y, learned_Z: int64; those of text and of learned vectors, likewise.
        supervised_S: int64; the places whose next one is supervised, likewise.
        targets_S: int64; the ids that belong there.
        padded_left: whether padding stands before a sequence somewhere.
    """

    ids_BT: Tensor
    kinds_BT: Tensor
    labels_BT: Tensor
    vision: tuple[Tensor | Features, ...] = ()
    view_tokens: tuple[int, ...] = ()
    sample_ids: tuple[str, ...] = ()
    documents: Documents | None = None
    visual_X: Tensor = field(default=None)  # type: ignore[assignment]
    text_Y: Tensor = field(default=None)  # type: ignore[assignment]
    learned_Z: Tensor = field(default=None)  # type: ignore[assignment]
    supervised_S: Tensor = field(default=None)  # type: ignore[assignment]
    targets_S: Tensor = field(default=None)  # type: ignore[assignment]
    padded_left: bool = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.visual_X is not None:
            return
        # by numpy, as torch would have all cores share what takes a moment, and wait for those that are busy
        kinds_BT, labels_BT = self.kinds_BT.numpy(force=True), self.labels_BT.numpy(force=True)
        real_BT = kinds_BT != Position.PAD
        rows_S, columns_S = np.nonzero(labels_BT[:, 1:] != IGNORE)
        derived: dict[str, Any] = {
            "visual_X": np.flatnonzero(kinds_BT == Position.VISUAL),
            "text_Y": np.flatnonzero(kinds_BT == Position.TEXT),
            "learned_Z": np.flatnonzero(kinds_BT == Position.LEARNED),
            "supervised_S": rows_S * kinds_BT.shape[1] + columns_S,
            "targets_S": labels_BT[rows_S, columns_S + 1],
        }
        for name, value in derived.items():
            object.__setattr__(self, name, torch.from_numpy(value).to(self.ids_BT.device))
        padded_left = self.documents is None and bool((real_BT[:, 1:] > real_BT[:, :-1]).any())
        object.__setattr__(self, "padded_left", padded_left)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device; a GPU fetches it without holding the host up."""
        vision = tuple(
            Features(item.tokens.to(device, non_blocking=True), item.grid)
            if isinstance(item, Features)
            else item.to(device, non_blocking=True)
            for item in self.vision
        )
        tensors = [getattr(self, name) for name in _TENSORS]
        documents = self.documents
        if documents is not None:
            tensors += [documents.positions_1T, documents.bounds_P]
        moved = together(tensors, torch.device(device))
        if documents is not None:
            *moved, positions_1T, bounds_P = moved
            documents = replace(documents, positions_1T=positions_1T, bounds_P=bounds_P.to(torch.int32))
        placed: dict[str, Any] = dict(zip(_TENSORS, moved, strict=True))
        return replace(self, vision=vision, documents=documents, **placed)

    @property
    def mask_BT(self) -> Tensor:
        """True at real positions."""
        return self.kinds_BT != Position.PAD


_TENSORS = ("ids_BT", "kinds_BT", "labels_BT", "visual_X", "text_Y", "learned_Z", "supervised_S", "targets_S")


def together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Integer tensors of any shapes on a device; what a GPU is sent from the CPU goes in one piece, as int64."""
    if device.type != "cuda" or any(tensor.device.type != "cpu" for tensor in tensors):
        return [tensor.to(device) for tensor in tensors]
    whole = in_one_piece(tensors, pin=True).to(device, non_blocking=True)
    parts = torch.split(whole, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def in_one_piece(tensors: Sequence[Tensor], *, pin: bool) -> Tensor:
    """Integer tensors on the CPU one behind the other, int64; `pin` puts them where a GPU fetches them by itself."""
    whole = torch.empty(sum(tensor.numel() for tensor in tensors), dtype=torch.int64, pin_memory=pin)
    np.concatenate([tensor.numpy().reshape(-1) for tensor in tensors], out=whole.numpy())
    return whole


def collate(
    prompts: Sequence[Prompt | Row],
    vision: Sequence[Tensor | Features] = (),
    *,
    pad: Padding = "right",
    length: int | None = None,
) -> Batch:
    """Prompts as one batch: padded to one length, on the right to train and on the left to generate; or packed.

    A packed batch is one row of all prompts, without padding but for the last few positions of the row. Only a language
    model that `packs` takes it.

    Args:
        prompts: at least one.
        vision: for each encoder pixels or features of all their images.
        pad: on which side, or not at all.
        length: of the padded rows; None: that of the longest prompt.

    Raises:
        ValueError: a prompt is longer.
    """
    rows = [prompt.row() if isinstance(prompt, Prompt) else prompt for prompt in prompts]
    lengths, documents = [len(row) for row in rows], None
    if pad == "packed":
        total = sum(lengths)
        filling = -total % ROW_MULTIPLE
        documents = Documents.of([*lengths, *[filling] * bool(filling)])
        places = [(0, start) for start in accumulate(lengths[:-1], initial=0)]
        size = (1, total + filling)
    else:
        longest = max(lengths) if length is None else length
        if max(lengths) > longest:
            raise ValueError(f"a prompt of {max(lengths)} positions does not fit into a row of {longest}")
        places = [(i, longest - length if pad == "left" else 0) for i, length in enumerate(lengths)]
        size = (len(rows), longest)
    values_3BT = np.empty((3, *size), dtype=np.int64)
    values_3BT[:] = np.array([0, Position.PAD, IGNORE]).reshape(3, 1, 1)
    for row, (i, start) in zip(rows, places, strict=True):
        values_3BT[:, i, start : start + len(row)] = row.values_3T.numpy()
        # nothing precedes a sequence's first position, in a packed row neither
        values_3BT[2, i, start] = IGNORE
    ids_BT, kinds_BT, labels_BT = torch.from_numpy(values_3BT)
    return Batch(
        ids_BT=ids_BT,
        kinds_BT=kinds_BT,
        labels_BT=labels_BT,
        vision=tuple(vision),
        view_tokens=tuple(count for row in rows for view in row.views for count in view),
        sample_ids=tuple(row.sample_id for row in rows),
        documents=documents,
    )
