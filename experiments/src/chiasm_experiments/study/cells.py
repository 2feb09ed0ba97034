"""The cells of a study: every combination of levels as one complete run, planned before anything starts."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from chiasm.config import RunConfig, include_data, parse_run
from chiasm.cost import SampleSize
from chiasm.errors import ConfigError
from chiasm.plan import RunPlan, plan_run
from chiasm.yamlfile import Document, Location, Problem
from chiasm_experiments.study.config import Study, level_location


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination of levels.

    Args:
        levels: factor path to label.
        run: the complete run, with the base's seed.
        plan: what planning it gave.
    """

    levels: dict[str, str]
    run: RunConfig
    plan: RunPlan

    @property
    def label(self) -> str:
        """The levels in words."""
        return ", ".join(self.levels.values())


@dataclass(frozen=True, slots=True)
class Trial:
    """One cell with one seed."""

    cell: Cell
    seed: int

    @property
    def run(self) -> RunConfig:
        return self.cell.run.model_copy(update={"seed": self.seed})

    @property
    def name(self) -> str:
        """Readable, and different for different runs: the folder of the trial."""
        slug = re.sub(r"[^A-Za-z0-9]+", "-", self.cell.label).strip("-").lower()[:60]
        content = json.dumps(self.run.model_dump(mode="json"), sort_keys=True)
        return f"{slug}-s{self.seed}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"

    @property
    def params(self) -> dict[str, Any]:
        """The trial as Optuna's parameters."""
        return {**self.cell.levels, "seed": self.seed}


def make_cells(study: Study, sample: SampleSize | None = None) -> list[Cell]:
    """Every combination of the factors' levels, in the order of the file.

    Args:
        study: as its file gives it.
        sample: the sample whose cost each plan estimates; None leaves the estimate out.

    Raises:
        ConfigError: a factor names no field of the run, or a level is no value for it; with file, line and field.
    """
    factors = study.config.varied
    combinations = itertools.product(*(levels.items() for levels in factors.values()))
    cells = []
    for combination in combinations:
        labels = {path: label for path, (label, _) in zip(factors, combination, strict=True)}
        run = _make_run(
            study, {path: (label, value) for path, (label, value) in zip(factors, combination, strict=True)}
        )
        cells.append(Cell(labels, run, plan_run(run, sample)))
    return cells


def make_trials(study: Study, cells: list[Cell]) -> list[Trial]:
    """Each cell with each seed, seed by seed, so that a study stopped early is still balanced."""
    return [Trial(cell, seed) for seed in study.config.seeds for cell in cells]


def refuse_invalid(cells: list[Cell]) -> None:
    """Stops a study that has a cell that cannot work.

    Raises:
        ConfigError: each such cell, and why.
    """
    lines = [f"{cell.label}: {problem}" for cell in cells for problem in cell.plan.problems]
    if lines:
        raise ConfigError(
            "these cells cannot work; change or remove their levels:\n" + "\n".join(f"  {x}" for x in lines)
        )


def _make_run(study: Study, levels: dict[str, tuple[str, Any]]) -> RunConfig:
    """The base run with each factor's field replaced, read as if it had been written so."""
    data = copy.deepcopy(study.base.data)
    lines = dict(study.base.lines)
    for path, (label, value) in levels.items():
        place = level_location(study.document, path, label, study.config.varied[path])
        location = _locate(study, data, path)
        node = data
        for part in location[:-1]:
            node = node[part]
        node[location[-1]] = copy.deepcopy(value)
        lines = {at: line for at, line in lines.items() if at[: len(location)] != location}
        below = {at[len(place) :]: line for at, line in study.document.lines.items() if at[: len(place)] == place}
        lines.update({location + at: line for at, line in below.items()})
    document = Document(data, lines, study.base.path)
    include_data(document)
    return parse_run(document)


def _locate(study: Study, data: Any, path: str) -> Location:
    """A factor's path as a location in the base run; stages may be named: `stages.pretrain.lr`.

    Intermediate fields that the base leaves to their defaults are made.
    """
    location: list[str | int] = []
    node = data
    parts = path.split(".")
    for position, name in enumerate(parts):
        last = position == len(parts) - 1
        part: str | int = name
        if isinstance(node, list):
            names = [item.get("name") if isinstance(item, dict) else None for item in node]
            if name in names:
                part = names.index(name)
            elif name.isdigit() and int(name) < len(node):
                part = int(name)
            else:
                message = f"{'.'.join(parts[:position])} has no entry {name!r}; entries: {names}"
                raise study.document.fail([Problem(("factors", path), message)])
        elif not isinstance(node, dict):
            message = f"{'.'.join(parts[:position])} is {node!r} in the base run, so it has no field {name!r}"
            raise study.document.fail([Problem(("factors", path), message)])
        location.append(part)
        if not last:
            node = node.setdefault(part, {}) if isinstance(node, dict) else node[int(part)]
    return tuple(location)


def levels_of(study: Study) -> Iterator[tuple[str, list[str]]]:
    """Each factor and the labels of its levels."""
    for path, levels in study.config.varied.items():
        yield path, list(levels)
