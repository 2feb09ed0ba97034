"""Main effects where few cells match: a least-squares fit of accuracy as a sum of one effect for each factor.

In a pairwise design the cells of one level differ from those of another in everything else, so that hardly any match.
The additive model takes these differences out, if effects add up. Its coefficients are weighted sums of the cells'
scores, so they have the same intervals over images and seeds as any difference. To these is added what the model does
not explain: the mean square of the cells' residuals, which holds interactions (and once more the noise), with the
cells less the coefficients as its degrees of freedom. Both parts keep their own t quantile (Banerjee 1960, as in
`statistics`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import special

from chiasm_experiments.report.cells import cell_key
from chiasm_experiments.report.statistics import CONFIDENCE, Floats, Interval, mean_interval
from chiasm_experiments.report.study import Cell, Study
from chiasm_experiments.report.table import BenchmarkScores


@dataclass(frozen=True, slots=True)
class MainEffect:
    """A level against the first level of its factor that any cell has, by the additive model."""

    factor: str
    level: str
    reference: str
    difference: Interval


@dataclass(frozen=True, slots=True)
class AdditiveFit:
    """The additive model, fitted to the cells of one benchmark.

    Args:
        effects: those that can be told apart.
        cells: that were fitted: all of them with each of the seeds.
        seeds: that all of these cells have.
        freedom: cells less coefficients.
        residual_sd: the spread of the cells' accuracies around the model, in [0, 1].
        confounded: factors whose levels cannot be told apart from other factors'.
    """

    effects: tuple[MainEffect, ...]
    cells: int
    seeds: int
    freedom: int
    residual_sd: float
    confounded: tuple[str, ...]


def additive_fit(study: Study, scores: BenchmarkScores) -> AdditiveFit | None:
    """The fit on the seeds that all cells have; None where there are too few cells for it, or no such seed.

    The control's cells and the questions that some run has no score for take no part.
    """
    trials = [trial for trial in scores.trials if not study.is_control(trial.cell)]
    cells: dict[str, Cell] = {cell_key(trial.cell): trial.cell for trial in trials}
    have = [{trial.seed for trial in trials if cell_key(trial.cell) == key} for key in cells]
    seeds = sorted(set.intersection(*have)) if have else []
    design, columns = _design(study, list(cells.values()))
    rank = int(np.linalg.matrix_rank(design)) if design.size else 0
    freedom = len(cells) - rank
    if not seeds or freedom < 1:
        return None
    rows = {(cell_key(trial.cell), trial.seed): trial for trial in trials}
    used = [rows[key, seed] for seed in seeds for key in cells]
    runs = scores.runs(used, [cell_key(trial.cell) for trial in used], "the cells")
    keep = ~np.isnan(runs.scores).any(axis=0)
    if not keep.any():
        return None
    x_SCn = runs.scores[:, keep].reshape(len(seeds), len(cells), -1)
    inverse = np.linalg.pinv(design)
    accuracies = x_SCn.mean(axis=(0, 2))
    residual = accuracies - design @ (inverse @ accuracies)
    square = float(residual @ residual) / freedom
    effects, confounded = [], []
    for place, (factor, level, reference) in columns.items():
        weights = inverse[place]
        # a coefficient is estimable where the rows of the design span it
        if not np.allclose(weights @ design, np.eye(design.shape[1])[place], atol=1e-8):
            confounded.append(factor)
            continue
        bounds = float(np.minimum(weights, 0).sum()), float(np.maximum(weights, 0).sum())
        noise = mean_interval(np.einsum("c,scn->sn", weights, x_SCn), runs.clusters[keep], bounds=bounds)
        interval = _widened(noise, float(weights @ weights) * square, freedom)
        effects.append(
            MainEffect(factor, level, reference, replace(interval, cells=len(cells), excluded=int((~keep).sum())))
        )
    return AdditiveFit(
        tuple(effects), len(cells), len(seeds), freedom, math.sqrt(square), tuple(dict.fromkeys(confounded))
    )


def _design(study: Study, cells: Sequence[Cell]) -> tuple[Floats, dict[int, tuple[str, str, str]]]:
    """`[C, 1 + levels]` indicators, and what each column but the first stands for."""
    parts, columns = [np.ones((len(cells), 1))], {}
    for factor in study.varied:
        levels = [label for label in study.factors[factor] if any(cell[factor] == label for cell in cells)]
        for level in levels[1:]:
            columns[sum(part.shape[1] for part in parts)] = (factor, level, levels[0])
            parts.append(np.array([[float(cell[factor] == level)] for cell in cells]))
    return np.hstack(parts), columns


def _widened(noise: Interval, lack: float, freedom: int) -> Interval:
    """An interval with the part of the variance that the model leaves out; it has no p-value."""
    more = -float(special.stdtrit(freedom, (1 - CONFIDENCE) / 2)) * math.sqrt(lack)
    low = noise.estimate - math.hypot(noise.estimate - noise.low, more)
    high = noise.estimate + math.hypot(noise.high - noise.estimate, more)
    return replace(noise, low=low, high=high, se=math.hypot(noise.se, math.sqrt(lack)), p_value=math.nan)
