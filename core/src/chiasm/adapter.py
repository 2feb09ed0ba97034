"""The interface of an adapter: a token sequence to visual tokens of the language model's width.

Shape letters: B images, N tokens in, M tokens out, D width in, E width of the language model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Self

from chiasm.features import SequenceSpec, TokenSequence
from chiasm.part_module import PartModule
from chiasm.settings import Settings


class Adapter(PartModule, ABC):
    """A token sequence to visual tokens, for any image alone: nothing crosses the batch.

    A subclass sets `Config`, states what comes out in `spec`, and takes `(config, sequence, llm_width)`.

    Args:
        config: an instance of `Config`.
        sequence: the geometry of what the fusion gives.
        llm_width: width of the language model.
    """

    Config: ClassVar[type[Settings]] = Settings

    def __init__(self, config: Settings, sequence: SequenceSpec, llm_width: int) -> None:
        super().__init__()
        self.config = config
        self.sequence = sequence
        self.llm_width = llm_width
        self.out = self.spec(config, sequence, llm_width)

    @classmethod
    @abstractmethod
    def spec(cls, config: Settings, sequence: SequenceSpec, llm_width: int) -> SequenceSpec:
        """The visual tokens that come out, of width `llm_width`, without weights.

        Raises:
            ValueError: this sequence does not fit this adapter; the message gives both numbers and a remedy.
        """

    @classmethod
    @abstractmethod
    def tiny(cls) -> Self:
        """A small instance with random weights for tests."""

    @abstractmethod
    def forward(self, sequence: TokenSequence) -> TokenSequence:
        """`[B, N, D]` to `[B, M, E]` as `spec` states it.

        Raises:
            ValueError: the sequence is not of the geometry that this adapter was built for.
        """
