"""What every part promises of the whole: in a model it is trained by batches with images, without, and of both.

Shape letters: B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from chiasm.batch import Batch
from chiasm.config import Part
from chiasm.encoder import Encoder
from chiasm.prompt import IGNORE, Position
from chiasm.testing.check import Check
from chiasm.testing.common import calling, make_tiny, require, some
from chiasm.testing.probe import check_close
from chiasm.vlm import VLM

TOLERANCE = 1e-4
"""Of summed losses: longer batches take other paths of attention."""


def model_check(part: Part, make: Callable[[Any], VLM]) -> Check:
    """The check of one kind.

    Args:
        part: where the component stands in a model.
        make: a model around a tiny component.
    """

    def in_a_model(cls: Any) -> None:
        """In a model, batches of text alone, with images, and of both train it; frozen, it stays in eval mode."""
        component = make_tiny(cls)
        with calling("building a model around it"):
            vlm = make(component)
        vlm.set_trained(["tokens"])
        vlm.train()
        training = [name or "the component" for name, module in component.named_modules() if module.training]
        require(not training, f"frozen in a model that is trained, still in training mode: {some(training)}")
        vlm.eval()
        rows = [_row(vlm, "a", image=False), _row(vlm, "it is red", image=True), _row(vlm, "blue", image=False)]
        specs = [encoder.geometry.image for encoder in cast(Iterable[Encoder], vlm.encoders)]
        pixels = [torch.randn(1, 3, spec.height, spec.width) for spec in specs]
        text, image, both = (
            (_batch(vlm, rows[:1]), "of text alone"),
            (_batch(vlm, rows[1:2], pixels), "with an image"),
            (_batch(vlm, rows, pixels), "of texts with and without an image"),
        )
        losses = [_loss(vlm, *text), _loss(vlm, *image), _loss(vlm, _batch(vlm, rows[2:]), "of text alone")]
        mixed = _loss(vlm, *both)
        check_close(mixed, torch.stack(losses).sum(), "a batch has another loss than its samples one by one", TOLERANCE)
        if part == "llm" and not vlm.llm.geometry.trainable:
            return  # quantised, say
        vlm.set_trained([part, "tokens"])
        vlm.train()
        for batch, what in (text, both):
            vlm.zero_grad()
            loss = _loss(vlm, batch, what)
            require(bool(loss.isfinite()), f"the loss of a batch {what} is {float(loss.detach())}")
            with calling(f"the backward pass of a batch {what}"):
                torch.autograd.backward(loss)
        parameters = list(component.parameters())
        reached = [p for p in parameters if p.grad is not None and bool(p.grad.any())]
        require(
            bool(reached) or not parameters, "trained in a model on a batch with an image, no parameter has a gradient"
        )

    return in_a_model


@dataclass(frozen=True, slots=True)
class _Row:
    """One sequence: ids, what stands there, labels."""

    ids: list[int]
    kinds: Sequence[int]
    labels: list[int]


def _row(vlm: VLM, text: str, *, image: bool) -> _Row:
    """An image or none, one learned vector, and a supervised answer."""
    visual = vlm.adapter.out.tokens if image else 0
    with calling(f"tokenize({text!r})"):
        answer = [*vlm.llm.tokenize(text), vlm.llm.eos_id]
    return _Row(
        ids=[0] * (visual + 1) + answer,
        kinds=[Position.VISUAL] * visual + [Position.LEARNED] + [Position.TEXT] * len(answer),
        labels=[IGNORE] * (visual + 1) + answer,
    )


def _batch(vlm: VLM, rows: Sequence[_Row], pixels: Sequence[Tensor] = ()) -> Batch:
    """Rows padded on the right."""
    longest = max(len(row.ids) for row in rows)

    def padded(values: Sequence[Sequence[int]], fill: int) -> Tensor:
        return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in values])

    return Batch(
        ids_BT=padded([row.ids for row in rows], 0),
        kinds_BT=padded([row.kinds for row in rows], Position.PAD),
        labels_BT=padded([row.labels for row in rows], IGNORE),
        vision=tuple(pixels),
    )


def _loss(vlm: VLM, batch: Batch, what: str) -> Tensor:
    with calling(f"a model's loss of a batch {what}"):
        loss: Tensor = vlm(batch)[0]
    return loss
