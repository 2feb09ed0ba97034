"""The data sets of a stage joined into one."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence

from chiasm.config import ComponentRef, resolve
from chiasm.errors import DataError
from chiasm.sample import Sample
from chiasm_experiments.interfaces import Dataset


class Mixture:
    """Data sets one behind the other, as one sequence of samples."""

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self.datasets = tuple(datasets)
        self.ends = list(itertools.accumulate(len(dataset) for dataset in self.datasets))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Sample:
        k = bisect_right(self.ends, index)
        return self.datasets[k][index - (self.ends[k - 1] if k else 0)]


def load_mixture(refs: Sequence[ComponentRef]) -> Mixture:
    """The data sets that a stage names.

    Raises:
        DataError: one is missing, empty or broken.
    """
    datasets = []
    for ref in refs:
        cls, config = resolve("dataset", ref)
        dataset: Dataset = cls(config)
        if not len(dataset):
            raise DataError(f"data set {ref.name!r} is empty: {ref.options}")
        datasets.append(dataset)
    return Mixture(datasets)
