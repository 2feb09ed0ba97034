"""Nothing, for a fusion that already ends in the language model's width.

Shape letters: B images, N tokens, E width of the language model.
"""

from __future__ import annotations

from typing import Self

from chiasm.adapter import Adapter
from chiasm.errors import CombinationError
from chiasm.features import SequenceSpec, TokenSequence
from chiasm.settings import Settings
from chiasm_adapters._geometry import check_sequence, tiny_weights


class IdentityConfig(Settings):
    """No options."""


class Identity(Adapter):
    """The sequence as it is: `[B, N, E]` to the same tensor, on the same grid, in its dtype. Holds no parameter.

    Behind a fusion that projects to the width of the language model by itself, such as `project_sum`.

    Raises:
        ValueError: the sequence has another width than the language model, or is not the one that it was built for.
    """

    Config = IdentityConfig

    @classmethod
    def spec(cls, config: Settings, sequence: SequenceSpec, llm_width: int) -> SequenceSpec:
        if sequence.width != llm_width:
            raise CombinationError(
                f"identity: the sequence of the fusion has the width {sequence.width}, the language model {llm_width}; "
                "choose the adapter `linear`, or a fusion that projects to the language model's width, such as "
                "`project_sum` with `width: null`"
            )
        return sequence

    @classmethod
    def tiny(cls) -> Self:
        with tiny_weights():
            return cls(IdentityConfig(), SequenceSpec(tokens=6, width=7, grid=(2, 3)), llm_width=7)

    def forward(self, sequence: TokenSequence) -> TokenSequence:
        check_sequence("identity", self.sequence, sequence)
        return sequence
