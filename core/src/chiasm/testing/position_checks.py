"""What a language model promises of hidden states at asked positions alone.

Shape letters: B sequences, T positions, S positions that are asked for, E width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from chiasm.documents import Documents
from chiasm.llm import LanguageModel
from chiasm.testing.check import Check
from chiasm.testing.common import calling, make_tiny, require
from chiasm.testing.probe import check_close

LENGTH, ABSENT = 7, 2
"""Positions of the sequences that are tried, and of the padding of one of them."""

PLACES_S = torch.tensor([LENGTH + 3, 0, LENGTH - 1, LENGTH + 2, 2])
"""Of two sequences, in no order, and none of padding."""

TOLERANCE = 1e-4

Case = tuple[Tensor | None, Documents | None]
"""The mask of a batch, and the documents of a packed row."""


def asked_positions(cls: type[LanguageModel]) -> None:
    """`forward_at` gives what `forward`, or `forward_packed`, gives at those positions, and the same gradients."""
    llm = make_tiny(cls).eval().requires_grad_(True)
    embeds_BTE = torch.randn(2, LENGTH, llm.geometry.width)
    cases: dict[str, Case] = {"whole sequences": (None, None)}
    for side in ("left", "right"):
        mask_BT = torch.ones(2, LENGTH, dtype=torch.bool)
        mask_BT[1, slice(0, ABSENT) if side == "left" else slice(-ABSENT, None)] = False
        cases[f"a batch of which one sequence is padded on the {side}"] = (mask_BT, None)
    if llm.packs:
        cases["a packed row"] = (None, Documents.of([4, 1, 2 * LENGTH - 5]))
    for what, case in cases.items():
        given_BTE = embeds_BTE if case[1] is None else embeds_BTE.view(1, 2 * LENGTH, -1)
        for asked_S in (PLACES_S, PLACES_S[:1], PLACES_S[:0]):
            _check(llm, given_BTE, asked_S, case, f"forward_at of {len(asked_S)} positions of {what}")


def _check(llm: LanguageModel, embeds_BTE: Tensor, places_S: Tensor, case: Case, what: str) -> None:
    """Compares states and gradients at some places with those of the whole."""
    mask_BT, documents = case

    def whole(given_BTE: Tensor) -> Tensor:
        hidden_BTE = llm(given_BTE, mask_BT) if documents is None else llm.forward_packed(given_BTE, documents)
        hidden_SE: Tensor = hidden_BTE.flatten(0, 1)[places_S]
        return hidden_SE

    wanted_SE, wanted = _gradients(llm, embeds_BTE, whole, what.replace("forward_at", "forward"))
    found_SE, found = _gradients(llm, embeds_BTE, lambda x: llm.forward_at(x, places_S, mask_BT, documents), what)
    check_close(
        found_SE,
        wanted_SE,
        f"{what} gives other states than forward has there: positions that are not asked for are attended to as ever, "
        "and places_S count over all sequences as one long row",
        TOLERANCE,
    )
    for name, gradient in wanted.items():
        # none at all is as good as one of zeros
        given = found.get(name, torch.zeros_like(gradient))
        check_close(given, gradient, f"{what} gives {name} another gradient than forward at them", TOLERANCE)


def _gradients(
    llm: LanguageModel, embeds_BTE: Tensor, run: Callable[[Tensor], Tensor], what: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """The states that a pass gives, and what their sum, each number weighted otherwise, gives as gradients."""
    llm.zero_grad(set_to_none=True)
    leaf = embeds_BTE.clone().requires_grad_()
    with calling(what):
        hidden_SE = run(leaf)
    require(hidden_SE.requires_grad, f"{what} gives states without a graph, from which nothing would learn")
    weights_SE = torch.linspace(-1, 1, hidden_SE.numel()).view_as(hidden_SE)
    with calling(f"the backward pass of {what}"):
        torch.autograd.backward((hidden_SE * weights_SE).sum())
    found = {name: p.grad for name, p in llm.named_parameters() if p.grad is not None}
    return hidden_SE.detach(), found | ({} if leaf.grad is None else {"the embeddings": leaf.grad})


POSITION_CHECKS: tuple[Check, ...] = (asked_positions,)
