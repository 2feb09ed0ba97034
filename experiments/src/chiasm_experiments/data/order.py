"""Which samples each optimiser step takes: a pure function of the seed, so that any step can be made again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True, slots=True)
class Order:
    """The samples of a stage, step by step. Epochs follow each other without a gap, so every batch is full.

    Args:
        size: samples in the data set.
        batch_size: samples of one optimiser step over all workers.
        seed: of the run.
        stage: index of the stage; stages draw different orders.
    """

    size: int
    batch_size: int
    seed: int
    stage: int

    def steps(self, epochs: float) -> int:
        """Optimiser steps in a number of epochs, at least one."""
        return max(1, round(self.size * epochs / self.batch_size))

    def step(self, index: int) -> list[int]:
        """The samples of a step, for all workers together."""
        first = index * self.batch_size
        places = (divmod(place, self.size) for place in range(first, first + self.batch_size))
        return [int(_permutation(self.size, self.seed, self.stage, epoch)[offset]) for epoch, offset in places]


@lru_cache(maxsize=8)
def _permutation(size: int, seed: int, stage: int, epoch: int) -> Sequence[int]:
    order: Sequence[int] = np.random.default_rng([seed, stage, epoch]).permutation(size).tolist()
    return order
