"""What the fusions and adapters of this distribution share: checks of geometry, and grids that differ.

Shape letters: B images, L layers, N tokens, M tokens out, D width, C channels (L * D), (h, w) a grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from chiasm.errors import CombinationError
from chiasm.features import Features, FeatureSpec, Grid, SequenceSpec, TokenSequence


def check_some(fusion: str, features: Sequence[FeatureSpec]) -> None:
    """Raises CombinationError where there is no encoder at all."""
    if not features:
        raise CombinationError(f"{fusion} was given the features of no encoder; wanted at least one")


def check_equal_grids(fusion: str, features: Sequence[FeatureSpec], remedy: str) -> None:
    """Raises CombinationError where grids differ; the message gives all grids and the remedy."""
    if not equal_grids(features):
        grids = " and ".join(str(spec.grid) for spec in features)
        raise CombinationError(f"{fusion} wants equal grids, the encoders give {grids}; {remedy}")


def common_grid(
    fusion: str,
    features: Sequence[FeatureSpec],
    align: Literal["error", "interpolate"],
    to: Literal["largest", "first"],
) -> Grid:
    """The grid that all features are brought to.

    Raises:
        CombinationError: there is no encoder, or grids differ under `align: error`.
    """
    check_some(fusion, features)
    if align == "error":
        check_equal_grids(
            fusion, features, "set `align: interpolate`, or choose image sizes and encoders whose grids are equal"
        )
    return largest_grid(features) if to == "largest" else features[0].grid


def check_features(fusion: str, wanted: Sequence[FeatureSpec], features: Sequence[Features]) -> None:
    """Raises ValueError where features are not those that the fusion was built for, or images differ in number."""
    given = tuple(item.spec for item in features)
    if given != tuple(wanted):
        raise ValueError(f"{fusion} was built for {tuple(wanted)}, the features are {given}")
    images = [item.tokens.shape[0] for item in features]
    if len(set(images)) > 1:
        raise ValueError(f"{fusion} wants the same images from each encoder, their numbers are {images}")


def check_sequence(adapter: str, wanted: SequenceSpec, sequence: TokenSequence) -> None:
    """Raises ValueError where a sequence is not the one that the adapter was built for."""
    if sequence.tokens.ndim != 3:
        raise ValueError(f"{adapter} wants tokens [B, N, D], their shape is {tuple(sequence.tokens.shape)}")
    if sequence.spec != wanted:
        raise ValueError(f"{adapter} was built for {wanted}, the sequence is {sequence.spec}")


def equal_grids(features: Sequence[FeatureSpec]) -> bool:
    """Whether all encoders give the same rows and columns."""
    return len({spec.grid for spec in features}) == 1


def largest_grid(features: Sequence[FeatureSpec]) -> Grid:
    """The grid of most tokens; the first of them where several have as many."""
    return max((spec.grid for spec in features), key=lambda grid: grid[0] * grid[1])


def layers_to_channels(tokens_BLND: Tensor) -> Tensor:
    """`[B, L, N, D]` to `[B, N, L * D]`: all channels of the first layer, then those of the next."""
    return tokens_BLND.transpose(1, 2).flatten(2)


def resample(tokens_BNC: Tensor, grid: Grid, to: Grid) -> Tensor:
    """`[B, N, C]` on one grid to `[B, M, C]` on another, bilinear between the centres of cells, no anti-aliasing."""
    if grid == to:
        return tokens_BNC
    map_BChw = torch.unflatten(tokens_BNC.transpose(1, 2), 2, grid)
    map_BChw = F.interpolate(map_BChw, size=to, mode="bilinear", align_corners=False, antialias=False)
    return map_BChw.flatten(2).transpose(1, 2)


@contextmanager
def tiny_weights() -> Iterator[None]:
    """Draws what is inside always alike, and leaves every global generator as it was.

    `torch.manual_seed` would reseed accelerators too, which `fork_rng(devices=[])` does not restore.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield
