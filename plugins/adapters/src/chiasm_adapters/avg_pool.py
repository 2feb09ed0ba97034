"""The mean of neighbouring tokens, then a perceptron.

Shape letters: B images, N tokens, M cells of the grid out, D width in, E width of the language model, (h, w) a grid.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from pydantic import Field, PositiveInt, model_validator
from torch.nn import functional as F

from chiasm.adapter import Adapter
from chiasm.features import SequenceSpec, TokenSequence
from chiasm.settings import Settings
from chiasm_adapters._blocks import block_grid, check_divisible, check_smaller, need_grid
from chiasm_adapters._geometry import check_sequence, tiny_weights
from chiasm_adapters._layers import mlp_widths, perceptron


class AvgPoolConfig(Settings):
    """What is averaged, and the size of the perceptron."""

    factor: PositiveInt | None = 2
    """s: the mean of each block of s x s tokens; refuses a grid that does not fall into whole blocks."""
    grid: tuple[PositiveInt, PositiveInt] | None = None
    """In place of `factor`, the rows and columns that come out, of any grid that has as many: adaptive pooling, where
    cell i of n averages rows floor(i h / n) up to ceil((i + 1) h / n), so that neighbours may share a row."""
    depth: int = Field(default=2, ge=1, le=8)
    """Linear layers, with GELU (the exact one, by erf) between them; 1 is one matrix, as in MM1."""
    hidden: PositiveInt | None = None
    """Width between the layers; null for the width of the language model."""

    @model_validator(mode="before")
    @classmethod
    def _grid_replaces_the_default(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("grid") is not None and "factor" not in given:
            return {**given, "factor": None}
        return given

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.factor is None) == (self.grid is None):
            raise ValueError(
                f"avg_pool takes one of `factor` and `grid`, given are factor={self.factor} and grid={self.grid}; "
                "set the other to null"
            )
        return self


class AvgPool(Adapter):
    """`MLP(mean of a cell's tokens)`: `[B, N, D]` to `[B, M, E]`, on the smaller grid.

    DeCo (arXiv 2405.20985) pools adaptively and then projects; one of the connectors of MM1 (arXiv 2403.09611) is
    average pooling and one matrix.
    Initialised as `nn.Linear`; the dtype out is that of the parameters.

    Raises:
        ValueError: the tokens have no grid, blocks do not fill it, `grid` is larger, or the sequence is not the one
            that it was built for.
    """

    Config = AvgPoolConfig

    def __init__(self, config: AvgPoolConfig, sequence: SequenceSpec, llm_width: int) -> None:
        super().__init__(config, sequence, llm_width)
        self.layers = perceptron(mlp_widths(sequence.width, config.depth, config.hidden, llm_width))

    @classmethod
    def spec(cls, config: Settings, sequence: SequenceSpec, llm_width: int) -> SequenceSpec:
        assert isinstance(config, AvgPoolConfig)
        given = need_grid("avg_pool", sequence)
        if config.factor is not None:
            grid = block_grid(given, config.factor)
            remedy = f"set `grid: [{grid[0]}, {grid[1]}]` to average cells of unequal size"
            check_divisible("avg_pool", given, config.factor, remedy)
        else:
            assert config.grid is not None
            grid = config.grid
            check_smaller("avg_pool", given, grid, f"set `grid` to at most [{given[0]}, {given[1]}]")
        return SequenceSpec(grid[0] * grid[1], llm_width, grid)

    @classmethod
    def tiny(cls) -> Self:
        with tiny_weights():
            return cls(AvgPoolConfig(grid=(2, 3)), SequenceSpec(tokens=15, width=5, grid=(3, 5)), llm_width=7)

    def forward(self, sequence: TokenSequence) -> TokenSequence:
        check_sequence("avg_pool", self.sequence, sequence)
        assert sequence.grid is not None
        assert self.out.grid is not None
        map_BDhw = torch.unflatten(sequence.tokens.transpose(1, 2), 2, sequence.grid)
        pooled_BMD = F.adaptive_avg_pool2d(map_BDhw, self.out.grid).flatten(2).transpose(1, 2)
        return TokenSequence(self.layers(pooled_BMD), self.out.grid)
