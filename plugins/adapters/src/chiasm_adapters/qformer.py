"""BLIP-2's querying transformer.

Shape letters: B images, N tokens, M queries, D width in, W width of the queries, E width of the language model.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, PositiveInt
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from chiasm.adapter import Adapter
from chiasm.features import SequenceSpec, TokenSequence
from chiasm.settings import Settings
from chiasm_adapters._geometry import check_sequence, tiny_weights
from chiasm_adapters._layers import check_heads


class QFormerConfig(Settings):
    """The size of the transformer; the defaults are BLIP-2's, which are BERT-base's, except for the dropout."""

    tokens: PositiveInt = 32
    """M: learned queries, each a visual token."""
    depth: PositiveInt = 12
    """Blocks: self-attention among the queries, in some cross-attention to the tokens, feed-forward part."""
    cross_every: PositiveInt = 2
    """Cross-attention stands in the first block, and in every so many-th after it."""
    width: PositiveInt = 768
    """W, of the queries."""
    heads: PositiveInt = 12
    """Attention heads; they must divide W."""
    feed_forward: PositiveInt = 3072
    """Width between the two matrices of the feed-forward part."""
    activation: Literal["gelu", "relu"] = "gelu"
    """Between those two matrices; GELU is the exact one, by erf."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """In training only: of the queries, of attention weights, and of every part's output. BLIP-2 trains with 0.1."""


class QFormer(Adapter):
    """`W_o q + b` of M queries after the blocks: `[B, N, D]` to `[B, M, E]`, without a grid.

    BLIP-2's Q-Former (arXiv 2301.12597, section 3.1) as transformers has it, without its text side, and the linear
    layer to the language model (section 3.3). As in BERT, layer normalisation (eps 1e-12) follows each residual sum,
    and the queries are normalised before the first block. Tokens enter with their width D through the keys and values
    of the cross-attention; they get no position embedding, as the encoder's own tells places apart. Queries and
    matrices of the blocks are drawn from N(0, 0.02^2), the last layer as torch does; the dtype out is that of the
    parameters. The names below `model` are those of a BLIP-2 checkpoint's `qformer`, biases of keys included, though
    the softmax does not see them.

    Raises:
        ValueError: the heads do not divide W, or the sequence is not the one that it was built for.
    """

    Config = QFormerConfig

    def __init__(self, config: QFormerConfig, sequence: SequenceSpec, llm_width: int) -> None:
        super().__init__(config, sequence, llm_width)
        self.model = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=config.width,
                num_hidden_layers=config.depth,
                num_attention_heads=config.heads,
                intermediate_size=config.feed_forward,
                hidden_act=config.activation,
                hidden_dropout_prob=config.dropout,
                attention_probs_dropout_prob=config.dropout,
                cross_attention_frequency=config.cross_every,
                encoder_hidden_size=sequence.width,
                use_qformer_text_input=False,
            )
        )
        self.queries = nn.Parameter(0.02 * torch.randn(config.tokens, config.width))
        self.linear = nn.Linear(config.width, llm_width)

    @classmethod
    def spec(cls, config: Settings, sequence: SequenceSpec, llm_width: int) -> SequenceSpec:
        assert isinstance(config, QFormerConfig)
        check_heads("qformer", config.heads, config.width)
        return SequenceSpec(config.tokens, llm_width)

    @classmethod
    def tiny(cls) -> Self:
        config = QFormerConfig(tokens=4, depth=3, width=8, heads=2, feed_forward=9)
        with tiny_weights():
            return cls(config, SequenceSpec(tokens=6, width=5, grid=(2, 3)), llm_width=7)

    def forward(self, sequence: TokenSequence) -> TokenSequence:
        check_sequence("qformer", self.sequence, sequence)
        tokens_BND = sequence.tokens
        images = len(tokens_BND)
        if not images:  # transformers cannot reshape a batch of no image, and every parameter is to have a gradient
            tokens_BND = torch.cat([tokens_BND, tokens_BND.new_zeros(1, *tokens_BND.shape[1:])])
        queries_BMW = self.queries.expand(len(tokens_BND), -1, -1)
        out_BMW = self.model(query_embeds=queries_BMW, encoder_hidden_states=tokens_BND).last_hidden_state
        return TokenSequence(self.linear(out_BMW[:images]))
