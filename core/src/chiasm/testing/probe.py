"""How the shared checks handle a component of any kind: each is a module that maps a batch to one tensor.

Shape letters: B items of a batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from chiasm.testing.common import calling, require

Inputs = tuple[Tensor, ...]

TOLERANCE = 1e-5
"""Of float32 results that must be equal, as a share of the largest value: sums may run in another order."""


class Probe(ABC):
    """What the shared checks ask of one kind."""

    item: ClassVar[str]
    """What a batch holds, for messages."""
    always_alone: ClassVar[bool] = True
    """Whether items are kept apart in training mode too."""
    keeps_dtype: ClassVar[bool] = True
    """Whether a module that was moved to bfloat16 must give bfloat16."""

    @abstractmethod
    def rebuild(self, module: Any, seed: int) -> nn.Module:
        """Another module of the same configuration and geometry, its random weights drawn from a seed."""

    @abstractmethod
    def inputs(self, module: Any, batch: int) -> Inputs:
        """Random inputs, each `[B, ...]`."""

    @abstractmethod
    def extremes(self, module: Any) -> Mapping[str, Inputs]:
        """Inputs that are rare but right, each of a batch of two, by what they are."""

    @abstractmethod
    def run(self, module: Any, inputs: Inputs) -> Tensor:
        """One forward pass to `[B, ...]`."""

    def __call__(self, module: nn.Module, inputs: Inputs, when: str = "") -> Tensor:
        """One forward pass, whose exceptions are told as broken promises."""
        with calling(f"forward{when}"):
            return self.run(module, inputs)


def check_close(found: Tensor, wanted: Tensor, message: str, tolerance: float = TOLERANCE) -> None:
    """Raises ContractError where two tensors differ by more than rounding; the message gets the difference."""
    require(found.shape == wanted.shape, f"{message} (shapes {tuple(found.shape)} and {tuple(wanted.shape)})")
    if not found.numel():
        return
    scale = max(1.0, float(wanted.detach().abs().max()))
    difference = float((found.detach().float() - wanted.detach().float()).abs().max())
    # written so that NaN fails
    require(difference <= tolerance * scale, f"{message} (by {difference:.2g}, allowed {tolerance * scale:.2g})")
