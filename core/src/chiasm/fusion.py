"""The interface of a fusion: the features of one or more encoders to one token sequence.

Shape letters: B images, L layers, N tokens, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self

from chiasm.features import Features, FeatureSpec, SequenceSpec, TokenSequence
from chiasm.part_module import PartModule
from chiasm.settings import Settings


class Fusion(PartModule, ABC):
    """Features of one or more encoders to one sequence, for any image alone: nothing crosses the batch.

    A subclass sets `Config`, states what comes out in `spec`, and takes `(config, features, llm_width)`.

    Args:
        config: an instance of `Config`.
        features: the geometry of each encoder's features, in the order of the run's encoders.
        llm_width: width of the language model, for fusions that project to it by default.
    """

    Config: ClassVar[type[Settings]] = Settings

    def __init__(self, config: Settings, features: Sequence[FeatureSpec], llm_width: int) -> None:
        super().__init__()
        self.config = config
        self.features = tuple(features)
        self.llm_width = llm_width
        self.out = self.spec(config, self.features, llm_width)

    @classmethod
    @abstractmethod
    def spec(cls, config: Settings, features: Sequence[FeatureSpec], llm_width: int) -> SequenceSpec:
        """The sequence that comes out, without weights.

        Raises:
            ValueError: these features do not fit this fusion; the message gives both numbers and a remedy.
        """

    @classmethod
    @abstractmethod
    def tiny(cls) -> Self:
        """A small instance with random weights for tests."""

    @abstractmethod
    def forward(self, features: Sequence[Features]) -> TokenSequence:
        """One `[B, L_k, N_k, D_k]` for each encoder k to one `[B, N, D]` as `spec` states it.

        Raises:
            ValueError: the features are not of the geometry that this fusion was built for.
        """
