"""Channel concatenation: the features of all encoders at the same place of the image, side by side.

Shape letters: B images, L layers, N tokens, D width; k counts encoders.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import torch

from chiasm.features import Features, FeatureSpec, SequenceSpec, TokenSequence
from chiasm.fusion import Fusion
from chiasm.settings import Settings
from chiasm_adapters._geometry import check_features, common_grid, layers_to_channels, resample, tiny_weights


class ConcatChannelsConfig(Settings):
    """What to do with grids that differ."""

    align: Literal["error", "interpolate"] = "error"
    """`error` refuses them; `interpolate` resamples them bilinearly, without anti-aliasing."""
    to: Literal["largest", "first"] = "largest"
    """The grid that `interpolate` brings all to: that of most tokens, or the first encoder's."""


class ConcatChannels(Fusion):
    """`[h_1 ; .. ; h_K]` on channels: `[B, L_k, N_k, D_k]` of any number of encoders to `[B, N, sum_k L_k * D_k]`.

    The layers of an encoder are concatenated too: channels run by encoder, in it by layer. Prismatic (arXiv
    2402.07865, section 4.2) and Eagle (arXiv 2408.15998) put an MLP behind it. Holds no parameter; the
    dtype is that of the features.

    Raises:
        ValueError: grids differ under `align: error`, or features are not those that it was built for.
    """

    Config = ConcatChannelsConfig

    @classmethod
    def spec(cls, config: Settings, features: Sequence[FeatureSpec], llm_width: int) -> SequenceSpec:
        assert isinstance(config, ConcatChannelsConfig)
        grid = common_grid("concat_channels", features, config.align, config.to)
        return SequenceSpec(grid[0] * grid[1], sum(spec.layers * spec.width for spec in features), grid)

    @classmethod
    def tiny(cls) -> Self:
        features = [FeatureSpec(layers=2, grid=(2, 3), width=5), FeatureSpec(layers=1, grid=(3, 5), width=4)]
        with tiny_weights():
            return cls(ConcatChannelsConfig(align="interpolate"), features, llm_width=7)

    def forward(self, features: Sequence[Features]) -> TokenSequence:
        check_features("concat_channels", self.features, features)
        grid = self.out.grid
        assert grid is not None
        parts = [resample(layers_to_channels(item.tokens), item.grid, grid) for item in features]
        return TokenSequence(torch.cat(parts, dim=2), grid)
