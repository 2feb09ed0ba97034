"""The cells and the trials of a study: its design's combinations as complete runs, planned before anything starts."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from chiasm.config import RunConfig
from chiasm.cost import SampleSize
from chiasm.errors import ConfigError
from chiasm_experiments.study.cell import FULL, Cell, Skipped
from chiasm_experiments.study.config import Study
from chiasm_experiments.study.designs import combinations_of
from chiasm_experiments.study.fields import content
from chiasm_experiments.study.maker import Maker, fidelities, planned
from chiasm_experiments.study.sharing import prefixes
from chiasm_experiments.study.space import BASE, Chosen, Fixed

__all__ = [
    "BASE", "FULL", "Cell", "Cells", "Maker", "Skipped", "Trial", "fidelities", "levels_of", "make_cell", "make_cells",
    "make_trials", "planned", "promoted", "refuse_invalid",
]  # fmt: skip

MOST_LINES = 30
"""Of an error about cells."""


@dataclass(frozen=True, slots=True)
class Cells:
    """The cells of a design at one fidelity.

    Args:
        cells: that trials are made of, none twice.
        skipped: what is left out, and why.
        notes: what whoever reads the results must know: a stage that this fidelity skips, levels that are in no cell.
    """

    cells: tuple[Cell, ...]
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()


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
        slug = re.sub(r"[^A-Za-z0-9]+", "-", self.cell.label)[:60].strip("-").lower() or "cell"
        values = json.dumps(self.run.model_dump(mode="json"), sort_keys=True)
        return f"{slug}-s{self.seed}-{hashlib.sha256(values.encode()).hexdigest()[:8]}"

    @property
    def params(self) -> dict[str, Any]:
        """The trial as Optuna's parameters."""
        return {**self.cell.levels, "seed": self.seed}


def make_cell(
    study: Study, levels: Mapping[str, Any], fidelity: str | None = None, sample: SampleSize | None = None
) -> Cell | Skipped:
    """The cell with the given levels, or why there is none.

    Args:
        study: as its file gives it.
        levels: the label of each named factor, a number or its text for a range; the others stand at the base.
        fidelity: its name; None: the first, which is the cheapest.
        sample: the sample whose cost the plan estimates; None leaves the estimate out.

    Raises:
        ConfigError: there is no such factor, level, number or fidelity.
    """
    maker = Maker(study, fidelity, sample)
    chosen = maker.read(levels)
    try:
        return maker.make(chosen)
    except ConfigError as error:
        return maker.broken(chosen, error)


def make_cells(study: Study, sample: SampleSize | None = None, fidelity: str | None = None) -> Cells:
    """The cells of a study's design, in an order that the file alone decides; equal runs are one cell.

    For a search every combination with ranges at their middle, or a spread sample where there are too many: what is to
    be said of them before anything starts.

    Args:
        study: as its file gives it.
        sample: the sample whose cost each plan estimates; None leaves the estimate out.
        fidelity: its name; None: the first, which is the cheapest.

    Raises:
        ConfigError: a factor or a fidelity names no field of the run, or a level is no value for it, with file, line
            and field; or the constraints leave no cell.
    """
    return _Collector(Maker(study, fidelity, sample)).collect()


def refuse_invalid(cells: Cells, study: Study) -> None:
    """Stops a study that has a cell that cannot work, unless it skips such.

    Raises:
        ConfigError: each such cell, and why.
    """
    config = study.config
    wrong = [item for item in cells.skipped if item.by == "plan"]
    if wrong and config.invalid == "refuse" and config.design != "search":
        raise ConfigError(
            "these cells cannot work; change or remove their levels, leave them out with `constraints`, or skip them "
            "with `invalid: skip`:\n" + "\n".join(_lines(wrong))
        )
    if not cells.cells:
        raise ConfigError(f"study {config.name!r} has no cell that can work:\n" + "\n".join(_lines(cells.skipped)))


def make_trials(study: Study, cells: Cells) -> list[Trial]:
    """Each cell with each seed, seed by seed, so that a study stopped early is still balanced.

    In each block cells with the same frozen parts stand together, and among those the ones with the same first stages,
    so that what was loaded and trained for one serves the next.
    """
    together = _grouped(cells.cells)
    return [Trial(cell, seed) for seed in study.config.seeds for cell in together]


def promoted(count: int, share: float) -> int:
    """How many of `count` cells go on to the next fidelity: the share of them, rounded up, and at least one."""
    return max(1, math.ceil(share * count - 1e-9))


def levels_of(study: Study) -> Iterator[tuple[str, list[str]]]:
    """Each factor and the labels of its levels."""
    for path, levels in study.config.varied.items():
        yield path, list(levels)


