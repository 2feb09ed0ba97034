"""Reads what a study folder says about itself: the plan in `study.json` and the manifest of each trial."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from chiasm.errors import DataError

Cell = Mapping[str, str]
Status = Literal["complete", "pruned", "failed", "unfinished"]

_STATUS: dict[str, Status] = {"complete": "complete", "pruned": "pruned", "failed": "failed"}
"""Of a manifest; a run with any other is under way, or waits to be taken up."""


@dataclass(frozen=True, slots=True)
class Control:
    """The image-blind arm: the level `label` of the factor `path`."""

    path: str
    label: str


@dataclass(frozen=True, slots=True)
class Trial:
    """One trial as its manifest tells it; None stands for what the manifest does not say.

    Args:
        folder: where the trial's files are.
        seconds: wall clock by phase (`train`, `evaluate`, `total`); `shared` is what of `train` another trial spent.
        environment: versions, git revision, command and the like, as written.
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

    @property
    def questions(self) -> Path:
        return self.folder / "questions.parquet"


@dataclass(frozen=True)
class Study:
    """A plan and the trials found so far, in order of their ids.

    Args:
        factors: each path with its labels in the order of the plan.
        trials: those that belong to the plan, at one fidelity.
        fidelity: of these trials: the most expensive at which one is complete.
        fidelities: all, from the cheapest.
        planned: how many trials the plan has: `planned` of study.json, else the grid's size; None if unknown.
    """

    folder: Path
    name: str
    question: str
    factors: Mapping[str, tuple[str, ...]]
    seeds: tuple[int, ...]
    design: str
    control: Control | None
    planned: int | None
    trials: tuple[Trial, ...]
    fidelity: str | None = None
    fidelities: tuple[str, ...] = ()

    @cached_property
    def complete(self) -> tuple[Trial, ...]:
        return tuple(trial for trial in self.trials if trial.status == "complete")

    @cached_property
    def varied(self) -> tuple[str, ...]:
        """The factors with more than one level in the plan; all of them where none has."""
        return tuple(path for path, labels in self.factors.items() if len(labels) > 1) or tuple(self.factors)

    @cached_property
    def short(self) -> Mapping[str, str]:
        """For each factor its last path component, or the whole path where that is ambiguous."""
        last = [path.rpartition(".")[2] for path in self.factors]
        return {path: end if last.count(end) == 1 else path for path, end in zip(self.factors, last, strict=True)}

    def label(self, cell: Cell, without: str | None = None) -> str:
        """A readable name of a cell, say `encoders=clip, fusion=single`; `without` leaves one factor out."""
        parts = [f"{self.short[path]}={cell[path]}" for path in self.varied if path != without]
        return ", ".join(parts) or "the only cell"

    def is_control(self, cell: Cell) -> bool:
        return self.control is not None and cell[self.control.path] == self.control.label


def load_study(folder: Path) -> Study:
    """Reads the plan and all manifests; no question is read.

    Raises:
        DataError: `study.json` is missing or malformed, or two complete trials share a cell and a seed.
    """
    if not (folder / "study.json").is_file():
        raise DataError(f"{str(folder)!r} holds no study; wanted a folder that `chiasm sweep` wrote into")
    plan = _read_object(folder / "study.json")
    levels = dict(plan.get("factors") or {})
    # a range of numbers has no levels but those that trials have
    factors = {
        str(path): [_text(label) for label in labels] if isinstance(labels, list) else []
        for path, labels in levels.items()
    }
    found = sorted(path for path in (folder / "trials").glob("*") if path.is_dir())
    listed = dict(plan.get("trials") or {})
    every = tuple(
        _read_trial(path, factors, listed.get(path.name) or {}) for path in found if path.name in listed or not listed
    )
    fidelity = _fidelity(plan, every)
    trials = tuple(trial for trial in every if trial.fidelity in (fidelity, None))
    for trial in trials:
        # A level that the plan does not list is still a level: later plans may have dropped it.
        for path, label in trial.cell.items():
            if label not in factors[path]:
                factors[path].append(label)
    _require_unique(trials)
    control = plan.get("control")
    if control is not None and (
        control.get("path") not in factors or _text(control.get("label")) not in factors[control["path"]]
    ):
        raise DataError(f"{folder / 'study.json'}: the control {control} is not a level of a factor of the study")
    seeds = tuple(int(seed) for seed in plan.get("seeds") or ())
    design = str(plan.get("design", "grid"))
    return Study(
        folder=folder,
        name=str(plan.get("name") or folder.name),
        question=str(plan.get("question") or ""),
        factors={path: tuple(labels) for path, labels in factors.items()},
        seeds=seeds,
        design=design,
        control=None if control is None else Control(control["path"], _text(control["label"])),
        planned=_planned(plan, design, seeds, fidelity),
        trials=trials,
        fidelity=fidelity,
        fidelities=tuple(plan.get("fidelities") or ()),
    )


