"""What a language model that packs promises of its rows.

Shape letters: T positions of a row, E width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chiasm.documents import Documents
from chiasm.llm import LanguageModel
from chiasm.testing.check import Check
from chiasm.testing.common import calling, make_tiny, require
from chiasm.testing.probe import check_close
from chiasm.testing.sequence_checks import input_gradients

LENGTHS = (3, 1, 6)
"""Of the documents that are tried."""

TOLERANCE = 1e-4


def packing(cls: type[LanguageModel]) -> None:
    """A row of documents gives each what it has alone, and no bit of one reaches another; only where it `packs`."""
    llm = make_tiny(cls).eval()
    with calling("packs"):
        packs = llm.packs
    require(isinstance(packs, bool), f"packs is {packs!r}, wanted True or False")
    if not packs:
        return
    row_1TE = torch.randn(1, sum(LENGTHS), llm.geometry.width)
    together = _packed(llm, row_1TE)
    require(
        together.shape == row_1TE.shape,
        f"forward_packed returned {tuple(together.shape)}, declared (1, T, E) = {tuple(row_1TE.shape)}",
    )
    with torch.no_grad(), calling("forward"):
        alone = torch.cat([llm(part) for part in torch.split(row_1TE, list(LENGTHS), dim=1)], dim=1)
    check_close(
        together,
        alone,
        "forward_packed gives a document other hidden states than forward gives it alone: count positions from 0 in "
        "each (documents.positions_1T), and attend within it only (documents.bounds_P)",
        TOLERANCE,
    )
    changed = row_1TE.clone()
    first, second = LENGTHS[0], LENGTHS[0] + LENGTHS[1]
    changed[:, first:second] = torch.randn(1, second - first, llm.geometry.width)
    after = _packed(llm, changed)
    others = torch.ones(row_1TE.shape[1], dtype=torch.bool)
    others[first:second] = False
    require(
        torch.equal(after[:, others], together[:, others]),
        "forward_packed lets a changed document change another's hidden states",
    )
    (gradient,) = input_gradients(
        llm.requires_grad_(False),
        lambda row: llm.forward_packed(row, Documents.of(LENGTHS)),
        [row_1TE],
        ["the embeddings of a packed row"],
    )
    require(
        gradient is not None and bool(gradient.any(dim=-1).all()),
        "no gradient reaches some embeddings of a packed row, so what is before the model would not learn from them",
    )


@torch.no_grad()
def _packed(llm: LanguageModel, row_1TE: Tensor) -> Tensor:
    with calling("forward_packed"):
        return llm.forward_packed(row_1TE, Documents.of(LENGTHS))


PACKING_CHECKS: tuple[Check, ...] = (packing,)
