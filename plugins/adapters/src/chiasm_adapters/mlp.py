"""The multi-layer perceptron of most vision-language models.

Shape letters: B images, N tokens, D width in, E width of the language model.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, PositiveInt

from chiasm.adapter import Adapter
from chiasm.features import SequenceSpec, TokenSequence
from chiasm.settings import Settings
from chiasm_adapters._geometry import check_sequence, tiny_weights
from chiasm_adapters._layers import mlp_widths, perceptron


class MlpConfig(Settings):
    """The size of the perceptron."""

    depth: int = Field(default=2, ge=1, le=8)
    """Linear layers, with GELU (the exact one, by erf) between them; 1 is the adapter `linear`."""
    hidden: PositiveInt | None = None
    """Width between the layers; null for the width of the language model, as in LLaVA."""
    bias: bool = True
    """Gives every layer a bias."""


class Mlp(Adapter):
    """`W_2 GELU(W_1 x)`, or deeper, for each token: `[B, N, D]` to `[B, N, E]`, on the same grid.

    LLaVA-1.5's `mlp2x_gelu` (arXiv 2310.03744) at depth 2, and one of OmniFusion's two adapters for one encoder (arXiv
    2404.06212, section 2.1). The linear layers are `layers.0`, `layers.2` and so on: Hugging Face's `linear_1`
    and `linear_2` of a LLaVA projector go into the first two. Initialised as `nn.Linear`; the dtype out is that of the
    parameters.

    Raises:
        ValueError: in forward, the sequence is not the one that it was built for.
    """

    Config = MlpConfig

    def __init__(self, config: MlpConfig, sequence: SequenceSpec, llm_width: int) -> None:
        super().__init__(config, sequence, llm_width)
        self.layers = perceptron(mlp_widths(sequence.width, config.depth, config.hidden, llm_width), config.bias)

    @classmethod
    def spec(cls, config: Settings, sequence: SequenceSpec, llm_width: int) -> SequenceSpec:
        return SequenceSpec(sequence.tokens, llm_width, sequence.grid)

    @classmethod
    def tiny(cls) -> Self:
        with tiny_weights():
            return cls(MlpConfig(hidden=9), SequenceSpec(tokens=6, width=5, grid=(2, 3)), llm_width=7)

    def forward(self, sequence: TokenSequence) -> TokenSequence:
        check_sequence("mlp", self.sequence, sequence)
        return TokenSequence(self.layers(sequence.tokens), sequence.grid)
