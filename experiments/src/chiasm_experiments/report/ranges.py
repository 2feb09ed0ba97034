"""Factors that are numbers of a range: accuracy over the values that were tried, as numbers and not as levels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import special

from chiasm_experiments.report.effects import Analysis
from chiasm_experiments.report.ranks import MIN_CELLS, Correlation, spearman
from chiasm_experiments.report.statistics import CONFIDENCE
from chiasm_experiments.report.study import Range, Study

PARTS = 3


@dataclass(frozen=True, slots=True)
class Part:
    """Some neighbouring values of a range.

    Args:
        low: the least value.
        high: the greatest.
        cells: how many have one of them.
        accuracy: the mean over these cells, with the ends of its 95% t interval over cells.
        best: the most accurate of them.
    """

    low: float
    high: float
    cells: int
    accuracy: tuple[float, float, float]
    best: float


@dataclass(frozen=True, slots=True)
class RangeResult:
    """What is known of one range on one benchmark.

    Args:
        factor: its path.
        range: from which values were drawn.
        points: of each cell its value, its accuracy and its number of seeds; by value.
        parts: the cells in three parts of equal size, by value.
        trend: Spearman's correlation of value and accuracy over cells; None with too few cells.
    """

    factor: str
    range: Range
    points: tuple[tuple[float, float, int], ...]
    parts: tuple[Part, ...]
    trend: Correlation | None


def range_results(study: Study, analysis: Analysis) -> tuple[RangeResult, ...]:
    """Each range with at least one value that was tried; the control's cells are left out."""
    found = []
    for factor, range_ in study.ranges.items():
        points = sorted(
            (value, cell.accuracy.estimate, len(cell.trials))
            for cell in analysis.cells
            if not cell.is_control and (value := study.number(cell.cell, factor)) is not None
        )
        if points:
            x, y = (np.array([point[k] for point in points]) for k in (0, 1))
            several = x.size >= MIN_CELLS and np.ptp(x) > 0 and np.ptp(y) > 0
            parts = tuple(_part(x[own], y[own]) for own in np.array_split(np.arange(x.size), PARTS) if own.size)
            found.append(RangeResult(factor, range_, tuple(points), parts, spearman(x, y) if several else None))
    return tuple(found)


def _part(x: np.typing.NDArray[np.float64], y: np.typing.NDArray[np.float64]) -> Part:
    mean, half = float(y.mean()), math.inf
    if y.size > 1:
        t = -float(special.stdtrit(y.size - 1, (1 - CONFIDENCE) / 2))
        half = t * float(y.std(ddof=1)) / math.sqrt(y.size)
    ends = (max(mean - half, 0.0), min(mean + half, 1.0))
    return Part(float(x.min()), float(x.max()), int(y.size), (mean, *ends), float(y.max()))