def _fidelity(plan: Mapping[str, Any], trials: tuple[Trial, ...]) -> str | None:
    """The most expensive fidelity at which a trial is complete: results of different ones are never mixed."""
    names = list(plan.get("fidelities") or ())
    reached = [name for name in names if any(trial.fidelity == name for trial in trials if trial.status == "complete")]
    return reached[-1] if reached else names[0] if names else None


def _planned(plan: Mapping[str, Any], design: str, seeds: tuple[int, ...], fidelity: str | None) -> int | None:
    if len(plan.get("fidelities") or ()) > 1:  # how many go on is known only when they do
        return [about.get("fidelity") for about in dict(plan.get("trials") or {}).values()].count(fidelity)
    if isinstance(plan.get("planned"), int):
        return int(plan["planned"])
    if design != "grid" or not seeds:
        return None
    size = len(seeds)
    for labels in dict(plan.get("factors") or {}).values():
        size *= len(labels)
    return size


def _read_trial(folder: Path, factors: dict[str, list[str]], about: Mapping[str, Any]) -> Trial:
    """A trial; `failed` with the reason where its files cannot be used, so that one defect never hides the rest.

    Args:
        folder: of the trial.
        factors: of the study.
        about: what the plan says of it: its levels as they are called now, and its fidelity.
    """
    path, fidelity = folder / "manifest.json", about.get("fidelity")
    if not path.is_file():
        return Trial(folder.name, folder, {}, -1, "unfinished", fidelity=fidelity)
    try:
        manifest = _read_object(path)
        if about.get("levels"):
            manifest = manifest | {"cell": about["levels"]}
        return _parse_trial(folder, manifest, factors, fidelity)
    except (DataError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"manifest.json cannot be used: {error!r}"
        return Trial(folder.name, folder, {}, -1, "failed", reason, fidelity=fidelity)


def _parse_trial(
    folder: Path, manifest: Mapping[str, Any], factors: Mapping[str, list[str]], fidelity: str | None
) -> Trial:
    cell = {str(key): _text(label) for key, label in manifest["cell"].items()}
    status, error = manifest["status"], manifest.get("error")
    if set(cell) != set(factors):
        status, error, cell = "failed", f"its cell names the factors {sorted(cell)}, the study {sorted(factors)}", {}
    elif status == "complete" and not (folder / "questions.parquet").is_file():
        status, error = "failed", "questions.parquet is missing"
    parameters = manifest.get("parameters") or {}
    return Trial(
        id=str(manifest.get("trial") or folder.name),
        folder=folder,
        cell={path: cell[path] for path in factors if path in cell},
        seed=int(manifest["seed"]),
        status=_STATUS.get(status, "unfinished"),
        error=None if error is None else str(error),
        visual_tokens=manifest.get("visual_tokens"),
        trained=parameters.get("trained"),
        frozen=parameters.get("frozen"),
        seconds={str(key): float(value) for key, value in (manifest.get("seconds") or {}).items() if value is not None},
        environment=dict(manifest.get("environment") or {}),
        fidelity=fidelity,
    )


def _require_unique(trials: tuple[Trial, ...]) -> None:
    owner: dict[tuple[tuple[tuple[str, str], ...], int], str] = {}
    for trial in trials:
        if trial.status == "complete":
            name = trial.folder.name
            first = owner.setdefault((tuple(trial.cell.items()), trial.seed), name)
            if first != name:
                raise DataError(
                    f"trials {first} and {name} are both complete for the same cell and seed {trial.seed}; "
                    "remove the folder of one of them"
                )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds {type(value).__name__}, expected an object")
    return value


def _text(label: object) -> str:
    return label if isinstance(label, str) else json.dumps(label, sort_keys=True)
