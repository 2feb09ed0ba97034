"""Real handwritten digits: the 8 x 8 images that ship with scikit-learn, divided between the splits."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from chiasm_experiments.world.scene import Split, split_of


@cache
def _load() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images * (255 / 16)).round().astype(np.uint8), data.target


@cache
def sources(split: Split) -> tuple[tuple[int, ...], ...]:
    """For each digit from 0 to 9, the indices of the handwritten ones that belong to the split.

    An image's own pixels decide, so equal images are never divided.
    """
    images, values = _load()
    owned = np.array([split_of(image.tobytes()) == split for image in images])
    return tuple(tuple(np.flatnonzero(owned & (values == digit)).tolist()) for digit in range(10))


def ink(source: int) -> NDArray[np.uint8]:
    """How much ink each pixel holds: [10, 10] with a margin of paper, from 0 for paper to 255."""
    return np.pad(_load()[0][source], 1)
