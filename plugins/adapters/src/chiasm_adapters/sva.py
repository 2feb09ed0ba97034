"""Cambrian-1's spatial vision aggregator: a grid of queries, each of which sees its own cell of every encoder.

Shape letters: B images, L layers, N tokens, M queries (cells), S features of a cell (of one encoder, or of all), D
width of an encoder, W width of the queries; k counts encoders.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from chiasm.errors import CombinationError
from chiasm.features import Features, FeatureSpec, SequenceSpec, TokenSequence
from chiasm.fusion import Fusion
from chiasm.settings import Settings
from chiasm_adapters._geometry import check_features, check_some, layers_to_channels, tiny_weights
from chiasm_adapters._layers import check_heads, perceptron
from chiasm_adapters._windows import attend, to_windows, window_of


class SvaConfig(Settings):
    """The grid and the layers; the defaults are those of the released code."""

    grid: tuple[PositiveInt, PositiveInt] = (24, 24)
    """Rows and columns of queries, each a token."""
    depth: PositiveInt = 3
    """Layers of attention and perceptron."""
    width: PositiveInt = 1024
    """W, of queries, keys, values and tokens out."""
    heads: PositiveInt = 16
    """Attention heads; they must divide W."""


class SvaLayer(nn.Module):
    """`x + MLP(LN(x + A))`, A the attention of x to its cells: `[B, M, W]` and `[B, M, S_k, W]` to `[B, M, W]`.

    Every encoder has a W^K and a W^V of its own, each behind its own LN, and a trained vector for each place in a cell
    where there is more than one. There is no bias in any matrix.

    Args:
        width: W.
        heads: a divisor of W.
        sizes: S_k of each encoder.
    """

    def __init__(self, width: int, heads: int, sizes: Sequence[int]) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width, bias=False))
        # the shift of the only encoder's keys would move all scores alike, which the softmax does not see
        shift = len(sizes) > 1
        self.keys = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width, bias=shift), nn.Linear(width, width, bias=False)) for _ in sizes
        )
        self.values = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width, bias=False)) for _ in sizes
        )
        self.places = nn.ParameterDict(
            {str(k): nn.Parameter(torch.randn(size, width)) for k, size in enumerate(sizes) if size > 1}
        )
        self.output = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.mlp = perceptron([width, width, width], bias=False)

    def forward(self, x_BMW: Tensor, cells: Sequence[Tensor]) -> Tensor:
        placed = [cell + self.places[str(k)] if str(k) in self.places else cell for k, cell in enumerate(cells)]
        k_BMSW = torch.cat([key(cell) for key, cell in zip(self.keys, placed, strict=True)], dim=2)
        v_BMSW = torch.cat([value(cell) for value, cell in zip(self.values, placed, strict=True)], dim=2)
        attended_BMW = self.output(attend(self.query(x_BMW), k_BMSW, v_BMSW, self.heads))
        out_BMW: Tensor = x_BMW + self.mlp(self.norm(x_BMW + attended_BMW))
        return out_BMW


class Sva(Fusion):
    """Trained queries on a grid, each attending to its own cell of all encoders: `[B, L_k, N_k, D_k]` to `[B, M, W]`.

    Cambrian-1's spatial vision aggregator (arXiv 2406.16860, section 4) as a connector: one group of queries, nothing
    inside the language model, and the adapter `mlp` behind it. Each encoder, its layers concatenated on channels,
    passes `LN(W_2 GELU(W_1 x))` to the width W. A cell holds m_k x m_k of its features, m_k its rows (columns) over
    those of the queries, rounded up; where that is no whole number the projected features are resampled to m_k times
    the grid of queries, bilinearly, and so is an encoder that is coarser than the queries.

    Details are those of the released code, except that it draws one query for all cells and adds the mean over one
    encoder's tokens to the queries; here every cell has a query of its own, drawn from N(0, 1 / W), and sees nothing
    beyond its cell. The dtype out is that of the parameters.

    Raises:
        ValueError: there is no encoder, the heads do not divide W, a cell holds one feature in all, or features are
            not those that it was built for.
    """

    Config = SvaConfig
    config: SvaConfig

    def __init__(self, config: SvaConfig, features: Sequence[FeatureSpec], llm_width: int) -> None:
        super().__init__(config, features, llm_width)
        width = config.width
        self.projections = nn.ModuleList(
            nn.Sequential(*perceptron([spec.layers * spec.width, width, width]), nn.LayerNorm(width))
            for spec in self.features
        )
        self.queries = nn.Parameter(torch.randn(self.out.tokens, width) * width**-0.5)
        windows = [window_of(spec.grid, config.grid) for spec in self.features]
        sizes = [rows * columns for rows, columns in windows]
        self.layers = nn.ModuleList(SvaLayer(width, config.heads, sizes) for _ in range(config.depth))

    @classmethod
    def spec(cls, config: Settings, features: Sequence[FeatureSpec], llm_width: int) -> SequenceSpec:
        assert isinstance(config, SvaConfig)
        check_some("sva", features)
        check_heads("sva", config.heads, config.width)
        if len(features) == 1 and window_of(features[0].grid, config.grid) == (1, 1):
            raise CombinationError(
                f"sva: on its grid {config.grid} each query sees 1 feature of the only encoder, whose grid is "
                f"{features[0].grid}, and has nothing to choose from; set `grid` to fewer rows or columns, or add an "
                "encoder"
            )
        return SequenceSpec(config.grid[0] * config.grid[1], config.width, config.grid)

    @classmethod
    def tiny(cls) -> Self:
        features = [FeatureSpec(layers=2, grid=(2, 3), width=5), FeatureSpec(layers=1, grid=(3, 5), width=4)]
        with tiny_weights():
            return cls(SvaConfig(grid=(2, 2), depth=2, width=8, heads=2), features, llm_width=7)

    def forward(self, features: Sequence[Features]) -> TokenSequence:
        check_features("sva", self.features, features)
        pairs = zip(self.projections, features, strict=True)
        cells = [
            to_windows(projection(layers_to_channels(item.tokens)), item.grid, self.config.grid)
            for projection, item in pairs
        ]
        x_BMW = self.queries.expand(cells[0].shape[0], -1, -1)
        for layer in self.layers:
            x_BMW = layer(x_BMW, cells)
        return TokenSequence(x_BMW, self.out.grid)
