"""Accuracy against what it costs: for each cost the cells that no other beats in both, and what each step up gains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import pyarrow.parquet as pq

from chiasm.errors import DataError
from chiasm_experiments.report.cells import CellResult, runs_of
from chiasm_experiments.report.effects import Analysis
from chiasm_experiments.report.pairing import cell_interval, paired_difference
from chiasm_experiments.report.statistics import Interval
from chiasm_experiments.report.study import Study, Trial

COSTS = {
    "visual_tokens": "visual tokens",
    "flops": "FLOPs to answer",
    "trained_parameters": "trained parameters",
    "train_seconds": "GPU seconds of training",
    "latency": "seconds per answered question",
}
"""Every cost by the name that an objective has for it, and as it is printed."""
WITHOUT_OBJECTIVE = ("visual_tokens", "train_seconds")


@dataclass(frozen=True, slots=True)
class Step:
    """A cell on a front.

    Args:
        cell: with its accuracy.
        cost: the mean over its seeds.
        gain: its accuracy minus that of the next cheaper cell on the front, None for the cheapest. Over the seeds that
            both have; where they have none in common None too.
    """

    cell: CellResult
    cost: float
    gain: Interval | None


@dataclass(frozen=True, slots=True)
class Front:
    """The cells of one benchmark by one cost.

    Args:
        name: of the cost.
        costs: of each cell in the order of the analysis; None for the control, and where it is not known.
        title: the name as it is printed.
        steps: the front, the cheapest first.
        open: the cells off the front that no cell on it of no higher cost is decidedly better than, by the 95% interval
            of their difference, unadjusted. Their own means do not put them there; noise could.
        asked: whether the study minimises this cost, or where it minimises none, this is shown instead.
    """

    name: str
    title: str
    costs: tuple[float | None, ...]
    steps: tuple[Step, ...]
    open: tuple[CellResult, ...]
    asked: bool


def fronts(study: Study, analysis: Analysis) -> tuple[Front, ...]:
    """A front for each cost in which cells differ."""
    found = []
    for name in COSTS:
        costs = tuple(None if cell.is_control else _mean(cell, name) for cell in analysis.cells)
        known = {cost for cost in costs if cost is not None}
        if len(known) > 1:
            asked = name in (study.minimize or WITHOUT_OBJECTIVE)
            steps = _steps(analysis, costs)
            title = cost_title(study, name)
            found.append(Front(name, title, costs, steps, _open(analysis, costs, steps) if asked else (), asked))
    return tuple(found)


def joint_front(study: Study, analysis: Analysis) -> tuple[CellResult, ...]:
    """The cells that no other beats in accuracy and every cost that the study minimises; empty with fewer than two."""
    if len(study.minimize) < 2:
        return ()
    rows = []
    for cell in analysis.cells:
        values = [_mean(cell, name) for name in study.minimize]
        if not cell.is_control and None not in values:
            rows.append((cell, (-cell.accuracy.estimate, *(value for value in values if value is not None))))
    return tuple(cell for cell, mine in rows if not any(_dominates(other, mine) for _, other in rows))


def cost_title(study: Study, name: str) -> str:
    """What a cost is called; seconds are of a GPU only where trials had one."""
    gpu = any(trial.environment.get("gpu") for trial in study.complete)
    return COSTS[name] if gpu or name != "train_seconds" else "CPU seconds of training"


def cost_of(trial: Trial, name: str) -> float | None:
    """One cost of a complete trial; None where its manifest does not say."""
    match name:
        case "visual_tokens":
            return trial.visual_tokens
        case "flops":
            return trial.flops
        case "trained_parameters":
            return trial.trained
        case "train_seconds":
            return trial.seconds["train"] * trial.workers if "train" in trial.seconds else None
        case _:
            if "evaluate" not in trial.seconds:
                return None
            return trial.seconds["evaluate"] / max(1, int(pq.read_metadata(trial.questions).num_rows))


def _mean(cell: CellResult, name: str) -> float | None:
    found = [cost_of(trial, name) for trial in cell.trials]
    known = [cost for cost in found if cost is not None and math.isfinite(cost)]
    return fmean(known) if known else None


def _steps(analysis: Analysis, costs: Sequence[float | None]) -> tuple[Step, ...]:
    pairs = [(cell, cost) for cell, cost in zip(analysis.cells, costs, strict=True) if cost is not None]
    steps: list[Step] = []
    # of equally dear cells the most accurate comes first
    for cell, cost in sorted(pairs, key=lambda pair: (pair[1], -pair[0].accuracy.estimate)):
        if not steps or cell.accuracy.estimate > steps[-1].cell.accuracy.estimate:
            steps.append(Step(cell, cost, _difference(analysis, cell, steps[-1].cell) if steps else None))
    return tuple(steps)


def _open(analysis: Analysis, costs: Sequence[float | None], steps: Sequence[Step]) -> tuple[CellResult, ...]:
    on, found = {id(step.cell) for step in steps}, []
    for cell, cost in zip(analysis.cells, costs, strict=True):
        if cost is not None and id(cell) not in on:
            rivals = (_difference(analysis, step.cell, cell) for step in steps if step.cost <= cost)
            if not any(rival is not None and rival.verdict == "better" for rival in rivals):
                found.append(cell)
    return tuple(found)


def _difference(analysis: Analysis, cell: CellResult, other: CellResult) -> Interval | None:
    """Over equal seeds and questions; the two cells are compared as they are, whatever else they differ in."""
    sides = [analysis.scores.runs(item.trials, [""] * len(item.trials), item.label) for item in (cell, other)]
    try:
        return paired_difference(*sides)
    except DataError:
        return None


def further_seeds(study: Study, analysis: Analysis, cell: CellResult) -> Interval | None:
    """The accuracy over the seeds that were added after the choice alone, which the choice did not favour."""
    trials = [trial for trial in cell.trials if trial.seed in study.added_seeds]
    try:
        return cell_interval(runs_of(analysis.scores, trials, None, cell.label)) if trials else None
    except DataError:
        return None


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and any(a < b for a, b in zip(one, other, strict=True))
