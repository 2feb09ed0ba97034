"""Batches: prompts padded to one length, with the pixels or the features of their images.

Shape letters: B sequences, T positions, I views of all images of the batch in reading order, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from chiasm.features import Features
from chiasm.prompt import IGNORE, Position, Prompt


@dataclass(frozen=True, slots=True)
class Batch:
    """What the model takes.

    Args:
        ids_BT: int64; the token id at TEXT, the row of the learned vector at LEARNED, 0 elsewhere.
        kinds_BT: int64; a `Position` for each place.
        labels_BT: int64; the id that belongs at a supervised place, `IGNORE` elsewhere.
        vision: for each encoder its pixels `[I, 3, H, W]`, or its features where they are already known; empty where
            the batch has no image.
        view_tokens: for each of the I views the visual tokens that stand in the sequence; empty: all of them.
        sample_ids: for messages.
    """

    ids_BT: Tensor
    kinds_BT: Tensor
    labels_BT: Tensor
    vision: tuple[Tensor | Features, ...] = ()
    view_tokens: tuple[int, ...] = ()
    sample_ids: tuple[str, ...] = ()

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        vision = tuple(
            Features(item.tokens.to(device, non_blocking=True), item.grid)
            if isinstance(item, Features)
            else item.to(device, non_blocking=True)
            for item in self.vision
        )
        return replace(
            self,
            ids_BT=self.ids_BT.to(device, non_blocking=True),
            kinds_BT=self.kinds_BT.to(device, non_blocking=True),
            labels_BT=self.labels_BT.to(device, non_blocking=True),
            vision=vision,
        )

    @property
    def mask_BT(self) -> Tensor:
        """True at real positions."""
        return self.kinds_BT != Position.PAD


def collate(
    prompts: Sequence[Prompt], vision: Sequence[Tensor | Features] = (), *, pad: Literal["left", "right"] = "right"
) -> Batch:
    """Pads prompts to the longest: on the right to train, on the left to generate."""
    length = max(len(prompt) for prompt in prompts)

    def rows(values: Sequence[list[int]], fill: int) -> Tensor:
        padded = [
            [fill] * (length - len(row)) + row if pad == "left" else row + [fill] * (length - len(row))
            for row in values
        ]
        return torch.tensor(padded, dtype=torch.int64)

    return Batch(
        ids_BT=rows([prompt.ids for prompt in prompts], 0),
        kinds_BT=rows([list(map(int, prompt.kinds)) for prompt in prompts], Position.PAD),
        labels_BT=rows([prompt.labels for prompt in prompts], IGNORE),
        vision=tuple(vision),
        view_tokens=tuple(count for prompt in prompts for view in prompt.views for count in view),
        sample_ids=tuple(prompt.sample_id for prompt in prompts),
    )
