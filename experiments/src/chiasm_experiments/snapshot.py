"""A study as its folder shows it at one moment: read from its files alone, beside any driver, on any machine.

Files that are missing or half written are taken for what they are: not yet there.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from chiasm.errors import ChiasmError, ConfigError
from chiasm_experiments.report.pairing import Runs, cell_interval
from chiasm_experiments.report.statistics import Interval
from chiasm_experiments.study.folder import STUDY, TRIALS
from chiasm_experiments.training.files import CURVE, MANIFEST, METRICS, QUESTIONS

State = Literal["complete", "running", "pruned", "failed", "waiting"]
STATES: tuple[State, ...] = ("complete", "running", "pruned", "failed", "waiting")
_OF_OPTUNA: dict[str, State] = {
    "COMPLETE": "complete",
    "RUNNING": "running",
    "PRUNED": "pruned",
    "FAIL": "failed",
    "WAITING": "waiting",
}
_OF_MANIFEST: dict[str, State] = {"complete": "complete", "running": "running", "pruned": "pruned", "failed": "failed"}
TAIL_BYTES = 2**16
"""Of a log that are read: its last steps."""
RECENT = 20
"""Steps whose mean time is the rate."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a running trial is, by the last line of its log.

    Args:
        stage: that it trains.
        step: done.
        steps: of the stage; None: not known.
        loss: of the step.
        steps_per_second: mean of the last steps.
        seconds_left: of the stage; None: not known.
        quiet_seconds: since the log was written.
        rung: the last at which it was asked questions, with its accuracy; None: at none.
    """

    stage: str
    step: int
    steps: int | None
    loss: float
    steps_per_second: float | None
    seconds_left: float | None
    quiet_seconds: float
    rung: tuple[int, float] | None


@dataclass(frozen=True, slots=True)
class TrialState:
    """One trial.

    Args:
        cell: its levels, empty where nothing tells them.
        error: the last line of what went wrong; of a failed trial.
        accuracy: mean over benchmarks; of a complete one.
        hours: GPUs, or CPUs where it had none, times hours so far.
    """

    name: str
    state: State
    cell: Mapping[str, str]
    label: str
    seed: int | None
    fidelity: str
    error: str | None = None
    accuracy: float | None = None
    hours: float = 0.0
    on_gpu: bool = False
    progress: Progress | None = None


@dataclass(frozen=True, slots=True)
class CellScore:
    """What the complete trials of one cell came to.

    Args:
        accuracy: mean over benchmarks and seeds.
        benchmarks: for each its accuracy with a 95% interval over images and seeds; None where there can be none.
    """

    label: str
    fidelity: str
    seeds: int
    accuracy: float
    benchmarks: Mapping[str, Interval | None]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A study at one moment."""

    folder: Path
    name: str
    question: str
    trials: tuple[TrialState, ...]
    cells: tuple[CellScore, ...]
    """The best first; those at the whole fidelity before those of cheaper ones."""
    budget: Mapping[str, float | None] = field(default_factory=dict)
    """As the study has it: `gpu_hours`, `money`, `price_per_gpu_hour`."""
    notes: tuple[str, ...] = ()
    """What could not be read."""

    @property
    def counts(self) -> dict[State, int]:
        """Trials in each state, in the order of `STATES`."""
        found = Counter(trial.state for trial in self.trials)
        return {state: found[state] for state in STATES if found[state]}

    def of(self, state: State) -> list[TrialState]:
        """The trials in a state."""
        return [trial for trial in self.trials if trial.state == state]

    def values(self) -> dict[str, Any]:
        """As plain values."""
        hours = {"gpu": sum(t.hours for t in self.trials if t.on_gpu)}
        hours["cpu"] = sum(t.hours for t in self.trials if not t.on_gpu)
        return {
            "folder": str(self.folder),
            "name": self.name,
            "question": self.question,
            "counts": self.counts,
            "hours": hours,
            "budget": dict(self.budget),
            "trials": [asdict(trial) for trial in self.trials],
            "cells": [asdict(cell) for cell in self.cells],
            "notes": list(self.notes),
        }


