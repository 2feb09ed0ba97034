"""One matrix.

Shape letters: B images, N tokens, D width in, E width of the language model.
"""

from __future__ import annotations

from typing import Self

from torch import nn

from chiasm.adapter import Adapter
from chiasm.features import SequenceSpec, TokenSequence
from chiasm.settings import Settings
from chiasm_adapters._geometry import check_sequence, tiny_weights


class LinearConfig(Settings):
    """The details of the layer."""

    bias: bool = True
    """Adds a bias."""


class Linear(Adapter):
    """`W x + b` for each token: `[B, N, D]` to `[B, N, E]`, on the same grid, in the dtype of the parameters.

    LLaVA's first projector (arXiv 2304.08485, section 4.1), and OmniFusion's shared output layer behind the fusion
    `project_sum` (arXiv 2404.06212, section 3.1). Initialised as `nn.Linear`.

    Raises:
        ValueError: in forward, the sequence is not the one that it was built for.
    """

    Config = LinearConfig

    def __init__(self, config: LinearConfig, sequence: SequenceSpec, llm_width: int) -> None:
        super().__init__(config, sequence, llm_width)
        self.linear = nn.Linear(sequence.width, llm_width, bias=config.bias)

    @classmethod
    def spec(cls, config: Settings, sequence: SequenceSpec, llm_width: int) -> SequenceSpec:
        return SequenceSpec(sequence.tokens, llm_width, sequence.grid)

    @classmethod
    def tiny(cls) -> Self:
        with tiny_weights():
            return cls(LinearConfig(), SequenceSpec(tokens=6, width=5, grid=(2, 3)), llm_width=7)

    def forward(self, sequence: TokenSequence) -> TokenSequence:
        check_sequence("linear", self.sequence, sequence)
        return TokenSequence(self.linear(sequence.tokens), sequence.grid)
