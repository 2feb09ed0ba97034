"""What is said of each cell alone: its accuracy, against chance and against the control."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import DataError
from chiasm_experiments.report.pairing import Runs, cell_interval, paired_difference
from chiasm_experiments.report.statistics import Interval, holm
from chiasm_experiments.report.study import Cell, Study, Trial
from chiasm_experiments.report.table import BenchmarkScores

SIGNIFICANCE = 0.05


@dataclass(frozen=True, slots=True)
class CellResult:
    """One combination of levels on one benchmark, over its seeds.

    Args:
        minus_control: against the cell that differs in the control's factor alone; None for the control itself and
            where no such cell has a seed in common.
        seed_sd: standard deviation of the seeds' accuracies; None with one seed.
        seed_accuracies: the accuracy of each trial on the questions that count.
        unparsed: share of answers that could not be read.
        not_scored: share of questions without a score.
    """

    cell: Cell
    label: str
    is_control: bool
    trials: tuple[Trial, ...]
    accuracy: Interval
    minus_chance: Interval
    minus_control: Interval | None
    seed_sd: float | None
    seed_accuracies: tuple[float, ...]
    unparsed: float
    not_scored: float


@dataclass(frozen=True, slots=True)
class ControlResult:
    """The image-blind arm, averaged over its cells.

    Args:
        minus_chance: over images and seeds; the verdict on the benchmark rests on it.
        checkpoints: the same mean over images only. It supports no claim about other seeds, but one model that
            answers better than chance without seeing is enough to show that a benchmark leaks.
        above: labels of single control cells above chance, Holm-adjusted over the control cells.
    """

    label: str
    accuracy: Interval
    minus_chance: Interval
    checkpoints: Interval
    above: tuple[str, ...]

    @property
    def verdict(self) -> str:
        verdict = self.minus_chance.verdict
        return {"undecided": "at chance", "better": "above chance", "worse": "below chance"}[verdict]

    @property
    def leaks(self) -> bool:
        return self.minus_chance.low > 0 or bool(self.above)


def cell_results(study: Study, scores: BenchmarkScores) -> tuple[CellResult, ...]:
    """All cells with a score, the most accurate first."""
    groups: dict[str, list[Trial]] = {}
    for trial in scores.trials:
        groups.setdefault(cell_key(trial.cell), []).append(trial)
    found = []
    for trials in groups.values():
        result = _cell_result(study, scores, trials, groups)
        if result is not None:
            found.append(result)
    return tuple(sorted(found, key=lambda result: (-result.accuracy.estimate, result.label)))


def control_result(study: Study, scores: BenchmarkScores, cells: Sequence[CellResult]) -> ControlResult | None:
    """None where the study names no control or none of its trials is complete."""
    trials = [trial for trial in scores.trials if study.is_control(trial.cell)]
    if study.control is None or not trials:
        return None
    runs = runs_of(scores, trials, study.control.path, study.control.label)
    # Every checkpoint as a cell of its own and no second seed leaves the images as the only source of variance.
    alone = Runs(
        tuple((f"{key} {seed}", 0) for key, seed in runs.keys), runs.questions, runs.clusters, runs.scores, runs.name
    )
    try:
        accuracy, minus_chance = cell_interval(runs), cell_interval(runs, chance=scores.chance)
        checkpoints = cell_interval(alone, chance=scores.chance)
    except DataError:
        return None
    controls = [cell for cell in cells if cell.is_control]
    adjusted = holm([cell.minus_chance.p_value for cell in controls])
    above = [
        cell.label
        for cell, p in zip(controls, adjusted, strict=True)
        if p < SIGNIFICANCE and cell.minus_chance.estimate > 0
    ]
    return ControlResult(study.control.label, accuracy, minus_chance, checkpoints, tuple(above))


def cell_key(cell: Cell, without: str | None = None) -> str:
    """An identity of the cell's levels, unlike its label free of ambiguity."""
    return json.dumps([[path, label] for path, label in cell.items() if path != without])


def runs_of(
    scores: BenchmarkScores,
    trials: Sequence[Trial],
    factor: str | None,
    name: str,
    mask: NDArray[np.bool_] | None = None,
) -> Runs:
    """The runs of some trials, keyed by their cell without `factor`; `mask` (`[n]`) selects questions."""
    return scores.runs(trials, [cell_key(trial.cell, factor) for trial in trials], name, mask)


def _cell_result(
    study: Study, scores: BenchmarkScores, trials: list[Trial], groups: dict[str, list[Trial]]
) -> CellResult | None:
    cell = trials[0].cell
    label = study.label(cell)
    runs = runs_of(scores, trials, None, label)
    scored = ~np.isnan(runs.scores)
    use = scored.all(axis=0)
    if not use.any():
        return None
    per_seed = runs.scores[:, use].mean(axis=1)
    row = {trial.folder.name: i for i, trial in enumerate(scores.trials)}
    return CellResult(
        cell=cell,
        label=label,
        is_control=study.is_control(cell),
        trials=tuple(trials),
        accuracy=cell_interval(runs),
        minus_chance=cell_interval(runs, chance=scores.chance),
        minus_control=_minus_control(study, scores, trials, groups),
        seed_sd=float(per_seed.std(ddof=1)) if len(trials) > 1 else None,
        seed_accuracies=tuple(float(value) for value in per_seed),
        unparsed=float(np.mean([scores.unparsed[row[trial.folder.name]] for trial in trials])),
        not_scored=float(1 - scored.mean()),
    )


def _minus_control(
    study: Study, scores: BenchmarkScores, trials: list[Trial], groups: dict[str, list[Trial]]
) -> Interval | None:
    cell, control = trials[0].cell, study.control
    if control is None or study.is_control(cell):
        return None
    blind = groups.get(cell_key({**cell, control.path: control.label}))
    if blind is None:
        return None
    try:
        return paired_difference(
            runs_of(scores, trials, control.path, study.label(cell)),
            runs_of(scores, blind, control.path, study.label(blind[0].cell)),
        )
    except DataError:  # no seed, or no scored question, in common
        return None