class _Collector:
    """Goes through the combinations of a design once."""

    def __init__(self, maker: Maker) -> None:
        self.maker = maker
        self.made: dict[str, tuple[Chosen, Cell | Skipped]] = {}
        self.errors: list[tuple[Chosen, ConfigError]] = []
        self.sound: set[tuple[str, Any]] = set()
        self.lacking: list[Skipped] = []

    def collect(self) -> Cells:
        """The cells of the design, what it leaves out, and what is to be said of them."""
        space, name = self.maker.space, self.maker.config.name
        cells: dict[str, Cell] = {}
        skipped: dict[str, Skipped] = {}
        notes: list[str] = []
        twins: list[Cell] = []
        unaligned = 0
        for chosen in combinations_of(space, self.allowed, self.missing):
            item = self.make(chosen)
            if isinstance(item, Skipped):
                skipped.setdefault(json.dumps(item.levels), item)
                continue
            first = cells.setdefault(json.dumps(content(item.run), sort_keys=True), item)
            if first is item:
                unaligned += self.maker.skips_alignment(chosen, item.run)
            elif first.levels != item.levels:
                twins.append(item)
                notes.append(f"{item.label} is the same run as {first.label}, which is tried once")
        self.raise_mistakes()
        made, left_out = tuple(cells.values()), (*skipped.values(), *self.never(cells.values()))
        if not made and left_out and all(item.by == "constraint" for item in left_out):
            raise ConfigError(f"the constraints of study {name!r} leave no cell:\n" + "\n".join(_lines(left_out)))
        if unaligned:
            notes.append(
                f"stage 1 is skipped in {unaligned} of {len(made)} cells: no stage trains the connectors alone, and "
                "rankings without it are known to be noise"
            )
        notes += [*self.unused((*made, *twins, *left_out)), *self.unknown(made)]
        return Cells(made, left_out, tuple(f"fidelity {self.maker.fidelity}: {note}" for note in notes))

    def make(self, chosen: Chosen) -> Cell | Skipped:
        """The cell of a combination, or why there is none; made once."""
        key = json.dumps(chosen, sort_keys=True)
        if key not in self.made:
            try:
                item = self.maker.make(chosen)
            except ConfigError as error:
                self.errors.append((chosen, error))
                item = self.maker.broken(chosen, error)
            else:
                self.sound |= set(chosen.items())
            self.made[key] = chosen, item
        return self.made[key][1]

    def allowed(self, chosen: Chosen) -> bool:
        """Whether there is a cell of a combination."""
        return isinstance(self.make(chosen), Cell)

    def missing(self, wanted: Fixed) -> None:
        """Notes levels that meet in no cell, with the reason of one try: rather that it cannot work."""
        tries = [
            item
            for chosen, item in self.made.values()
            if isinstance(item, Skipped) and all(chosen.get(path) == level for path, level in wanted.items())
        ]
        reason = min(tries, key=lambda item: item.by != "plan")
        base = self.maker.space.base
        levels = {path: base[path] if level is None else str(level) for path, level in wanted.items()}
        words = tuple(f"in no cell; for example as {reason.label}: {text}" for text in reason.reasons)
        self.lacking.append(self.maker.skipped(levels, words, reason.by))

    def never(self, cells: Iterable[Cell]) -> Iterator[Skipped]:
        """What a pairwise design lacks; a level that is in no cell is named once, not with all that it never meets."""
        seen = {level for cell in cells for level in cell.levels.items()}
        told: set[tuple[str, str]] = set()
        for item in self.lacking:
            unseen = [level for level in item.levels.items() if level not in seen]
            if not unseen:
                yield item
            elif not told & set(unseen):
                told |= set(unseen[:1])
                yield self.maker.skipped(dict(unseen[:1]), item.reasons, item.by)

    def raise_mistakes(self) -> None:
        """A combination may be at odds with itself; a level that is in no run at all is a mistake.

        Raises:
            ConfigError: the first such, with file, line and field.
        """
        for chosen, error in self.errors:
            if not chosen or len(self.errors) == len(self.made):
                raise error
            for path, level in chosen.items():
                if (path, level) not in self.sound:
                    try:
                        self.maker.run({path: level})
                    except ConfigError:
                        raise error from None

    def unused(self, items: Iterable[Cell | Skipped]) -> Iterator[str]:
        """Levels of which the design makes nothing, where it was to try all."""
        config = self.maker.config
        seen = {level for item in items for level in item.levels.items()}
        for path, levels in config.varied.items():
            never = [label for label in levels if (path, label) not in seen]
            if never and config.design != "cells":
                yield f"{path}: {', '.join(never)} in no cell; see when, and what the base run has"

    def unknown(self, cells: Iterable[Cell]) -> Iterator[str]:
        """Constraints that could not be held against a cell."""
        for name in self.maker.config.constraints.at_most:
            labels = [cell.label for cell in cells if planned(cell.plan, name) is None]
            if labels:
                yield f"constraints.at_most: {name} of {len(labels)} cells is not known; they stay in: {labels[0]}, ..."


def _grouped(cells: Iterable[Cell]) -> list[Cell]:
    """Cells in order of first appearance of their frozen parts, then of their first stage, of the first two, ..."""
    ranks: dict[tuple[str, ...], int] = {}
    order = {}
    for cell in cells:
        values = cell.run.model_dump(mode="json", include={"vision": {"encoders", "image"}, "llm": True})
        keys = [json.dumps(values, sort_keys=True), *prefixes(cell.run)]
        order[id(cell)] = [ranks.setdefault(tuple(keys[:n]), len(ranks)) for n in range(1, len(keys) + 1)]
    return sorted(cells, key=lambda cell: order[id(cell)])


def _lines(items: Iterable[Skipped]) -> list[str]:
    """A line for each reason; many in a few."""
    lines = [f"  {item.label}: {reason}" for item in items for reason in item.reasons]
    return lines if len(lines) <= MOST_LINES else [*lines[:MOST_LINES], f"  ... and {len(lines) - MOST_LINES} more"]
