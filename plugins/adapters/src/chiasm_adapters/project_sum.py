"""OmniFusion's merge: project every layer of every encoder, and sum.

Shape letters: B images, L layers, N tokens, D width of an encoder, E width out; k counts encoders, l layers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from chiasm.features import Features, FeatureSpec, SequenceSpec, TokenSequence
from chiasm.fusion import Fusion
from chiasm.settings import Settings
from chiasm_adapters._geometry import (
    check_equal_grids,
    check_features,
    check_some,
    equal_grids,
    largest_grid,
    resample,
    tiny_weights,
)
from chiasm_adapters._projection import LayerProjections


class ProjectSumConfig(Settings):
    """The details of the merge."""

    width: PositiveInt | None = None
    """Width of the sum; null for the width of the language model."""
    layer_scalars: bool = True
    """Trains the scalars a_kl; without, they stay at their first value 1 / L_k, so both start as the same function."""
    activation: Literal["gelu", "none"] = "gelu"
    """After the sum: GELU (the exact one, by erf), or nothing."""
    bias: bool = True
    """Gives every projection W_kl a bias b_kl."""
    align: Literal["pad", "interpolate", "error"] = "pad"
    """Grids that differ: `pad` appends zero tokens to the shorter projections, as the paper does, so that tokens of
    unlike places are summed; `interpolate` resamples projections bilinearly to the grid of most tokens; `error`
    refuses."""


class ProjectSum(Fusion):
    """`GELU(sum_k u_k)` with `u_k = sum_l a_kl (W_kl LN(h_kl) + b_kl)`: `[B, L_k, N_k, D_k]` to `[B, max_k N_k, E]`.

    OmniFusion's mixer 3 (arXiv 2404.06212, section 3.1) is this fusion with the adapter `linear` behind it, which is
    the shared output layer. With one encoder that pair is the control that the paper lacks: it separates what all
    layers give from what a second encoder gives.

    Each u_k is one matrix product, with an affine map of its own in every LN (`_projection.py`). Each a_kl, whose
    start the paper does not state, starts as 1 / L_k: u_k is the mean of its projected layers, and as their W_kl are
    independent its deviation is 1 / sqrt(L_k) of one layer's. The dtype out is that of the parameters, which features
    must share, or that of autocast.

    With `align: pad` and grids that differ the sequence has no grid. It is u_k that is padded: what is beyond the end
    of the shorter one adds neither a bias nor the shift of a normalisation.

    Raises:
        ValueError: grids differ under `align: error`, or features are not those that it was built for.
    """

    Config = ProjectSumConfig
    config: ProjectSumConfig

    def __init__(self, config: ProjectSumConfig, features: Sequence[FeatureSpec], llm_width: int) -> None:
        super().__init__(config, features, llm_width)
        self.projections = nn.ModuleList(
            LayerProjections(spec, self.out.width, layer_scalars=config.layer_scalars, bias=config.bias)
            for spec in self.features
        )

    @classmethod
    def spec(cls, config: Settings, features: Sequence[FeatureSpec], llm_width: int) -> SequenceSpec:
        assert isinstance(config, ProjectSumConfig)
        check_some("project_sum", features)
        if config.align == "error":
            check_equal_grids(
                "project_sum",
                features,
                "set `align: pad` or `align: interpolate`, or choose image sizes and encoders whose grids are equal",
            )
        grid = largest_grid(features)
        kept = grid if config.align == "interpolate" or equal_grids(features) else None
        return SequenceSpec(grid[0] * grid[1], config.width or llm_width, kept)

    @classmethod
    def tiny(cls) -> Self:
        features = [FeatureSpec(layers=3, grid=(2, 3), width=5), FeatureSpec(layers=2, grid=(3, 5), width=4)]
        with tiny_weights():
            return cls(ProjectSumConfig(width=6), features, llm_width=7)

    def forward(self, features: Sequence[Features]) -> TokenSequence:
        check_features("project_sum", self.features, features)
        pairs = zip(self.projections, features, strict=True)
        parts = [self._place(projection(item.tokens), item) for projection, item in pairs]
        sum_BNE = functools.reduce(torch.add, parts)
        return TokenSequence(F.gelu(sum_BNE) if self.config.activation == "gelu" else sum_BNE, self.out.grid)

    def _place(self, part_BNE: Tensor, item: Features) -> Tensor:
        """One encoder's projection on the tokens that come out."""
        if self.out.grid is not None:
            return resample(part_BNE, item.grid, self.out.grid)
        return F.pad(part_BNE, (0, 0, 0, self.out.tokens - part_BNE.shape[1]))
