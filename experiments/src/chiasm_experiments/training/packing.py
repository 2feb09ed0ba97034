"""Whether the samples of a forward pass become one row without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from chiasm.batch import ROW_MULTIPLE, Padding
from chiasm.errors import ConfigError
from chiasm.llm import LanguageModel
from chiasm_experiments.training.execution import Choice

WASTE = 0.1
"""Share of padding from which packing pays by itself: kernels for rows of one length are faster than those for
documents, by less than this."""


@dataclass(frozen=True, slots=True)
class Packing:
    """When to pack.

    Args:
        above: the share of padding from which samples are packed; above 1: never.
    """

    above: float = 2.0

    @classmethod
    def choose(cls, choice: Choice, llm: LanguageModel, device: torch.device) -> Self:
        """What a run's setting comes to.

        Raises:
            ConfigError: packing is asked for and the language model does not offer it.
        """
        if choice == "on" and not llm.packs:
            raise ConfigError(
                f"pack=on, and {type(llm).__name__} cannot keep the documents of a row apart; set pack=auto, or choose "
                "a language model of transformers that runs on scaled dot-product attention"
            )
        if choice == "on":
            return cls(0.0)
        return cls(WASTE) if choice == "auto" and llm.packs and device.type == "cuda" else cls()

    def pad(self, lengths: Sequence[int]) -> Padding:
        """How sequences of these lengths become one batch to train on."""
        padded = -(-max(lengths) // ROW_MULTIPLE) * ROW_MULTIPLE * len(lengths)  # as rows for a GPU are
        return "packed" if padded - sum(lengths) >= self.above * padded else "right"


PADDED = Packing()
