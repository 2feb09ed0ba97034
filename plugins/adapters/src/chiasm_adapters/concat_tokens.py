"""Token concatenation: the projected tokens of all encoders, one encoder after the other.

Shape letters: B images, L layers, N tokens, D width of an encoder, E width out; k counts encoders.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from pydantic import PositiveInt
from torch import nn

from chiasm.features import Features, FeatureSpec, SequenceSpec, TokenSequence
from chiasm.fusion import Fusion
from chiasm.settings import Settings
from chiasm_adapters._geometry import check_features, check_some, layers_to_channels, tiny_weights


class ConcatTokensConfig(Settings):
    """The projections."""

    width: PositiveInt | None = None
    """Width of the tokens; null for the width of the language model."""
    bias: bool = True
    """Gives every projection W_k a bias."""


class ConcatTokens(Fusion):
    """`[W_1 x_1 ; .. ; W_K x_K]` on tokens: `[B, L_k, N_k, D_k]` of any number of encoders to `[B, sum_k N_k, E]`.

    OmniFusion's mixer 2 (arXiv 2404.06212, section 3.1) is this fusion with the adapter `transformer` behind it; MouSi
    (arXiv 2401.17221) and Eagle (arXiv 2408.15998) compare it too. Grids and widths may differ. The layers of an
    encoder are concatenated on channels, so W_k is `[E, L_k * D_k]`. Weights start as those of `nn.Linear`; the dtype
    out is that of the parameters. Only the tokens of one encoder alone keep its grid.

    Raises:
        ValueError: there is no encoder, or features are not those that it was built for.
    """

    Config = ConcatTokensConfig

    def __init__(self, config: ConcatTokensConfig, features: Sequence[FeatureSpec], llm_width: int) -> None:
        super().__init__(config, features, llm_width)
        self.projections = nn.ModuleList(
            nn.Linear(spec.layers * spec.width, self.out.width, bias=config.bias) for spec in self.features
        )

    @classmethod
    def spec(cls, config: Settings, features: Sequence[FeatureSpec], llm_width: int) -> SequenceSpec:
        assert isinstance(config, ConcatTokensConfig)
        check_some("concat_tokens", features)
        grid = features[0].grid if len(features) == 1 else None
        return SequenceSpec(sum(spec.tokens for spec in features), config.width or llm_width, grid)

    @classmethod
    def tiny(cls) -> Self:
        features = [FeatureSpec(layers=2, grid=(2, 3), width=5), FeatureSpec(layers=1, grid=(3, 5), width=4)]
        with tiny_weights():
            return cls(ConcatTokensConfig(width=6), features, llm_width=7)

    def forward(self, features: Sequence[Features]) -> TokenSequence:
        check_features("concat_tokens", self.features, features)
        pairs = zip(self.projections, features, strict=True)
        parts = [projection(layers_to_channels(item.tokens)) for projection, item in pairs]
        return TokenSequence(torch.cat(parts, dim=1), self.out.grid)
