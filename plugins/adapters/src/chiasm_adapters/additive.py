"""Additive mixture of features: a convex combination of the encoders' projections.

Shape letters: B images, L layers, N tokens, D width of an encoder, E width out; k counts encoders, K of them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import PositiveFloat, PositiveInt, field_validator
from torch import Tensor, nn

from chiasm.errors import CombinationError
from chiasm.features import Features, FeatureSpec, SequenceSpec, TokenSequence
from chiasm.fusion import Fusion
from chiasm.settings import Settings
from chiasm_adapters._geometry import check_features, common_grid, layers_to_channels, resample, tiny_weights


class AdditiveConfig(Settings):
    """The shares of the encoders, and what to do with grids that differ."""

    width: PositiveInt | None = None
    """Width of the sum; null for the width of the language model."""
    weights: tuple[PositiveFloat, ...] | None = None
    """The share a_k of each encoder, in their order; they sum to 1. Null for equal shares. An encoder of no share is
    one to leave out of the run."""
    learned: bool = False
    """Trains the shares, from `weights` on, as the softmax of one number for each encoder."""
    bias: bool = True
    """Gives every projection W_k a bias."""
    align: Literal["error", "interpolate"] = "interpolate"
    """Grids that differ: `interpolate` resamples the projections bilinearly, without anti-aliasing; `error` refuses."""
    to: Literal["largest", "first"] = "largest"
    """The grid that `interpolate` brings all to: that of most tokens, or the first encoder's."""

    @field_validator("weights")
    @classmethod
    def _convex(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and abs(sum(value) - 1) > 1e-6:
            raise ValueError(f"the shares {list(value)} sum to {sum(value):g}, wanted 1; divide each by their sum")
        return value


class Additive(Fusion):
    """`sum_k a_k W_k x_k`, the a_k positive with sum 1: `[B, L_k, N_k, D_k]` to `[B, N, E]`.

    A-MoF (arXiv 2401.06209, section 4.1) is `a x_1 + (1 - a) x_2` of two encoders of one width, with an adapter behind
    it; here each x_k, its layers concatenated on channels, has a projection of its own, so that widths may differ, and
    there may be any number of encoders. With free W_k the shares add no function; they set where training starts and
    how fast each encoder learns. Resampling and projecting commute, so tokens are projected on their own grid. Weights
    start as those of `nn.Linear`; the dtype out is that of the parameters. One encoder has the share 1, and nothing to
    learn about it.

    Raises:
        ValueError: there is not one share for each encoder, grids differ under `align: error`, or features are not
            those that it was built for.
    """

    Config = AdditiveConfig
    config: AdditiveConfig

    def __init__(self, config: AdditiveConfig, features: Sequence[FeatureSpec], llm_width: int) -> None:
        super().__init__(config, features, llm_width)
        self.projections = nn.ModuleList(
            nn.Linear(spec.layers * spec.width, self.out.width, bias=config.bias) for spec in self.features
        )
        count = len(self.features)
        self.shares = config.weights or (1 / count,) * count
        learned = config.learned and count > 1
        self.logits = nn.Parameter(torch.tensor(self.shares).log()) if learned else None

    @classmethod
    def spec(cls, config: Settings, features: Sequence[FeatureSpec], llm_width: int) -> SequenceSpec:
        assert isinstance(config, AdditiveConfig)
        grid = common_grid("additive", features, config.align, config.to)
        if config.weights is not None and len(config.weights) != len(features):
            raise CombinationError(
                f"additive wants one share for each encoder, `weights` has {len(config.weights)} and the run has "
                f"{len(features)} encoders; give as many, or null for equal shares"
            )
        return SequenceSpec(grid[0] * grid[1], config.width or llm_width, grid)

    @classmethod
    def tiny(cls) -> Self:
        features = [FeatureSpec(layers=2, grid=(2, 3), width=5), FeatureSpec(layers=1, grid=(3, 5), width=4)]
        with tiny_weights():
            return cls(AdditiveConfig(width=6, learned=True), features, llm_width=7)

    def forward(self, features: Sequence[Features]) -> TokenSequence:
        check_features("additive", self.features, features)
        assert self.out.grid is not None
        shares: Sequence[float | Tensor] = self.shares if self.logits is None else self.logits.softmax(0).unbind()
        parts = []
        for share, projection, item in zip(shares, self.projections, features, strict=True):
            projected_BNE = share * projection(layers_to_channels(item.tokens))
            parts.append(resample(projected_BNE, item.grid, self.out.grid))
        return TokenSequence(functools.reduce(torch.add, parts), self.out.grid)
