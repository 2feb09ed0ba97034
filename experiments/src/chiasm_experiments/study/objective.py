"""What a study seeks, as numbers: accuracy up, costs down."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from chiasm.plan import RunPlan
from chiasm_experiments.study.settings import Objective
from chiasm_experiments.training.files import QUESTIONS


def directions(objective: Objective) -> list[str]:
    """Optuna's directions: accuracy first, then each cost."""
    return ["maximize"] + ["minimize"] * len(objective.minimize)


def accuracy_of(manifest: Mapping[str, Any]) -> float | None:
    """The mean over benchmarks of their mean score; None where nothing was scored."""
    scores = [score for score in (manifest.get("scores") or {}).values() if score is not None]
    return sum(scores) / len(scores) if scores else None


def values_of(objective: Objective, manifest: Mapping[str, Any], plan: RunPlan, folder: Path) -> list[float] | None:
    """The values of a finished trial, in the order of `directions`; None where it was scored on nothing.

    Args:
        objective: of the study.
        manifest: of the trial.
        plan: of its cell, with costs.
        folder: of the trial, with the rows of its questions.
    """
    accuracy = accuracy_of(manifest)
    if accuracy is None:
        return None
    return [accuracy, *(_cost(name, manifest, plan, folder) for name in objective.minimize)]


def ranked(values: Sequence[Sequence[float]], objective: Objective) -> list[int]:
    """Indices from the best to the worst: the Pareto front first, then the front of the rest, and so on.

    Within a front the more accurate comes first, and of equal ones the earlier.

    Args:
        values: of each candidate, in the order of `directions`.
        objective: of the study.
    """
    gains = _gains(values, objective)
    rest, order = list(range(len(gains))), []
    while rest:
        first = _front(gains, rest)
        order += sorted(first, key=lambda i: (-gains[i][0], i))
        rest = [i for i in rest if i not in first]
    return order


def front(values: Sequence[Sequence[float]], objective: Objective) -> list[int]:
    """Indices of the candidates than which none is better in everything; with accuracy alone that is the best."""
    gains = _gains(values, objective)
    return sorted(_front(gains, list(range(len(gains)))), key=lambda i: (-gains[i][0], i))


def finite(values: Sequence[float] | None) -> bool:
    """Whether there are values and all of them are numbers that Optuna takes."""
    return values is not None and all(math.isfinite(value) for value in values)


def mean_values(rows: Sequence[Sequence[float]]) -> list[float]:
    """The mean of each objective over seeds."""
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def _gains(values: Sequence[Sequence[float]], objective: Objective) -> list[list[float]]:
    signs = [1 if direction == "maximize" else -1 for direction in directions(objective)]
    return [[sign * value for sign, value in zip(signs, row, strict=True)] for row in values]


def _front(gains: Sequence[Sequence[float]], among: Sequence[int]) -> list[int]:
    return [i for i in among if not any(_dominates(gains[j], gains[i]) for j in among)]


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a >= b for a, b in zip(one, other, strict=True)) and any(a > b for a, b in zip(one, other, strict=True))


def _cost(name: str, manifest: Mapping[str, Any], plan: RunPlan, folder: Path) -> float:
    if name == "visual_tokens":
        return float(manifest["visual_tokens"])
    if name == "trained_parameters":
        return float(manifest["parameters"]["trained"])
    if name == "flops":
        assert plan.cost is not None
        return float(plan.cost.inference)
    questions: int = pq.read_metadata(folder / QUESTIONS).num_rows
    return float(manifest["seconds"]["evaluate"]) / max(1, questions)
