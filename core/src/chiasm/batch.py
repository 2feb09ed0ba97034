"""Batches: prompts padded to one length or packed into one row, with the pixels or the features of their images.

Shape letters: B sequences, T positions, I views of all images of the batch in reading order, H and W pixels,
X visual tokens of the batch, S supervised positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from chiasm.documents import Documents
from chiasm.features import Features
from chiasm.prompt import IGNORE, Position, Prompt, Row

Padding = Literal["left", "right", "packed"]

ROW_MULTIPLE = 64
"""Packed rows end on a multiple of it, which matrix products on a GPU want."""


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
    supervised_S: Tensor = field(default=None)  # type: ignore[assignment]
    targets_S: Tensor = field(default=None)  # type: ignore[assignment]
    padded_left: bool = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.visual_X is not None:
            return
        length = self.ids_BT.shape[1]
        rows_S, columns_S = (self.labels_BT[:, 1:] != IGNORE).nonzero(as_tuple=True)
        real_BT = self.mask_BT
        derived = {
            "visual_X": (self.kinds_BT.flatten() == Position.VISUAL).nonzero().squeeze(1),
            "supervised_S": rows_S * length + columns_S,
            "targets_S": self.labels_BT[:, 1:][rows_S, columns_S],
            "padded_left": self.documents is None and bool((real_BT[:, 1:] > real_BT[:, :-1]).any()),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        vision = tuple(
            Features(item.tokens.to(device, non_blocking=True), item.grid)
            if isinstance(item, Features)
            else item.to(device, non_blocking=True)
            for item in self.vision
        )
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in _TENSORS}
        documents = None if self.documents is None else self.documents.to(device)
        return replace(self, vision=vision, documents=documents, **moved)

    def pinned(self) -> Batch:
        """The same batch with its positions in pinned memory, which a GPU fetches without holding the host up."""
        documents = None if self.documents is None else self.documents.pinned()
        return replace(self, documents=documents, **{name: getattr(self, name).pin_memory() for name in _TENSORS})

    @property
    def mask_BT(self) -> Tensor:
        """True at real positions."""
        return self.kinds_BT != Position.PAD


_TENSORS = ("ids_BT", "kinds_BT", "labels_BT", "visual_X", "supervised_S", "targets_S")


def collate(
    prompts: Sequence[Prompt | Row], vision: Sequence[Tensor | Features] = (), *, pad: Padding = "right"
) -> Batch:
    """Prompts as one batch: padded to the longest, on the right to train and on the left to generate; or packed.

    A packed batch is one row of all prompts, without padding but for the last few positions of the row. Only a language
    model that `packs` takes it.
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
        longest = max(lengths)
        places = [(i, longest - length if pad == "left" else 0) for i, length in enumerate(lengths)]
        size = (len(rows), longest)
    ids_BT, kinds_BT = torch.zeros(size, dtype=torch.int64), torch.full(size, int(Position.PAD))
    labels_BT = torch.full(size, IGNORE)
    for row, (i, start) in zip(rows, places, strict=True):
        end = start + len(row)
        for values_BT, value_T in zip((ids_BT, kinds_BT, labels_BT), row.values_3T, strict=True):
            values_BT[i, start:end] = value_T
        # nothing precedes a sequence's first position, in a packed row neither
        labels_BT[i, start] = IGNORE
    return Batch(
        ids_BT=ids_BT,
        kinds_BT=kinds_BT,
        labels_BT=labels_BT,
        vision=tuple(vision),
        view_tokens=tuple(count for row in rows for view in row.views for count in view),
        sample_ids=tuple(row.sample_id for row in rows),
        documents=documents,
    )
