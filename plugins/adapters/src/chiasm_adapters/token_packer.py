"""TokenPacker: each token of a coarser map gathers from its own region of the fine one.

Shape letters: B images, N tokens, M regions, S tokens of a region (s * s), D width in, Q width of the query's channels,
W width of the attention, E width of the language model.
"""

from __future__ import annotations

from typing import Self

from pydantic import PositiveInt
from torch import nn

from chiasm.adapter import Adapter
from chiasm.errors import CombinationError
from chiasm.features import SequenceSpec, TokenSequence
from chiasm.settings import Settings
from chiasm_adapters._blocks import block_grid, check_divisible, need_grid, to_blocks
from chiasm_adapters._geometry import check_sequence, resample, tiny_weights
from chiasm_adapters._layers import Attention, check_heads, perceptron


class TokenPackerConfig(Settings):
    """The size of the regions and of the attention; the defaults are those of the released code."""

    factor: PositiveInt = 2
    """s: each region of s x s tokens becomes one; the paper tries 2, 3 and 4."""
    width: PositiveInt = 1024
    """W, of the attention."""
    heads: PositiveInt = 8
    """Attention heads; they must divide W."""
    query_width: PositiveInt | None = None
    """Q: the coarse map is made of the last Q channels, null for all. Where a fusion puts several layers side by side
    on channels, the width of one layer takes the deepest, as the paper does (CLIP's layers 12, 16, 22 and 23 for keys
    and values, 23 for the query)."""


class TokenPacker(Adapter):
    """`MLP(A(LN W_q down(x), LN F_k(x), LN F_v(x)))`: `[B, N, D]` to `[B, M, E]`, on the grid of regions.

    TokenPacker (arXiv 2407.02392, section 3) with the details of its released code: `down` resamples bilinearly
    between the centres of cells without anti-aliasing; a query attends to the s x s tokens of its own region and to
    nothing else; F_k and F_v are two linear layers with GELU (the exact one) between, and so is the MLP; layer
    normalisations have eps 1e-6; there is no residual around the attention. Keys and their norm have no bias, since no
    softmax sees one; else the parameters are those of the release. Multi-level features are whatever the
    fusion puts on channels. Weights of linear layers are drawn from N(0, 0.02^2), biases start at zero; the dtype out
    is that of the parameters.

    Raises:
        ValueError: the tokens have no grid, regions do not fill it, the heads do not divide W, Q is more than D, or the
            sequence is not the one that it was built for.
    """

    Config = TokenPackerConfig

    def __init__(self, config: TokenPackerConfig, sequence: SequenceSpec, llm_width: int) -> None:
        super().__init__(config, sequence, llm_width)
        self.factor, self.grid = config.factor, need_grid("token_packer", sequence)
        self.query_width = config.query_width or sequence.width
        width = config.width
        self.query = nn.Linear(self.query_width, width, bias=False)
        self.key = perceptron([sequence.width, width, width])
        self.value = perceptron([sequence.width, width, width])
        self.norm_query, self.norm_value = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.norm_key = nn.LayerNorm(width, eps=1e-6, bias=False)
        self.attention = Attention(width, config.heads, bias=True)
        self.layers = perceptron([width, llm_width, llm_width])
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @classmethod
    def spec(cls, config: Settings, sequence: SequenceSpec, llm_width: int) -> SequenceSpec:
        assert isinstance(config, TokenPackerConfig)
        grid = need_grid("token_packer", sequence)
        check_divisible("token_packer", grid, config.factor, "choose `pixel_shuffle` with `indivisible: pad`")
        check_heads("token_packer", config.heads, config.width)
        if config.query_width is not None and config.query_width > sequence.width:
            raise CombinationError(
                f"token_packer: `query_width` asks for the last {config.query_width} channels, the sequence of the "
                f"fusion has {sequence.width}; set it to the width of one layer, or to null for all"
            )
        rows, columns = block_grid(grid, config.factor)
        return SequenceSpec(rows * columns, llm_width, (rows, columns))

    @classmethod
    def tiny(cls) -> Self:
        config = TokenPackerConfig(width=8, heads=2, query_width=4)
        with tiny_weights():
            return cls(config, SequenceSpec(tokens=24, width=12, grid=(4, 6)), llm_width=7)

    def forward(self, sequence: TokenSequence) -> TokenSequence:
        check_sequence("token_packer", self.sequence, sequence)
        assert self.out.grid is not None
        x_BND = sequence.tokens
        coarse_BMQ = resample(x_BND[..., -self.query_width :], self.grid, self.out.grid)
        query_BMW = self.norm_query(self.query(coarse_BMQ))
        key_BMSW = to_blocks(self.norm_key(self.key(x_BND)), self.grid, self.factor)
        value_BMSW = to_blocks(self.norm_value(self.value(x_BND)), self.grid, self.factor)
        packed_BMW = self.attention.one_each(query_BMW, key_BMSW, value_BMSW)
        return TokenSequence(self.layers(packed_BMW), self.out.grid)
