"""Which runs and questions a mean or a difference is taken over: matched cells, equal seeds, identical questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import DataError
from chiasm_experiments.report.statistics import Floats, Interval, accuracy_interval, mean_interval

RunKey = tuple[str, int]


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """Scores of some runs on one benchmark.

    Args:
        keys: for each of R runs its cell (of the factors that are not compared) and its seed; unique.
        questions: `[n]` identities of the questions, unique.
        clusters: `[n]` the image of each question.
        scores: `[R, n]` in [0, 1], NaN where a question was not scored.
        name: what errors call these runs.
    """

    keys: tuple[RunKey, ...]
    questions: NDArray[Any]
    clusters: NDArray[Any]
    scores: Floats
    name: str = "runs"

    def __post_init__(self) -> None:
        assert self.scores.shape == (len(self.keys), len(self.questions)), "scores are [runs, questions]"
        assert len(set(self.keys)) == len(self.keys), f"{self.name}: a cell and seed occurs twice"


def cell_interval(runs: Runs, *, chance: Floats | None = None) -> Interval:
    """The accuracy of some runs with its 95% interval over images and seeds.

    Args:
        runs: of one cell, or of several, which are then averaged with equal weights.
        chance: `[n]`; where it is given, the mean of score - chance is taken instead, so that 0 is chance level.

    Raises:
        DataError: no question was scored in every run.
    """
    design = seed_design(runs.keys)
    scores = runs.scores[list(design.rows)]
    keep = _scored(scores)
    _require_scores(keep, runs.name)
    values, clusters = design.weights @ scores[:, keep], runs.clusters[keep]
    if chance is None:
        interval = accuracy_interval(values, clusters, seed_factor=design.factor)
    else:
        guess = chance[keep]
        bounds = -float(guess.max()), 1 - float(guess.min())
        interval = mean_interval(values - guess, clusters, bounds=bounds, seed_factor=design.factor)
    return _counted(interval, design, keep)


def paired_difference(a: Runs, b: Runs) -> Interval:
    """Accuracy of `a` minus accuracy of `b`: the same cells of all other factors, seeds and questions on both sides.

    The unit is the difference on one question (Miller, arXiv 2411.00640, paired analysis). A question that is not
    scored in some compared run is left out on both sides and counted in `excluded`.

    Raises:
        DataError: the question sets differ, no cell and seed occurs on both sides, or no question was scored in
            every run.
    """
    return contrast(((1.0, a), (-1.0, b)))


def contrast(terms: Sequence[tuple[float, Runs]]) -> Interval:
    """A sum of accuracies, each times its coefficient, paired as `paired_difference` pairs two.

    Args:
        terms: coefficients and runs; the cells and seeds that all of them have are used.

    Raises:
        DataError: as `paired_difference` says.
    """
    (_, first), *others = terms
    name = " and ".join(dict.fromkeys(runs.name for _, runs in terms))
    for _, runs in others:
        _require_equal_questions(first, runs)
    rows = [{key: i for i, key in enumerate(runs.keys)} for _, runs in terms]
    shared = [key for key in first.keys if all(key in row for row in rows)]
    if not shared:
        raise DataError(f"{name} have no cell and seed in common, so nothing can be compared")
    design = seed_design(shared)
    used = [shared[i] for i in design.rows]
    parts = [
        coefficient * runs.scores[[row[key] for key in used]]
        for (coefficient, runs), row in zip(terms, rows, strict=True)
    ]
    total = np.sum(parts, axis=0)
    keep = _scored(total)
    _require_scores(keep, name)
    bounds = _bounds([coefficient for coefficient, _ in terms])
    values = design.weights @ total[:, keep]
    interval = mean_interval(values, first.clusters[keep], bounds=bounds, seed_factor=design.factor)
    return _counted(interval, design, keep)


def _bounds(coefficients: Sequence[float]) -> tuple[float, float]:
    """Between which a sum of scores in [0, 1] lies."""
    return sum(min(value, 0.0) for value in coefficients), sum(max(value, 0.0) for value in coefficients)


@dataclass(frozen=True, slots=True, eq=False)
class SeedDesign:
    """How runs of several cells are averaged into one row for each seed.

    Args:
        rows: which runs are used.
        weights: `[S, R]`; a row sums to 1.
        factor: by which s^2 / S of the rows has to be multiplied, at least 1.
        cells: C.
        missing: cells and seeds without a run, of C x S.
        left_out: runs that are not used.
    """

    rows: tuple[int, ...]
    weights: Floats
    factor: float
    cells: int
    missing: int
    left_out: int


def seed_design(keys: Sequence[RunKey]) -> SeedDesign:
    """Averages over cells within each seed; where a trial is missing, the additive model cell + seed stands in.

    Were the cells that a seed has merely averaged, a seed that lacks a hard cell would look better for that reason
    and the seeds would seem to differ. So each seed's mean is taken from the least-squares fit of cell + seed
    effects (Yates 1933, "The analysis of replicated experiments when the field results are incomplete"), which is
    linear in the scores and, with nothing missing, the plain mean. The rows then share some runs; `factor` restores
    the expectation of their variance for runs of equal, independent noise.

    Cells and seeds that no chain of runs connects cannot be fitted together: the largest connected part is used.
    """
    rows = _connected(keys)
    cells = sorted({keys[i][0] for i in rows})
    seeds = sorted({keys[i][1] for i in rows})
    indicators = np.zeros((len(rows), len(cells) + len(seeds)))
    for r, i in enumerate(rows):
        indicators[r, cells.index(keys[i][0])] = indicators[r, len(cells) + seeds.index(keys[i][1])] = 1.0
    missing = len(cells) * len(seeds) - len(rows)
    if missing:
        wanted = np.hstack([np.full((len(seeds), len(cells)), 1 / len(cells)), np.eye(len(seeds))])
        weights = wanted @ np.linalg.pinv(indicators)
    else:  # exact, so that equal scores have a variance of exactly 0
        weights = indicators[:, len(cells) :].T / len(cells)
    shared = weights @ weights.T
    factor = 1.0
    if missing and len(seeds) > 1:
        spread = (np.trace(shared) - shared.mean() * len(seeds)) / (len(seeds) - 1) / len(seeds)
        factor = max(1.0, float(shared.mean() / spread))
    return SeedDesign(rows, weights, factor, len(cells), missing, len(keys) - len(rows))


def _connected(keys: Sequence[RunKey]) -> tuple[int, ...]:
    """The indices of the largest set of runs that is linked by common cells and seeds; the first of equal ones."""
    rest = list(range(len(keys)))
    best: list[int] = []
    while rest:
        part, cells, seeds = [rest[0]], {keys[rest[0]][0]}, {keys[rest[0]][1]}
        while more := [i for i in rest if i not in part and (keys[i][0] in cells or keys[i][1] in seeds)]:
            part += more
            cells |= {keys[i][0] for i in more}
            seeds |= {keys[i][1] for i in more}
        rest = [i for i in rest if i not in part]
        best = max(best, part, key=len)
    return tuple(sorted(best))


def _counted(interval: Interval, design: SeedDesign, keep: NDArray[np.bool_]) -> Interval:
    counts = {"cells": design.cells, "runs_missing": design.missing, "runs_left_out": design.left_out}
    return replace(interval, excluded=int((~keep).sum()), **counts)


def _scored(scores: Floats) -> NDArray[np.bool_]:
    """`[R, n]` to `[n]`: which questions have a score in every run."""
    return np.asarray(~np.isnan(scores).any(axis=0))


def _require_scores(keep: NDArray[np.bool_], name: str) -> None:
    if not keep.any():
        raise DataError(f"{name}: none of {keep.size} questions has a score in every run")


def _require_equal_questions(a: Runs, b: Runs) -> None:
    if a.questions is b.questions or np.array_equal(a.questions, b.questions):
        return
    only_a = sorted(set(map(str, a.questions)) - set(map(str, b.questions)))
    only_b = sorted(set(map(str, b.questions)) - set(map(str, a.questions)))
    if not only_a and not only_b:
        raise DataError(f"{a.name} and {b.name} hold the same questions in another order; sort them alike")
    raise DataError(
        f"{a.name} and {b.name} were not asked the same questions: {_some(only_a)} only in {a.name}, "
        f"{_some(only_b)} only in {b.name}. Evaluate both on one version of the benchmark."
    )


def _some(names: Sequence[str]) -> str:
    if not names:
        return "none"
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
