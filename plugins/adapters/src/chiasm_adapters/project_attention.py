"""OmniFusion's merge by attention: the projected layers of all encoders against a trained matrix.

Shape letters: B images, L layers, N tokens, S tokens of all encoders, M rows of the matrix, D width of an encoder, E
width out; k counts encoders, l layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import PositiveInt
from torch import nn
from torch.nn import functional as F

from chiasm.features import Features, FeatureSpec, SequenceSpec, TokenSequence
from chiasm.fusion import Fusion
from chiasm.settings import Settings
from chiasm_adapters._geometry import check_features, check_some, tiny_weights
from chiasm_adapters._layers import Attention, check_heads
from chiasm_adapters._projection import LayerProjections


class ProjectAttentionConfig(Settings):
    """The orientation and the details of the attention."""

    query: Literal["matrix", "features"] = "matrix"
    """What asks: `matrix`, as the stated length out, 576, demands (a token for each row); or `features`, as the text
    has it (a token for each of theirs)."""
    rows: PositiveInt = 576
    """M, of the trained matrix."""
    width: PositiveInt | None = None
    """E; null for the width of the language model."""
    heads: PositiveInt = 8
    """Attention heads; they must divide E. The paper does not give their number."""
    layer_scalars: bool = True
    """Trains the scalars a_kl; without, they stay at their first value 1 / L_k."""
    bias: bool = True
    """Gives the W_kl and the attention a bias; its keys have none, which softmax would cancel."""


class ProjectAttention(Fusion):
    """`GELU(MHA(Q, K, V))` of `v = [GELU(u_1) ; .. ; GELU(u_K)]` and M: `[B, L_k, N_k, D_k]` to `[B, M or S, E]`.

    OmniFusion's mixer 4 (arXiv 2404.06212, section 3.1) is this fusion with the adapter `linear` behind it. The paper
    contradicts itself, so both orientations are here: `query: features` is `MHA(Q=v, K=M, V=M)`, S = sum_k N_k tokens;
    `query: matrix` is `MHA(Q=M, K=v, V=v)`, as many tokens as M has rows. The u_k are those of `project_sum`. There is
    no residual and no normalisation around the attention; M is drawn from N(0, 1), its start is not published. At the
    start attention is nearly even, so the tokens out differ little until they learn. The dtype out is that of the
    parameters, which features must share, or that of autocast.

    Rows of M have no place in the image, and tokens of several encoders no common one: only `query: features` of one
    encoder keeps a grid.

    Raises:
        ValueError: there is no encoder, the heads do not divide E, or features are not those that it was built for.
    """

    Config = ProjectAttentionConfig
    config: ProjectAttentionConfig

    def __init__(self, config: ProjectAttentionConfig, features: Sequence[FeatureSpec], llm_width: int) -> None:
        super().__init__(config, features, llm_width)
        width = self.out.width
        self.projections = nn.ModuleList(
            LayerProjections(spec, width, layer_scalars=config.layer_scalars, bias=config.bias)
            for spec in self.features
        )
        self.matrix = nn.Parameter(torch.randn(config.rows, width))
        self.attention = Attention(width, config.heads, config.bias)

    @classmethod
    def spec(cls, config: Settings, features: Sequence[FeatureSpec], llm_width: int) -> SequenceSpec:
        assert isinstance(config, ProjectAttentionConfig)
        check_some("project_attention", features)
        width = config.width or llm_width
        check_heads("project_attention", config.heads, width)
        if config.query == "matrix":
            return SequenceSpec(config.rows, width)
        grid = features[0].grid if len(features) == 1 else None
        return SequenceSpec(sum(spec.tokens for spec in features), width, grid)

    @classmethod
    def tiny(cls) -> Self:
        features = [FeatureSpec(layers=3, grid=(2, 3), width=5), FeatureSpec(layers=2, grid=(3, 5), width=4)]
        with tiny_weights():
            return cls(ProjectAttentionConfig(rows=4, width=8, heads=2), features, llm_width=7)

    def forward(self, features: Sequence[Features]) -> TokenSequence:
        check_features("project_attention", self.features, features)
        pairs = zip(self.projections, features, strict=True)
        v_BSE = torch.cat([F.gelu(projection(item.tokens)) for projection, item in pairs], dim=1)
        matrix_BME = self.matrix.expand(v_BSE.shape[0], -1, -1)
        asked, given = (matrix_BME, v_BSE) if self.config.query == "matrix" else (v_BSE, matrix_BME)
        return TokenSequence(F.gelu(self.attention(asked, given, given)), self.out.grid)
