"""Whether two fidelities rank cells alike: rank correlations of the cells' accuracies, each with an interval.

The interval inverts the test of each correlation under a normal copula: it holds the correlations for which the
observed coefficient is in neither tail of what so many cells would give. A rank coefficient depends on the copula
alone, so no distribution of accuracies is assumed; and unlike Fisher's z or a bootstrap of the cells the interval
neither needs many of them nor collapses where all are in the same order.

With fewer than five cells not even equal orders are evidence: four cells are so by chance once in 24 times, more than
the 2.5% that an interval leaves on a side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from scipy import stats

from chiasm_experiments.report.cells import CellResult, cell_key
from chiasm_experiments.report.effects import Analysis
from chiasm_experiments.report.statistics import CONFIDENCE, Floats

MIN_CELLS = 5
_STEPS = 14
"""Of bisection: to 2 / 2^14 in the correlation of the copula."""


@dataclass(frozen=True, slots=True)
class Correlation:
    """A rank correlation with its 95% interval over cells; a coefficient that cannot be formed is None."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class RankAgreement:
    """How alike two fidelities rank the cells that both have on one benchmark.

    Args:
        benchmark: its name.
        cheap: the one fidelity.
        dear: the other.
        cells: that both have, the control's left out.
        seeds: the fewest and the most of any of these cells at either fidelity.
        same_best: whether the most accurate cell is the same.
        spearman: None with too few cells, or where all are equally accurate.
        kendall: tau-b; None likewise.
    """

    benchmark: str
    cheap: str
    dear: str
    cells: int
    seeds: tuple[int, int]
    same_best: bool
    spearman: Correlation | None
    kendall: Correlation | None


def rank_agreement(cheap: Analysis, dear: Analysis) -> RankAgreement | None:
    """The agreement of two fidelities' analyses of one benchmark; None where no two cells are common."""
    sides = [{cell_key(cell.cell): cell for cell in item.cells if not cell.is_control} for item in (cheap, dear)]
    common = [key for key in sides[1] if key in sides[0]]
    if len(common) < 2:
        return None
    x, y = (np.array([_mean(side[key]) for key in common]) for side in sides)
    seeds = [len(side[key].trials) for side in sides for key in common]
    enough = len(common) >= MIN_CELLS and np.ptp(x) > 0 and np.ptp(y) > 0
    return RankAgreement(
        benchmark=dear.scores.name,
        cheap=str(cheap.fidelity),
        dear=str(dear.fidelity),
        cells=len(common),
        seeds=(min(seeds), max(seeds)),
        same_best=bool(x.argmax() == y.argmax()),
        spearman=spearman(x, y) if enough else None,
        kendall=kendall(x, y) if enough else None,
    )


def spearman(x: Floats, y: Floats, seed: int = 0) -> Correlation:
    """Spearman's coefficient of `[n]` and `[n]`; the interval's draws are seeded."""
    estimate = float(stats.spearmanr(x, y).statistic)
    return _inverted(estimate, x.size, _spearman, lambda r: 6 / math.pi * math.asin(r / 2), seed)


def kendall(x: Floats, y: Floats, seed: int = 0) -> Correlation:
    """Kendall's tau-b of `[n]` and `[n]`; the interval's draws are seeded."""
    estimate = float(stats.kendalltau(x, y).statistic)
    return _inverted(estimate, x.size, _kendall, lambda r: 2 / math.pi * math.asin(r), seed)


def _mean(cell: CellResult) -> float:
    return fmean(cell.seed_accuracies)


def _inverted(
    estimate: float, n: int, coefficient: Callable[[Floats, Floats], Floats], expected: Callable[[float], float],
    seed: int,
) -> Correlation:  # fmt: skip
    """The interval of a coefficient by inverting its test.

    Args:
        estimate: what was observed.
        n: cells.
        coefficient: of `[R, n]` and `[R, n]`, without ties.
        expected: the coefficient of a normal copula with a given correlation.
        seed: of the draws, which are the same for every correlation.
    """
    draws = int(np.clip(4e6 / n**2, 400, 4000))
    x, noise = np.random.default_rng(seed).standard_normal((2, draws, n))
    tail = (1 - CONFIDENCE) / 2

    def share(r: float, sign: float) -> float:
        """Of draws with a correlation of `r` those that are at least as extreme as the observed one."""
        found = coefficient(x, r * x + math.sqrt(1 - r * r) * noise)
        return float((sign * found >= sign * estimate - 1e-9).mean())

    def end(sign: float) -> float:
        """The correlation from which on in the direction of `-sign` the observed coefficient is too extreme."""
        inside, outside = sign, -sign
        if share(outside, sign) > tail:
            return outside
        for _ in range(_STEPS):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if share(middle, sign) > tail else (inside, middle)
        return outside

    return Correlation(estimate, min(expected(end(1.0)), estimate), max(expected(end(-1.0)), estimate))


def _spearman(x: Floats, y: Floats) -> Floats:
    n = x.shape[1]
    difference = x.argsort(axis=1).argsort(axis=1) - y.argsort(axis=1).argsort(axis=1)
    return np.asarray(1 - 6 * np.square(difference).sum(axis=1) / (n * (n * n - 1)))


def _kendall(x: Floats, y: Floats) -> Floats:
    i, j = np.triu_indices(x.shape[1], 1)
    return np.asarray((np.sign(x[:, i] - x[:, j]) * np.sign(y[:, i] - y[:, j])).mean(axis=1))
