"""Windows of one grid over the cells of another, and attention of one query to each window.

Shape letters: B images, N tokens, M windows, S tokens of a window, C channels, W width, H heads, K width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chiasm.features import Grid
from chiasm_adapters._geometry import resample


def window_of(grid: Grid, cells: Grid) -> Grid:
    """Rows and columns of the window of each cell: the least that lose no row or column of the grid."""
    return -(-grid[0] // cells[0]), -(-grid[1] // cells[1])


def to_windows(tokens_BNC: Tensor, grid: Grid, cells: Grid) -> Tensor:
    """`[B, N, C]` to `[B, M, S, C]`: windows row by row, and in each its tokens row by row.

    A grid that does not fall into equal windows is resampled up to one that does, bilinearly.
    """
    rows, columns = window_of(grid, cells)
    full_BNC = resample(tokens_BNC, grid, (cells[0] * rows, cells[1] * columns))
    split = torch.unflatten(full_BNC, 1, (cells[0], rows, cells[1], columns))
    return split.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # from [B, rows of cells, rows, columns of cells, ..]


def attend(q_BMW: Tensor, k_BMSW: Tensor, v_BMSW: Tensor, heads: int) -> Tensor:
    """`softmax(q k^T / sqrt(K)) v` in each head, each query over its own window: to `[B, M, W]`."""
    q_BMHK, k_BMSHK, v_BMSHK = (torch.unflatten(x, -1, (heads, x.shape[-1] // heads)) for x in (q_BMW, k_BMSW, v_BMSW))
    scores_BMHS = torch.einsum("bmhk,bmshk->bmhs", q_BMHK * q_BMHK.shape[-1] ** -0.5, k_BMSHK)
    return torch.einsum("bmhs,bmshk->bmhk", scores_BMHS.softmax(-1).to(v_BMSHK.dtype), v_BMSHK).flatten(2)
