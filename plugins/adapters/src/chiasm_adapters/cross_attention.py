"""Mini-Gemini's patch info mining: tokens of low resolution gather from their own region of high resolution.

Shape letters: B images, L layers, N tokens of low resolution, S high-resolution tokens of a window, D width of an
encoder, W width out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from pydantic import PositiveInt
from torch import nn

from chiasm.errors import CombinationError
from chiasm.features import Features, FeatureSpec, SequenceSpec, TokenSequence
from chiasm.fusion import Fusion
from chiasm.settings import Settings
from chiasm_adapters._geometry import check_features, layers_to_channels, tiny_weights
from chiasm_adapters._layers import check_heads
from chiasm_adapters._windows import attend, to_windows, window_of


class CrossAttentionConfig(Settings):
    """The details of the attention."""

    heads: PositiveInt = 1
    """Attention heads; they must divide W. Mini-Gemini has one."""


class CrossAttention(Fusion):
    """`x + softmax(q(x) k(y)^T / sqrt(W)) v(y)`, x and y of two encoders: to `[B, N, W]`, W = L_1 * D_1.

    Mini-Gemini's patch info mining (arXiv 2403.18814, section 3.2), with the adapter `mlp` behind it: the first encoder
    gives N tokens of low resolution, and each attends to the s x s tokens of the second encoder that lie in its own
    cell. q, k and v are each a layer normalisation (eps 1e-5) and a matrix, as in the released code; k has no bias and
    its normalisation no shift, which the softmax would cancel. Layers of an encoder are concatenated on channels.

    Rows and columns per cell are rounded up, and a high-resolution grid that is no such multiple is first resampled to
    it, bilinearly: 24 x 24 and 32 x 32 give s = 2, and 48 x 48. Weights start as those of `nn.Linear`.

    Raises:
        ValueError: there are not two encoders, the second's grid is no finer than the first's, the heads do not divide
            W, or features are not those that it was built for.
    """

    Config = CrossAttentionConfig
    config: CrossAttentionConfig

    def __init__(self, config: CrossAttentionConfig, features: Sequence[FeatureSpec], llm_width: int) -> None:
        super().__init__(config, features, llm_width)
        width, high = self.out.width, self.features[1].layers * self.features[1].width
        self.query = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.key = nn.Sequential(nn.LayerNorm(high, bias=False), nn.Linear(high, width, bias=False))
        self.value = nn.Sequential(nn.LayerNorm(high), nn.Linear(high, width))

    @classmethod
    def spec(cls, config: Settings, features: Sequence[FeatureSpec], llm_width: int) -> SequenceSpec:
        assert isinstance(config, CrossAttentionConfig)
        if len(features) != 2:
            raise CombinationError(
                f"cross_attention takes two encoders, one of low and one of high resolution, given {len(features)}; "
                "choose `single` for one, and a fusion that takes several, say `sva`, for more"
            )
        low, high = features
        if window_of(high.grid, low.grid) == (1, 1):
            raise CombinationError(
                f"cross_attention wants a second encoder of a finer grid than the first's, given {low.grid} and then "
                f"{high.grid}: a token would have one to attend to; choose the other order, or give the second a "
                "larger image"
            )
        width = low.layers * low.width
        check_heads("cross_attention", config.heads, width)
        return SequenceSpec(low.tokens, width, low.grid)

    @classmethod
    def tiny(cls) -> Self:
        features = [FeatureSpec(layers=2, grid=(2, 3), width=4), FeatureSpec(layers=1, grid=(3, 5), width=5)]
        with tiny_weights():
            return cls(CrossAttentionConfig(heads=2), features, llm_width=7)

    def forward(self, features: Sequence[Features]) -> TokenSequence:
        check_features("cross_attention", self.features, features)
        low, high = features
        x_BNW = layers_to_channels(low.tokens)
        y_BNSC = to_windows(layers_to_channels(high.tokens), high.grid, low.grid)
        mined_BNW = attend(self.query(x_BNW), self.key(y_BNSC), self.value(y_BNSC), self.config.heads)
        return TokenSequence(x_BNW + mined_BNW, self.out.grid)