def look(folder: Path, storage: str | None = None) -> Snapshot:
    """Reads a study's folder.

    Args:
        folder: of the study.
        storage: URL of the database with Optuna's record; None: the journal in the folder.

    Raises:
        ConfigError: it holds no study.
    """
    plan = _read(folder / STUDY)
    if not isinstance(plan, dict):
        raise ConfigError(f"{str(folder)!r} holds no study: {STUDY} is missing or unreadable")
    notes: list[str] = []
    config = plan.get("config") or {}
    recorded: dict[str, Any] = {}
    try:
        recorded = _recorded(folder, storage or config.get("storage"), plan)
    except Exception as error:  # of Optuna, its database or a journal of another form: files still tell a lot
        notes.append(f"Optuna's record cannot be read, so states are those of the manifests: {error}")
    planned = plan.get("trials") or {}
    names = list(dict.fromkeys([*planned, *recorded]))  # other folders are of trials that were edited away
    fidelities = [str(name) for name in plan.get("fidelities") or ()]
    labels = _Labels(plan.get("factors") or {})
    trials = tuple(_trial(folder / TRIALS / name, planned.get(name), recorded.get(name), labels) for name in names)
    cells = _cells(folder, trials, fidelities)
    question, budget = str(plan.get("question") or ""), config.get("budget") or {}
    return Snapshot(folder, str(plan.get("name")), question, trials, cells, budget, tuple(notes))


@dataclass(frozen=True, slots=True)
class _Labels:
    """Names of cells: the levels of factors that vary."""

    factors: Mapping[str, Any]

    def of(self, cell: Mapping[str, str]) -> str:
        varied = [path for path in cell if not isinstance(self.factors.get(path), list) or len(self.factors[path]) > 1]
        last = Counter(path.rpartition(".")[2] for path in varied)
        short = {path: path.rpartition(".")[2] if last[path.rpartition(".")[2]] == 1 else path for path in varied}
        return ", ".join(f"{short[path]}={cell[path]}" for path in varied) or "the only cell"


