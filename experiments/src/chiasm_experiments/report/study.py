"""What a report knows of a study: its plan and its trials, at one fidelity at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

Cell = Mapping[str, str]
Status = Literal["complete", "pruned", "failed", "unfinished"]

SKIPS_ALIGNMENT = "stage 1 is skipped"
"""How a plan's note of a fidelity says that no stage trains the connectors alone."""


@dataclass(frozen=True, slots=True)
class Control:
    """The image-blind arm: the level `label` of the factor `path`."""

    path: str
    label: str


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers from which a search draws a factor."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True, slots=True)
class Skipped:
    """Levels of which no cell was made; `by` is `plan` for what cannot work and `constraint` for what is left out."""

    levels: Cell
    fidelity: str | None
    reasons: tuple[str, ...]
    by: str


@dataclass(frozen=True, slots=True)
class Point:
    """A trial at a rung: its accuracy there is of the rung's questions, which are some of all."""

    rung: int
    share: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Trial:
    """One trial as its manifest tells it; None stands for what the manifest does not say.

    Args:
        folder: where the trial's files are.
        seconds: wall clock by phase (`train`, `evaluate`, `total`); `shared` is what of `train` another trial spent.
        environment: versions, git revision, command and the like, as written.
        fidelity: at which it was run; None where the study knows of none.
        rung: at which it was pruned.
        curve: its learning curve as far as it was measured.
        workers: processes that trained together.
        flops: operations of an answer, by its plan.
    """

    id: str
    folder: Path
    cell: Cell
    seed: int
    status: Status
    error: str | None = None
    visual_tokens: int | None = None
    trained: int | None = None
    frozen: int | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    fidelity: str | None = None
    rung: int | None = None
    curve: tuple[Point, ...] = ()
    workers: int = 1
    flops: float | None = None

    @property
    def questions(self) -> Path:
        return self.folder / "questions.parquet"


@dataclass(frozen=True)
class Study:
    """A plan and the trials found so far, in order of their ids, seen at one fidelity.

    Args:
        factors: the path of each factor with levels, and its labels in the order of the plan.
        ranges: the path of each factor whose values are numbers of a range.
        paths: of all factors, in the order of the plan.
        planned: how many trials the plan has at this fidelity; None if unknown.
        every: the trials of all fidelities that belong to the plan.
        fidelity: that is looked at: the most expensive at which a trial is complete, unless `at` chose another.
        fidelities: all, from the cheapest; empty where the plan names none.
        listed: at each fidelity the trials that were put in line, whether they have begun or not.
        minimize: the costs of the objective.
        added_seeds: given after the plan, in a search to its best cells.
        skipped: cells that were left out.
        notes: what the plan says that must not be silent.
        warm_start: earlier studies that a search began with, and how many trials of each.
        outside: trials on disk that are no longer part of the plan.
    """

    folder: Path
    name: str
    question: str
    factors: Mapping[str, tuple[str, ...]]
    ranges: Mapping[str, Range]
    paths: tuple[str, ...]
    seeds: tuple[int, ...]
    design: str
    control: Control | None
    planned: int | None
    every: tuple[Trial, ...]
    fidelity: str | None = None
    fidelities: tuple[str, ...] = ()
    listed: Mapping[str, int] = field(default_factory=dict)
    minimize: tuple[str, ...] = ()
    added_seeds: tuple[int, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()
    warm_start: Mapping[str, int] = field(default_factory=dict)
    outside: tuple[str, ...] = ()

    def at(self, fidelity: str) -> Study:
        """The same study seen at another fidelity."""
        return replace(self, fidelity=fidelity, planned=self.listed.get(fidelity, 0))

    @cached_property
    def trials(self) -> tuple[Trial, ...]:
        """Of this fidelity; one whose fidelity is not known is of all."""
        return tuple(trial for trial in self.every if trial.fidelity in (self.fidelity, None))

    @cached_property
    def complete(self) -> tuple[Trial, ...]:
        return tuple(trial for trial in self.trials if trial.status == "complete")

    @cached_property
    def finished(self) -> tuple[str, ...]:
        """The fidelities with a complete trial, the most expensive first."""
        reached = {trial.fidelity for trial in self.every if trial.status == "complete"}
        return tuple(name for name in reversed(self.fidelities) if name in reached)

    @property
    def several(self) -> bool:
        """Whether a claim has to say at which fidelity it was made."""
        return len(self.fidelities) > 1

    @property
    def where(self) -> str:
        """` at fidelity NAME` for titles and sentences; empty where there is one alone."""
        return f" at fidelity {self.fidelity}" if self.several else ""

    def unaligned(self, fidelity: str | None) -> str | None:
        """The plan's note that stage 1 is skipped at a fidelity, None without one."""
        lead = f"fidelity {fidelity}: "
        return next((note for note in self.notes if note.startswith(lead) and SKIPS_ALIGNMENT in note), None)

    @cached_property
    def varied(self) -> tuple[str, ...]:
        """The factors with more than one level in the plan; all that have levels where none has."""
        several = tuple(path for path, labels in self.factors.items() if len(labels) > 1)
        return several if several or self.ranges else tuple(self.factors)

    @cached_property
    def named(self) -> tuple[str, ...]:
        """What tells one cell from another: the factors that vary, ranges among them, in the order of the plan."""
        return tuple(path for path in self.paths if path in self.varied or path in self.ranges)

    @cached_property
    def short(self) -> Mapping[str, str]:
        """For each factor its last path component, or the whole path where that is ambiguous."""
        last = [path.rpartition(".")[2] for path in self.paths]
        return {path: end if last.count(end) == 1 else path for path, end in zip(self.paths, last, strict=True)}

    def value(self, cell: Cell, path: str) -> str:
        """A cell's level as it is printed; numbers of a range with four digits."""
        number = self.number(cell, path)
        return cell[path] if number is None else f"{number:.4g}"

    def number(self, cell: Cell, path: str) -> float | None:
        """A cell's number of a range; None where the factor has levels, or does not vary in this cell."""
        if path not in self.ranges:
            return None
        try:
            return float(cell[path])
        except ValueError:
            return None

    def label(self, cell: Cell, without: str | None = None) -> str:
        """A readable name of a cell, say `encoders=clip, fusion=single`; `without` leaves one factor out."""
        parts = [f"{self.short[path]}={self.value(cell, path)}" for path in self.named if path != without]
        return ", ".join(parts) or "the only cell"

    def is_control(self, cell: Cell) -> bool:
        return self.control is not None and cell[self.control.path] == self.control.label
