"""One encoder, nothing to merge.

Shape letters: B images, L layers, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from chiasm.errors import CombinationError
from chiasm.features import Features, FeatureSpec, SequenceSpec, TokenSequence
from chiasm.fusion import Fusion
from chiasm.settings import Settings
from chiasm_adapters._geometry import check_features, check_some, layers_to_channels, tiny_weights


class SingleConfig(Settings):
    """Nothing to choose."""


class Single(Fusion):
    """The features of exactly one encoder as they are, in their dtype: `[B, L, N, D]` to `[B, N, L * D]`.

    Several selected layers are concatenated on channels, in the order of the selection: the width that comes out is
    L * D. One layer, LLaVA's `layers: -2` (arXiv 2304.08485, section 4.1), keeps the width. Holds no parameter.

    Raises:
        ValueError: there are several encoders, or features that it was not built for.
    """

    Config = SingleConfig

    @classmethod
    def spec(cls, config: Settings, features: Sequence[FeatureSpec], llm_width: int) -> SequenceSpec:
        check_some("single", features)
        if len(features) > 1:
            raise CombinationError(
                f"single takes one encoder, given {len(features)}; choose a fusion that takes several, "
                "say concat_channels or project_sum"
            )
        only = features[0]
        return SequenceSpec(only.tokens, only.layers * only.width, only.grid)

    @classmethod
    def tiny(cls) -> Self:
        with tiny_weights():
            return cls(SingleConfig(), [FeatureSpec(layers=3, grid=(2, 5), width=6)], llm_width=7)

    def forward(self, features: Sequence[Features]) -> TokenSequence:
        check_features("single", self.features, features)
        return TokenSequence(layers_to_channels(features[0].tokens), self.out.grid)
