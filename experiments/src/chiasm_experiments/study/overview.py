"""What a whole study would be: the cells of each fidelity, its trials, and the operations of their training."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from chiasm.config import StageConfig
from chiasm.cost import SampleSize
from chiasm.errors import ChiasmError, ConfigError
from chiasm_experiments.data.mixture import load_mixture
from chiasm_experiments.data.order import Order
from chiasm_experiments.study.cells import Cell, Cells, fidelities, make_cells, make_trials, promoted, refuse_invalid
from chiasm_experiments.study.config import Study
from chiasm_experiments.study.settings import Range
from chiasm_experiments.study.sharing import prefixes


@dataclass(frozen=True, slots=True)
class FidelityPlan:
    """What a study does at one fidelity.

    Args:
        name: of the fidelity.
        cells: of which its trials are made: by the design, or at later fidelities by promotion.
        tried: how many of them; None: until the budget of a search is spent.
        trials: that many with every seed.
        flops: of training all of its trials, each stage that several have in common once; None: not known.
        each: the mean of its cells, trained alone.
        exact: whether it is known which cells these are.
    """

    name: str
    cells: Cells
    tried: int | None
    trials: int | None
    flops: float | None
    each: float | None
    exact: bool


@dataclass(frozen=True, slots=True)
class StudyPlan:
    """What a study does.

    Args:
        study: as its file gives it.
        sample: the sample whose cost was estimated.
        fidelities: from the cheapest to the whole.
        refused: why a sweep would not start; None if it would.
        unknown: data whose size could not be told, and why.
    """

    study: Study
    sample: SampleSize
    fidelities: tuple[FidelityPlan, ...]
    refused: str | None
    unknown: tuple[str, ...]

    @property
    def trials(self) -> int | None:
        """Of all fidelities; None where a budget ends a search."""
        total = _total([item.trials for item in self.fidelities])
        return None if total is None else int(total)

    @property
    def flops(self) -> float | None:
        """Of training them all; None where the size of data is not known."""
        return _total([item.flops for item in self.fidelities])

    @property
    def notes(self) -> tuple[str, ...]:
        """What is never to be silent."""
        notes = [note for item in self.fidelities for note in item.cells.notes]
        for item, following in itertools.pairwise(self.fidelities):
            if None not in (item.each, following.each) and (item.each or 0) >= (following.each or 0):
                notes.append(f"fidelity {item.name}: a cell takes no less training than at {following.name}")
        return tuple(notes)

    def summary(self, workers: int = 1) -> dict[str, Any]:
        """As plain values, for `--json`; cells that cannot work are among the cells, with their problems."""
        config = self.study.config
        factors = {
            path: levels.model_dump() if isinstance(levels, Range) else list(levels)
            for path, levels in config.factors.items()
        }
        cells, skipped = [], []
        for item in self.fidelities:
            for cell in item.cells.cells:
                about = {"label": cell.label, "levels": cell.levels, "fidelity": item.name}
                cells.append(about | cell.plan.summary(workers))
            for left in item.cells.skipped:
                about = {"label": left.label, "levels": left.levels, "fidelity": item.name}
                skipped.append(about | {"by": left.by, "reasons": list(left.reasons)})
                if left.by == "plan":
                    cells.append(about | {"valid": False, "problems": list(left.reasons)})
        return {
            "study": config.name,
            "question": config.question,
            "design": config.design,
            "factors": factors,
            "when": {path: {k: list(v) for k, v in needed.items()} for path, needed in config.when.items()},
            "seeds": list(config.seeds),
            "fidelities": [
                {
                    "name": item.name,
                    "cells": len(item.cells.cells),
                    "skipped": len(item.cells.skipped),
                    "tried": item.tried,
                    "trials": item.trials,
                    "train_flops": item.flops,
                }
                for item in self.fidelities
            ],
            "trials": self.trials,
            "train_flops": self.flops,
            "notes": list(self.notes),
            "refused": self.refused,
            "cells": cells,
            "skipped": skipped,
        }


def plan_study(study: Study, sample: SampleSize) -> StudyPlan:
    """Plans a study; no weight is loaded. Data is opened to tell its size, where its files are there.

    Args:
        study: as its file gives it.
        sample: the sample whose cost is estimated.

    Raises:
        ConfigError: as `make_cells` says.
    """
    config, sizes, refused = study.config, _Sizes(), None
    plans: list[FidelityPlan] = []
    for name in fidelities(study):
        cells = make_cells(study, sample, name)
        try:
            refuse_invalid(cells, study)
        except ConfigError as error:
            refused = refused or str(error)
        if plans:
            before = plans[-1].tried
            tried = None if before is None else min(promoted(before, config.promote), len(cells.cells) or before)
        else:
            tried = config.search.trials if config.design == "search" else len(cells.cells)
        exact = not plans and config.design != "search"
        trials = None if tried is None else tried * (1 if config.design == "search" else len(config.seeds))
        each = [_alone(cell, sizes) for cell in cells.cells]
        mean = None if None in each or not each else fmean(value for value in each if value is not None)
        flops = _together(study, cells, sizes) if exact else None if mean is None or trials is None else mean * trials
        plans.append(FidelityPlan(name, cells, tried, trials, flops, mean, exact))
    return StudyPlan(study, sample, tuple(plans), refused, tuple(sizes.unknown.values()))


@dataclass(slots=True)
class _Sizes:
    """Samples of each stage's data, told once."""

    known: dict[str, int | None] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)

    def samples(self, stage: StageConfig) -> int | None:
        """How many samples a stage takes in all its steps; None where its data is not here."""
        if stage.steps is not None:
            return stage.steps * stage.batch_size
        key = json.dumps([ref.model_dump(mode="json") for ref in stage.data], sort_keys=True)
        if key not in self.known:
            try:
                self.known[key] = len(load_mixture(stage.data))
            except ChiasmError as error:
                self.known[key] = None
                self.unknown[key] = f"stage {stage.name}: {error}"
        size = self.known[key]
        return None if size is None else Order(size, stage.batch_size, 0, 0).steps(stage.epochs) * stage.batch_size


def _stages(cell: Cell, sizes: _Sizes) -> list[float | None]:
    """Operations of training each stage of a cell."""
    assert cell.plan.cost is not None
    samples = [sizes.samples(stage) for stage in cell.run.stages]
    each = [cell.plan.cost.stages[stage.name].flops for stage in cell.run.stages]
    return [None if count is None else float(count) * flops for count, flops in zip(samples, each, strict=True)]


def _alone(cell: Cell, sizes: _Sizes) -> float | None:
    return _total(_stages(cell, sizes))


def _together(study: Study, cells: Cells, sizes: _Sizes) -> float | None:
    """Operations of all trials, where a stage that several have in common is trained once."""
    trained: dict[str, float | None] = {}
    for trial in make_trials(study, cells):
        trained |= dict(zip(prefixes(trial.run), _stages(trial.cell, sizes), strict=True))
    return _total(list(trained.values()))


def _total(values: Sequence[float | None]) -> float | None:
    return None if None in values else sum(value for value in values if value is not None)
