"""What encoders give and fusions take.

Shape letters: B images, L layers, N patch tokens, D width, (h, w) the grid of the tokens, h * w == N.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

Grid = tuple[int, int]
"""Rows and columns of patch tokens; row-major order in a sequence."""


@dataclass(frozen=True, slots=True)
class FeatureSpec:
    """The geometry of one encoder's features for one view, known without weights."""

    layers: int
    """How many layers are given."""
    grid: Grid
    width: int

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True, slots=True)
class Features:
    """The patch tokens of one encoder: `[B, L, N, D]` and their grid, prefix tokens (CLS, registers) removed.

    Raises:
        ValueError: the tensor has not four axes, or the grid does not hold N tokens.
    """

    tokens: Tensor
    grid: Grid

    def __post_init__(self) -> None:
        if self.tokens.ndim != 4 or self.tokens.shape[2] != self.grid[0] * self.grid[1]:
            raise ValueError(
                f"features of shape {tuple(self.tokens.shape)} do not fit the grid {self.grid}: "
                f"wanted [B, L, {self.grid[0] * self.grid[1]}, D], patch tokens only"
            )

    @property
    def spec(self) -> FeatureSpec:
        return FeatureSpec(self.tokens.shape[1], self.grid, self.tokens.shape[3])


@dataclass(frozen=True, slots=True)
class SequenceSpec:
    """The geometry of one view's token sequence: length, width, and its grid where the tokens still have one."""

    tokens: int
    width: int
    grid: Grid | None = None


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """One token sequence: `[B, N, D]` and its grid, or None where the tokens have no place in the image."""

    tokens: Tensor
    grid: Grid | None = None

    @property
    def spec(self) -> SequenceSpec:
        return SequenceSpec(self.tokens.shape[1], self.tokens.shape[2], self.grid)