def _recorded(folder: Path, storage: str | None, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Optuna's newest trial of each name, in the newest revision of the study."""
    from chiasm_experiments.study.folder import JOURNAL
    from chiasm_experiments.study.record import OWNER, TRIAL
    from chiasm_experiments.study.storage import open_storage

    if storage is None and not (folder / JOURNAL).is_file():  # Optuna would make it
        return {}
    opened = open_storage(storage, folder)
    revision = plan.get("revision", 1)
    found: dict[str, Any] = {}
    for study in opened.get_all_studies():
        last = study.study_name.rpartition(", ")[2]
        newest = last == f"revision {revision}" if revision > 1 else not last.startswith("revision ")
        if study.user_attrs.get(OWNER) != plan.get("id") or last == "rungs" or not newest:
            continue
        for trial in opened.get_all_trials(study._study_id, deepcopy=False):
            if TRIAL in trial.user_attrs:
                found[trial.user_attrs[TRIAL]] = trial
    return found


def _trial(folder: Path, planned: Any, recorded: Any, labels: _Labels) -> TrialState:
    manifest = _read(folder / MANIFEST) or {}
    attributes = recorded.user_attrs if recorded is not None else {}
    known = planned if isinstance(planned, dict) else {}
    cell = attributes.get("levels") or known.get("levels") or manifest.get("cell") or {}
    seed = next((item["seed"] for item in (attributes, known, manifest) if item.get("seed") is not None), None)
    fidelity = attributes.get("fidelity") or known.get("fidelity") or manifest.get("fidelity") or "full"
    of_manifest = _OF_MANIFEST.get(manifest.get("status", ""), "waiting")
    state = of_manifest if recorded is None else _OF_OPTUNA[recorded.state.name]
    if state == "complete" and of_manifest != "complete":
        state = of_manifest  # its files are gone
    scores = [score for score in (manifest.get("scores") or {}).values() if score is not None]
    error = attributes.get("error") or manifest.get("error") or "no reason was kept"
    hours = attributes.get("cost_hours")
    if hours is None:
        hours = manifest.get("workers", 1) * (manifest.get("seconds") or {}).get("total", 0.0) / 3600
    return TrialState(
        name=folder.name,
        state=state,
        cell=cell,
        label=labels.of(cell),
        seed=seed,
        fidelity=str(fidelity),
        error=str(error).strip().splitlines()[-1] if state == "failed" else None,
        accuracy=sum(scores) / len(scores) if scores and state == "complete" else None,
        hours=float(hours),
        on_gpu=bool((manifest.get("environment") or {}).get("gpu")),
        progress=_progress(folder, manifest) if state == "running" else None,
    )


def _progress(folder: Path, manifest: Mapping[str, Any]) -> Progress | None:
    lines, written = _tail(folder / METRICS)
    if not lines:
        return None
    last = lines[-1]
    stage = str(last["stage"])
    recent = [line for line in lines if line["stage"] == stage][-RECENT:]
    times = [line["step_seconds"] for line in recent if "step_seconds" in line]
    rate = len(times) / sum(times) if times and sum(times) > 0 else None
    steps = (manifest.get("steps") or {}).get(stage) or _set_steps(manifest, stage)
    left = (steps - last["step"]) / rate if steps is not None and rate else None
    curve = _read(folder / CURVE) or []
    rung = (curve[-1]["rung"], curve[-1]["accuracy"]) if curve and curve[-1].get("accuracy") is not None else None
    return Progress(stage, last["step"], steps, last["loss"], rate, left, max(0.0, time.time() - written), rung)


def _set_steps(manifest: Mapping[str, Any], stage: str) -> int | None:
    stages = (manifest.get("run") or {}).get("stages") or []
    return next((item.get("steps") for item in stages if item.get("name") == stage), None)


def _cells(folder: Path, trials: Sequence[TrialState], fidelities: Sequence[str]) -> tuple[CellScore, ...]:
    groups: dict[tuple[str, str], list[TrialState]] = {}
    for trial in trials:
        if trial.accuracy is not None:
            groups.setdefault((trial.fidelity, json.dumps(trial.cell, sort_keys=True)), []).append(trial)
    found = []
    for (fidelity, _), group in groups.items():
        accuracy = sum(trial.accuracy for trial in group if trial.accuracy is not None) / len(group)
        intervals = _intervals([folder / TRIALS / trial.name / QUESTIONS for trial in group])
        found.append(CellScore(group[0].label, fidelity, len({t.seed for t in group}), accuracy, intervals))
    order = {name: place for place, name in enumerate(fidelities)}
    return tuple(sorted(found, key=lambda cell: (-order.get(cell.fidelity, 0), -cell.accuracy)))


def _intervals(files: Sequence[Path]) -> dict[str, Interval | None]:
    """For each benchmark the accuracy of a cell's trials, each of which has another seed."""
    try:
        tables = [_scores(str(file), file.stat().st_mtime_ns) for file in files]
    except (OSError, ValueError, KeyError):  # removed, or being replaced
        return {}
    found: dict[str, Interval | None] = {}
    for name in sorted(set(tables[0].index.get_level_values("benchmark"))):
        joined = pd.concat([table.xs(name, level="benchmark") for table in tables], axis=1, join="inner")
        keys = tuple(("cell", seed) for seed in range(len(tables)))
        clusters = joined["cluster"].to_numpy()
        clusters = clusters if clusters.ndim == 1 else clusters[:, 0]
        scores = joined["score"].to_numpy(dtype=np.float64).reshape(len(joined), -1).T
        try:
            found[name] = cell_interval(Runs(keys, joined.index.to_numpy(dtype=object), clusters, scores, name))
        except ChiasmError:  # no question was scored by all
            found[name] = None
    return found


@lru_cache(maxsize=4096)
def _scores(file: str, changed: int) -> pd.DataFrame:
    """The scores of one trial's questions, which stay as they are."""
    rows = pd.read_parquet(file, columns=["benchmark", "split", "question_id", "cluster", "score"])
    return rows.set_index(["benchmark", "split", "question_id"])


def _read(path: Path) -> Any:
    """A JSON file, None where it is not there or not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _tail(path: Path) -> tuple[list[dict[str, Any]], float]:
    """The last whole lines of a log, and when it was written, in seconds of the epoch."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            start = max(0, size - TAIL_BYTES)
            file.seek(start)
            lines = file.read().splitlines()[1 if start else 0 :]
            return list(_parsed(lines)), os.fstat(file.fileno()).st_mtime
    except OSError:
        return [], 0.0


def _parsed(lines: Sequence[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and {"stage", "step", "loss"} <= values.keys():
            yield values
