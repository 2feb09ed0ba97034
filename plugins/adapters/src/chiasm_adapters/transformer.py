"""Self-attention among the tokens of an image before the projection.

Shape letters: B images, N tokens, D width in, E width of the language model.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, PositiveInt
from torch import nn

from chiasm.adapter import Adapter
from chiasm.errors import CombinationError
from chiasm.features import SequenceSpec, TokenSequence
from chiasm.settings import Settings
from chiasm_adapters._geometry import check_sequence, tiny_weights


class TransformerConfig(Settings):
    """Every detail of the layers; the defaults are those of OmniFusion's released code."""

    depth: PositiveInt = 1
    """Encoder layers."""
    heads: PositiveInt = 4
    """Attention heads; they must divide the width in."""
    feed_forward: PositiveInt = 2048
    """Width between the two matrices of the feed-forward part."""
    activation: Literal["relu", "gelu"] = "relu"
    """Between those two matrices."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """In training only: of attention weights, of the feed-forward part's inner values, and of both parts' outputs."""
    norm: Literal["post", "pre"] = "post"
    """Layer normalisation (eps 1e-5) after each residual sum, or before each part with one more after the last layer,
    without which the projection would see an unnormalised sum."""


class Transformer(Adapter):
    """`W TEL(x) + b`: `[B, N, D]` to `[B, N, E]` on the same grid; TEL are transformer encoder layers of width D.

    One of OmniFusion's two adapters for one encoder (arXiv 2404.06212, section 2.1), with the details of its released
    code. There is no position embedding: the encoder's own is what tells places apart. The tokens of an image attend
    to one another, never to another image's. Initialised as torch does; the dtype out is that of the parameters.

    Raises:
        ValueError: the heads do not divide the width, or the sequence is not the one that it was built for.
    """

    Config = TransformerConfig

    def __init__(self, config: TransformerConfig, sequence: SequenceSpec, llm_width: int) -> None:
        super().__init__(config, sequence, llm_width)
        # not nn.TransformerEncoder, which copies one layer: all would start with the same weights
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    sequence.width,
                    config.heads,
                    config.feed_forward,
                    config.dropout,
                    config.activation,
                    batch_first=True,
                    norm_first=config.norm == "pre",
                )
                for _ in range(config.depth)
            )
        )
        self.norm = nn.LayerNorm(sequence.width) if config.norm == "pre" else nn.Identity()
        self.linear = nn.Linear(sequence.width, llm_width)

    @classmethod
    def spec(cls, config: Settings, sequence: SequenceSpec, llm_width: int) -> SequenceSpec:
        assert isinstance(config, TransformerConfig)
        if sequence.width % config.heads:
            raise CombinationError(
                f"transformer: {config.heads} heads do not divide the width {sequence.width} of the sequence; "
                "set `heads` to a divisor of it"
            )
        return SequenceSpec(sequence.tokens, llm_width, sequence.grid)

    @classmethod
    def tiny(cls) -> Self:
        config = TransformerConfig(heads=2, feed_forward=9)
        with tiny_weights():
            return cls(config, SequenceSpec(tokens=6, width=8, grid=(2, 3)), llm_width=7)

    def forward(self, sequence: TokenSequence) -> TokenSequence:
        check_sequence("transformer", self.sequence, sequence)
        return TokenSequence(self.linear(self.norm(self.layers(sequence.tokens))), sequence.grid)
