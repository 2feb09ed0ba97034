"""Space to depth: neighbouring tokens become the channels of one.

Shape letters: B images, N tokens, M blocks, S tokens of a block (s * s), D width in, E width of the language model.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, PositiveInt
from torch import nn

from chiasm.adapter import Adapter
from chiasm.features import SequenceSpec, TokenSequence
from chiasm.settings import Settings
from chiasm_adapters._blocks import block_grid, check_divisible, need_grid, to_blocks
from chiasm_adapters._geometry import check_sequence, tiny_weights
from chiasm_adapters._layers import mlp_widths, perceptron


class PixelShuffleConfig(Settings):
    """The size of the blocks and of the perceptron; the defaults are InternVL's."""

    factor: PositiveInt = 2
    """s: each block of s x s tokens becomes one."""
    indivisible: Literal["error", "pad"] = "error"
    """A grid that does not fall into whole blocks: `error` refuses it; `pad` adds zero tokens below and to the
    right."""
    norm: bool = True
    """Layer normalisation (eps 1e-5) over all s * s * D channels before the perceptron."""
    depth: int = Field(default=2, ge=1, le=8)
    """Linear layers, with GELU (the exact one, by erf) between them."""
    hidden: PositiveInt | None = None
    """Width between the layers; null for the width of the language model."""


class PixelShuffle(Adapter):
    """`MLP(LN([x_1 ; .. ; x_S]))` of each block of s x s tokens: `[B, N, D]` to `[B, M, E]`, on the grid of blocks.

    InternVL 1.5's connector (arXiv 2404.16821, section 3.1), which takes 32 x 32 tokens to 256. Channels run by the
    row in the block, in it by the column, in it by the token's own D channels: the order of InternVL's released code,
    so that the weights of `mlp1` fit. Initialised as torch does; the dtype out is that of the parameters.

    Raises:
        ValueError: the tokens have no grid, blocks do not fill it under `indivisible: error`, or the sequence is not
            the one that it was built for.
    """

    Config = PixelShuffleConfig

    def __init__(self, config: PixelShuffleConfig, sequence: SequenceSpec, llm_width: int) -> None:
        super().__init__(config, sequence, llm_width)
        self.factor, self.grid = config.factor, need_grid("pixel_shuffle", sequence)
        width = config.factor**2 * sequence.width
        self.norm = nn.LayerNorm(width) if config.norm else nn.Identity()
        self.layers = perceptron(mlp_widths(width, config.depth, config.hidden, llm_width))

    @classmethod
    def spec(cls, config: Settings, sequence: SequenceSpec, llm_width: int) -> SequenceSpec:
        assert isinstance(config, PixelShuffleConfig)
        grid = need_grid("pixel_shuffle", sequence)
        if config.indivisible == "error":
            check_divisible("pixel_shuffle", grid, config.factor, "set `indivisible: pad` to add zero tokens")
        rows, columns = block_grid(grid, config.factor)
        return SequenceSpec(rows * columns, llm_width, (rows, columns))

    @classmethod
    def tiny(cls) -> Self:
        with tiny_weights():
            return cls(
                PixelShuffleConfig(indivisible="pad"), SequenceSpec(tokens=15, width=5, grid=(3, 5)), llm_width=7
            )

    def forward(self, sequence: TokenSequence) -> TokenSequence:
        check_sequence("pixel_shuffle", self.sequence, sequence)
        stacked_BMC = to_blocks(sequence.tokens, self.grid, self.factor).flatten(2)
        return TokenSequence(self.layers(self.norm(stacked_BMC)), self.out.grid)
