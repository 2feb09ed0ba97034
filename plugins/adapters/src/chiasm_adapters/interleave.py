"""Interleaved mixture of features: at each place of the image, one token of each encoder after the other.

Shape letters: B images, L layers, N tokens, D width of an encoder, E width out; k counts encoders, K of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import PositiveInt
from torch import nn

from chiasm.features import Features, FeatureSpec, SequenceSpec, TokenSequence
from chiasm.fusion import Fusion
from chiasm.settings import Settings
from chiasm_adapters._geometry import check_features, common_grid, layers_to_channels, resample, tiny_weights
from chiasm_adapters._layers import perceptron


class InterleaveConfig(Settings):
    """The perceptrons, and what to do with grids that differ."""

    width: PositiveInt | None = None
    """Width of the tokens; null for the width of the language model."""
    depth: PositiveInt = 2
    """Linear layers of each encoder's perceptron, with GELU (the exact one, by erf) between; 1 for one matrix."""
    align: Literal["error", "interpolate"] = "interpolate"
    """Grids that differ: `interpolate` resamples what the perceptrons give bilinearly, without anti-aliasing; `error`
    refuses, as the paper has equal grids alone."""
    to: Literal["largest", "first"] = "largest"
    """The grid that `interpolate` brings all to: that of most tokens, or the first encoder's."""


class Interleave(Fusion):
    """`MLP_1(x_1)[0], .., MLP_K(x_K)[0], MLP_1(x_1)[1], ..`: `[B, L_k, N_k, D_k]` to `[B, K * N, E]`.

    I-MoF (arXiv 2401.06209, section 4.2), for any number of encoders: tokens in the row-major order of places, and at
    each place in the order of encoders. The layers of an encoder are concatenated on channels. In the paper the
    perceptrons are the adapters, so `identity` goes behind this one, with `width` null. Weights start as those of
    `nn.Linear`; the dtype out is that of the parameters. Only the tokens of one encoder alone keep a grid.

    Raises:
        ValueError: there is no encoder, grids differ under `align: error`, or features are not those that it was built
            for.
    """

    Config = InterleaveConfig
    config: InterleaveConfig

    def __init__(self, config: InterleaveConfig, features: Sequence[FeatureSpec], llm_width: int) -> None:
        super().__init__(config, features, llm_width)
        self.grid = common_grid("interleave", self.features, config.align, config.to)
        self.projections = nn.ModuleList(
            perceptron([spec.layers * spec.width, *[self.out.width] * config.depth]) for spec in self.features
        )

    @classmethod
    def spec(cls, config: Settings, features: Sequence[FeatureSpec], llm_width: int) -> SequenceSpec:
        assert isinstance(config, InterleaveConfig)
        grid = common_grid("interleave", features, config.align, config.to)
        tokens = len(features) * grid[0] * grid[1]
        return SequenceSpec(tokens, config.width or llm_width, grid if len(features) == 1 else None)

    @classmethod
    def tiny(cls) -> Self:
        features = [FeatureSpec(layers=2, grid=(2, 3), width=5), FeatureSpec(layers=1, grid=(3, 5), width=4)]
        with tiny_weights():
            return cls(InterleaveConfig(width=6), features, llm_width=7)

    def forward(self, features: Sequence[Features]) -> TokenSequence:
        check_features("interleave", self.features, features)
        pairs = zip(self.projections, features, strict=True)
        parts = [
            resample(projection(layers_to_channels(item.tokens)), item.grid, self.grid) for projection, item in pairs
        ]
        return TokenSequence(torch.stack(parts, dim=2).flatten(1, 2), self.out.grid)
