"""What the adapters that need a place for each token share: a grid, and its blocks of neighbours.

Shape letters: B images, N tokens, M blocks, S tokens of a block, D width, (h, w) a grid, s a factor.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from chiasm.errors import CombinationError
from chiasm.features import Grid, SequenceSpec


def need_grid(adapter: str, sequence: SequenceSpec) -> Grid:
    """The grid of a sequence.

    Raises:
        CombinationError: its tokens have no place in the image.
    """
    if sequence.grid is None:
        raise CombinationError(
            f"{adapter} wants tokens on a grid, the {sequence.tokens} tokens of the fusion have none; choose a fusion "
            "that gives one, such as `concat_channels`, or an adapter that needs none, such as `mlp`"
        )
    return sequence.grid


def block_grid(grid: Grid, factor: int) -> Grid:
    """Rows and columns of blocks; a block at the lower or right border may be short of tokens."""
    return -(-grid[0] // factor), -(-grid[1] // factor)


def check_divisible(adapter: str, grid: Grid, factor: int, remedy: str) -> None:
    """Raises CombinationError where a grid does not fall into whole blocks; the message gives both and the remedy."""
    if grid[0] % factor or grid[1] % factor:
        raise CombinationError(
            f"{adapter}: blocks of {factor} x {factor} tokens do not fill the grid {grid}; {remedy}, or choose a "
            "`factor` or an image size that fits"
        )


def check_smaller(adapter: str, given: Grid, wanted: Grid, remedy: str) -> None:
    """Raises CombinationError where pooling would have to repeat tokens; the message gives both grids and a remedy."""
    if wanted[0] > given[0] or wanted[1] > given[1]:
        raise CombinationError(
            f"{adapter} was asked to pool to the grid {wanted}, the tokens stand on {given}, which has fewer rows or "
            f"columns; {remedy}, or choose encoders or an image size that give more tokens"
        )


def to_blocks(tokens_BND: Tensor, grid: Grid, factor: int) -> Tensor:
    """`[B, N, D]` to `[B, M, S, D]`: blocks row by row, and in each its s x s tokens row by row.

    A grid that does not fall into whole blocks gets zero tokens below and to the right.
    """
    rows, columns = block_grid(grid, factor)
    map_BhwD = torch.unflatten(tokens_BND, 1, grid)
    map_BhwD = F.pad(map_BhwD, (0, 0, 0, columns * factor - grid[1], 0, rows * factor - grid[0]))
    split = torch.unflatten(torch.unflatten(map_BhwD, 2, (columns, factor)), 1, (rows, factor))
    return split.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # from [B, rows, s, columns, s, D]
