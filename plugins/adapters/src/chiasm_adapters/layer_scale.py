"""COMM's merge: all layers of each encoder weighed and summed, then the encoders side by side on channels.

Shape letters: B images, L layers, N tokens, D width of an encoder, E_k width of its sum; k counts encoders, l layers.
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
from chiasm_adapters._geometry import check_features, common_grid, resample, tiny_weights
from chiasm_adapters._layers import perceptron
from chiasm_adapters._projection import LayerProjections


class LayerScaleConfig(Settings):
    """The details of the merge."""

    width: PositiveInt | None = None
    """E_k, of each encoder's sum; null for the encoder's own width."""
    bias: bool = True
    """Gives every W_kl a bias b_kl."""
    mlp: Literal["others", "all", "none"] = "others"
    """Which encoders get a perceptron behind the sum: all but the first, as COMM has it for DINOv2 beside CLIP, or
    all, or none. One encoder with `others` is the plain sum."""
    expansion: PositiveInt = 4
    """The perceptron is this many times as wide inside as E_k; the 4 is ours."""
    align: Literal["error", "interpolate"] = "interpolate"
    """Grids that differ: `interpolate` resamples what is concatenated bilinearly, without anti-aliasing; `error`
    refuses."""
    to: Literal["largest", "first"] = "largest"
    """The grid that `interpolate` brings all to: that of most tokens, or the first encoder's."""


class LayerScale(Fusion):
    """`[u_1 ; MLP_2(u_2) ; ..]` on channels, `u_k = sum_l a_kl (W_kl LN(h_kl) + b_kl)`: to `[B, N, sum_k E_k]`.

    LLN-layerscale (linear, layer norm, layer scale) with the multi-level merge of COMM (arXiv 2310.08825, section 4):
    trained scalars a_kl weigh the layers of one encoder, the sum of the second passes a perceptron of two layers with
    GELU (the exact one), both are concatenated on channels, and a linear layer follows, which is the adapter `linear`.
    COMM takes all layers of CLIP and the last six of DINOv2: `layers` of the run's encoders. Widths E_k, the start of
    a_kl (1 / L_k) and grids that differ are not in the paper. Each u_k is one matrix product (`_projection.py`); the
    dtype out is that of the parameters, which features must share, or that of autocast.

    Raises:
        ValueError: there is no encoder, grids differ under `align: error`, or features are not those that it was built
            for.
    """

    Config = LayerScaleConfig
    config: LayerScaleConfig

    def __init__(self, config: LayerScaleConfig, features: Sequence[FeatureSpec], llm_width: int) -> None:
        super().__init__(config, features, llm_width)
        self.projections = nn.ModuleList()
        self.mlps = nn.ModuleList()
        for k, spec in enumerate(self.features):
            width = config.width or spec.width
            self.projections.append(LayerProjections(spec, width, layer_scalars=True, bias=config.bias))
            deeper = config.mlp == "all" or (config.mlp == "others" and k > 0)
            self.mlps.append(perceptron([width, config.expansion * width, width]) if deeper else nn.Identity())

    @classmethod
    def spec(cls, config: Settings, features: Sequence[FeatureSpec], llm_width: int) -> SequenceSpec:
        assert isinstance(config, LayerScaleConfig)
        grid = common_grid("layer_scale", features, config.align, config.to)
        return SequenceSpec(grid[0] * grid[1], sum(config.width or spec.width for spec in features), grid)

    @classmethod
    def tiny(cls) -> Self:
        features = [FeatureSpec(layers=3, grid=(2, 3), width=5), FeatureSpec(layers=2, grid=(3, 5), width=4)]
        with tiny_weights():
            return cls(LayerScaleConfig(), features, llm_width=7)

    def forward(self, features: Sequence[Features]) -> TokenSequence:
        check_features("layer_scale", self.features, features)
        assert self.out.grid is not None
        parts = []
        for projection, mlp, item in zip(self.projections, self.mlps, features, strict=True):
            parts.append(resample(mlp(projection(item.tokens)), item.grid, self.out.grid))
        return TokenSequence(torch.cat(parts, dim=2), self.out.grid)
