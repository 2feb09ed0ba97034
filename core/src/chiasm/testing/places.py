"""Whether tokens stand where their grid says: a change in one cell of the grid should move the token of that cell.

Shape letters: P probes (one changed cell each), N tokens, (h, w) a grid.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from chiasm.features import Grid
from chiasm.testing.common import require
from chiasm.testing.errors import ContractError

CELLS = 32
"""Places of the grid that are looked at."""

STANDS_OUT = 1.3
"""How many times another order must fit better than the stated one."""

SURE = 6.0
"""Standard errors by which another order must stand out of no order. Far-reaching layers with random weights tell
nothing; a wrong order stands out by far."""

STILL = 0.05
"""Movement, as a share of the largest, up to which a token counts as unmoved."""

LOCAL, LOST = 3.0, 0.15
"""How much more its own token moves than others where tokens are local; the share of it below which one is lost."""

MOST_PREFIX = 8
"""Prefix tokens that are thought of: CLS, and up to seven registers or the like."""

Cell = tuple[int, int]
Moved = Callable[[Grid, list[Cell]], Tensor]
"""Given a grid laid over the input and some of its cells, how far each output token moves when one cell is changed:
`[P, N]`."""


def check_places(moved: Moved, grid: Grid, tokens: int) -> None:
    """Raises ContractError where another order than row by row explains the tokens of a grid far better.

    Args:
        moved: changes cells of the input.
        grid: of the output, as stated.
        tokens: of the output.
    """
    rows, columns = grid
    cells = _some(grid)
    moved_PN = moved(grid, cells)
    orders = {"row by row": [i * columns + j for i, j in cells]}
    orders["column by column"] = [j * rows + i for i, j in cells]
    orders["rows from the bottom"] = [(rows - 1 - i) * columns + j for i, j in cells]
    orders["columns from the right"] = [i * columns + columns - 1 - j for i, j in cells]
    for shift in range(1, MOST_PREFIX + 1):
        orders[f"{shift} places late, behind a prefix token"] = [i * columns + j + shift for i, j in cells]
        orders[f"{shift} places early"] = [i * columns + j - shift for i, j in cells]
    own, _ = _score(moved_PN, orders.pop("row by row"))
    scores = {name: _score(moved_PN, order) for name, order in orders.items()}
    for name, other, order, given in _other_grids(grid, tokens):
        scores[name] = _score(moved(other, given), order)
    sure = {name: score for name, (score, sureness) in scores.items() if sureness > SURE} or {"row by row": own}
    likeliest = max(sure, key=lambda name: sure[name])
    require(
        sure[likeliest] < STANDS_OUT * max(own, 1.0),
        f"tokens seem to stand {likeliest}, wanted row by row on the grid {grid}: a change in a cell of the grid moves "
        f"the token there {sure[likeliest]:.1f} times as much as others, and its own {own:.1f} times",
    )
    _check_reached(moved_PN, cells, grid)
    _check_each(moved_PN, cells, grid)


def _check_each(moved_PN: Tensor, cells: list[Cell], grid: Grid) -> None:
    """Where nearly every token stands for its own cell, none of them may stand for nothing."""
    relative_PN = moved_PN / moved_PN.mean(dim=1, keepdim=True).clamp(min=1e-12)
    own_P = torch.stack([relative_PN[p, i * grid[1] + j] for p, (i, j) in enumerate(cells)])
    typical = float(own_P.median())
    if typical < LOCAL:
        return
    worst = int(own_P.argmin())
    require(
        float(own_P[worst]) > LOST * typical,
        f"the token of the cell {cells[worst]} of the grid {grid} does not stand for it: a change there moves it "
        f"{float(own_P[worst]):.1f} times as much as others, and other tokens theirs {typical:.1f} times; is a patch "
        "lost, or replaced?",
    )


def _check_reached(moved_PN: Tensor, cells: list[Cell], grid: Grid) -> None:
    """Where changes move few tokens, the cell's own token must be among them."""
    reached_PN = moved_PN > STILL * moved_PN.amax(dim=1, keepdim=True)
    few = [p for p in range(len(cells)) if 0 < 2 * int(reached_PN[p].sum()) <= moved_PN.shape[1]]
    missed = [p for p in few if not reached_PN[p, cells[p][0] * grid[1] + cells[p][1]]]
    if 2 * len(few) < len(cells) or 4 * len(missed) <= len(few):
        return
    token = int(moved_PN[missed[0]].argmax())
    raise ContractError(
        f"tokens seem to stand in another order than row by row on the grid {grid}: a change in the cell "
        f"{cells[missed[0]]} moves the token of the cell {(token // grid[1], token % grid[1])}, and not its own"
    )


def _score(moved_PN: Tensor, order: list[int]) -> tuple[float, float]:
    """How much the tokens that an order names move, against the mean of 1, and how many standard errors that is off."""
    # some tokens move more than others whatever is changed, say those in the middle of a convolution's map
    relative_PN = moved_PN / moved_PN.mean(dim=0, keepdim=True).clamp(min=1e-12)
    own = [relative_PN[p, token] for p, token in enumerate(order) if 0 <= token < moved_PN.shape[1]]
    if len(own) < 3 or 2 * len(own) < len(order):
        return 0.0, 0.0
    found = torch.stack(own)
    score, error = float(found.mean()), float(found.std()) / len(own) ** 0.5
    return score, (score - 1) / max(error, 1e-6)


def _other_grids(grid: Grid, tokens: int) -> list[tuple[str, Grid, list[int], list[Cell]]]:
    """Square grids that the tokens would fill but for prefix tokens that were kept, or patches that were lost."""
    others = []
    for extra in (-1, *range(1, MOST_PREFIX + 1)):
        edge = round(max(0, tokens - extra) ** 0.5)
        if edge < 2 or edge * edge != tokens - extra or (edge, edge) == grid:
            continue
        cells = _some((edge, edge))
        places = [i * edge + j for i, j in cells]
        square = f"on the grid {(edge, edge)}"
        if extra < 0:
            others.append((f"{square} without its first patch", (edge, edge), [n - 1 for n in places], cells))
            others.append((f"{square} without its last patch", (edge, edge), places, cells))
        else:
            others.append((f"{square} behind {extra} prefix tokens", (edge, edge), [n + extra for n in places], cells))
            others.append((f"{square} with {extra} tokens behind them", (edge, edge), places, cells))
    return others


def _some(grid: Grid) -> list[Cell]:
    corners = {(i, j) for i in (0, grid[0] - 1) for j in (0, grid[1] - 1)}  # what is lost is lost at an end
    others = [(i, j) for i in range(grid[0]) for j in range(grid[1]) if (i, j) not in corners]
    return sorted(corners) + random.Random(0).sample(others, min(CELLS - len(corners), len(others)))
