"""Batches: prompts padded to one length or packed into one row, with the pixels or the features of their images.

Shape letters: B sequences, T positions, I views of all images of the batch in reading order, H and W pixels,
X visual tokens of the batch, S supervised positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from chiasm.documents import Documents
from chiasm.features import Features
from chiasm.prompt import IGNORE, Position, Prompt

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


def collate(prompts: Sequence[Prompt], vision: Sequence[Tensor | Features] = (), *, pad: Padding = "right") -> Batch:
    """Prompts as one batch: padded to the longest, on the right to train and on the left to generate; or packed.

    A packed batch is one row of all prompts, without padding but for the last few positions of the row. Only a language
    model that `packs` takes it.
    """
    if pad == "packed":
        total = sum(map(len, prompts))
        filling = -total % ROW_MULTIPLE
        documents = Documents.of([*map(len, prompts), *[filling] * bool(filling)])
    else:
        documents, length = None, max(map(len, prompts))

    def rows(values: Sequence[list[int]], fill: int) -> Tensor:
        if pad == "packed":
            joined = [value for row in values for value in row]
            return torch.tensor([joined + [fill] * filling], dtype=torch.int64)
        padded = [
            [fill] * (length - len(row)) + row if pad == "left" else row + [fill] * (length - len(row))
            for row in values
        ]
        return torch.tensor(padded, dtype=torch.int64)

    return Batch(
        ids_BT=rows([prompt.ids for prompt in prompts], 0),
        kinds_BT=rows([list(map(int, prompt.kinds)) for prompt in prompts], Position.PAD),
        # nothing precedes a sequence's first position, in a packed row neither
        labels_BT=rows([[IGNORE, *prompt.labels[1:]] for prompt in prompts], IGNORE),
        vision=tuple(vision),
        view_tokens=tuple(count for prompt in prompts for view in prompt.views for count in view),
        sample_ids=tuple(prompt.sample_id for prompt in prompts),
        documents=documents,
    )
