"""Reads what a study folder says about itself: the plan in `study.json` and the manifest of each trial."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chiasm.errors import DataError
from chiasm_experiments.report.study import Control, Point, Range, Skipped, Status, Study, Trial

_STATUS: dict[str, Status] = {"complete": "complete", "pruned": "pruned", "failed": "failed"}
"""Of a manifest; a run with any other is under way, or waits to be taken up."""


def load_study(folder: Path) -> Study:
    """Reads the plan and all manifests; no question is read.

    Trials that the plan does not list, because an edit took them out, are named and otherwise left alone.

    Raises:
        DataError: `study.json` is missing or malformed, or two complete trials share a cell, a seed and a fidelity.
    """
    file = folder / "study.json"
    if not file.is_file():
        raise DataError(f"{str(folder)!r} holds no study; wanted a folder that `chiasm sweep` wrote into")
    plan = _read_json(file)
    if not isinstance(plan, dict):
        raise DataError(f"{file} holds {type(plan).__name__}, expected an object")
    try:
        return _parse_study(folder, plan)
    except DataError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file} is not as `chiasm sweep` writes it: {error!r}") from error


def _parse_study(folder: Path, plan: Mapping[str, Any]) -> Study:
    written = {str(path): levels for path, levels in dict(plan.get("factors") or {}).items()}
    factors = {path: [_text(label) for label in levels] for path, levels in written.items() if isinstance(levels, list)}
    ranges = {
        path: Range(float(numbers["low"]), float(numbers["high"]), bool(numbers.get("log")))
        for path, numbers in written.items()
        if path not in factors
    }
    listed = dict(plan.get("trials") or {})
    found = sorted(path for path in (folder / "trials").glob("*") if path.is_dir())
    known = [path for path in found if path.name in listed or not listed]
    every = tuple(_read_trial(path, tuple(written), listed.get(path.name) or {}) for path in known)
    for trial in every:
        # A level that the plan does not list is still a level: later plans may have dropped it.
        for path, label in trial.cell.items():
            if path in factors and label not in factors[path]:
                factors[path].append(label)
    _require_unique(every)
    fidelities = tuple(str(name) for name in plan.get("fidelities") or ())
    fidelity = _fidelity(fidelities, every)
    waiting = Counter(str(about.get("fidelity")) for about in listed.values())
    seeds, design = tuple(int(seed) for seed in plan.get("seeds") or ()), str(plan.get("design", "grid"))
    return Study(
        folder=folder,
        name=str(plan.get("name") or folder.name),
        question=str(plan.get("question") or ""),
        factors={path: tuple(labels) for path, labels in factors.items()},
        ranges=ranges,
        paths=tuple(written),
        seeds=seeds,
        design=design,
        control=_control(folder, plan, factors),
        planned=waiting[str(fidelity)] if len(fidelities) > 1 else _planned(plan, design, seeds, len(listed)),
        every=every,
        fidelity=fidelity,
        fidelities=fidelities,
        listed=dict(waiting),
        minimize=_minimize(plan.get("objective")),
        added_seeds=tuple(int(seed) for seed in plan.get("added_seeds") or ()),
        skipped=tuple(map(_skipped, plan.get("skipped") or ())),
        notes=tuple(str(note) for note in plan.get("notes") or ()),
        warm_start={str(name): int(count) for name, count in dict(plan.get("warm_start") or {}).items()},
        outside=tuple(path.name for path in found if path not in known),
    )


def _control(folder: Path, plan: Mapping[str, Any], factors: Mapping[str, list[str]]) -> Control | None:
    control = plan.get("control")
    if control is None:
        return None
    if control.get("path") not in factors or _text(control.get("label")) not in factors[control["path"]]:
        raise DataError(f"{folder / 'study.json'}: the control {control} is not a level of a factor of the study")
    return Control(control["path"], _text(control["label"]))


def _fidelity(names: tuple[str, ...], trials: tuple[Trial, ...]) -> str | None:
    """The most expensive fidelity at which a trial is complete, else the cheapest."""
    reached = {trial.fidelity for trial in trials if trial.status == "complete"}
    return next((name for name in reversed(names) if name in reached), names[0] if names else None)


def _planned(plan: Mapping[str, Any], design: str, seeds: tuple[int, ...], listed: int) -> int | None:
    """How many trials there are to be: what the plan says, at least those that are in line, else the grid's size."""
    if isinstance(plan.get("planned"), int):
        return max(int(plan["planned"]), listed)
    if design != "grid" or not seeds:
        return None
    return len(seeds) * math.prod(len(labels) for labels in dict(plan.get("factors") or {}).values())


def _minimize(objective: Any) -> tuple[str, ...]:
    names = objective.get("minimize") if isinstance(objective, dict) else None
    return tuple(str(name) for name in names or ())


def _skipped(item: Mapping[str, Any]) -> Skipped:
    levels = {str(path): _text(label) for path, label in item["levels"].items()}
    reasons = tuple(str(reason) for reason in item.get("reasons") or ())
    return Skipped(levels, item.get("fidelity"), reasons, str(item.get("by", "plan")))


def _read_trial(folder: Path, paths: tuple[str, ...], about: Mapping[str, Any]) -> Trial:
    """A trial; `failed` with the reason where its files cannot be used, so that one defect never hides the rest.

    Args:
        folder: of the trial.
        paths: of all factors of the study.
        about: what the plan says of it: its levels as they are called now, and its fidelity.
    """
    file, fidelity = folder / "manifest.json", about.get("fidelity")
    if not file.is_file():
        return Trial(folder.name, folder, {}, -1, "unfinished", fidelity=fidelity)
    try:
        manifest = _read_json(file)
        if about.get("levels"):
            manifest = manifest | {"cell": about["levels"]}
        return _parse_trial(folder, manifest, paths, fidelity or manifest.get("fidelity"))
    except (DataError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"manifest.json cannot be used: {error!r}"
        return Trial(folder.name, folder, {}, -1, "failed", reason, fidelity=fidelity)


def _parse_trial(folder: Path, manifest: Mapping[str, Any], paths: tuple[str, ...], fidelity: str | None) -> Trial:
    cell = {str(key): _text(label) for key, label in manifest["cell"].items()}
    status, error = manifest["status"], manifest.get("error")
    if set(cell) != set(paths):
        status, error, cell = "failed", f"its cell names the factors {sorted(cell)}, the study {sorted(paths)}", {}
    elif status == "complete" and not (folder / "questions.parquet").is_file():
        status, error = "failed", "questions.parquet is missing"
    parameters = manifest.get("parameters") or {}
    flops = manifest.get("answer_flops")
    return Trial(
        id=str(manifest.get("trial") or folder.name),
        folder=folder,
        cell={path: cell[path] for path in paths if path in cell},
        seed=int(manifest["seed"]),
        status=_STATUS.get(status, "unfinished"),
        error=None if error is None else str(error),
        visual_tokens=manifest.get("visual_tokens"),
        trained=parameters.get("trained"),
        frozen=parameters.get("frozen"),
        seconds={str(key): float(value) for key, value in (manifest.get("seconds") or {}).items() if value is not None},
        environment=dict(manifest.get("environment") or {}),
        fidelity=fidelity,
        rung=manifest.get("rung"),
        curve=_curve(folder, manifest),
        workers=int(manifest.get("workers") or 1),
        flops=None if flops is None else float(flops),
    )


def _curve(folder: Path, manifest: Mapping[str, Any]) -> tuple[Point, ...]:
    """From the manifest, or from `curve.json` while the trial is under way."""
    points = manifest.get("curve")
    if points is None and (folder / "curve.json").is_file():
        points = _read_json(folder / "curve.json")
    return tuple(
        Point(int(point["rung"]), float(point["share"]), float(point["accuracy"]))
        for point in points or ()
        if point.get("accuracy") is not None
    )


def _require_unique(trials: tuple[Trial, ...]) -> None:
    owner: dict[tuple[object, ...], str] = {}
    for trial in trials:
        if trial.status == "complete":
            name = trial.folder.name
            first = owner.setdefault((tuple(trial.cell.items()), trial.seed, trial.fidelity), name)
            if first != name:
                raise DataError(
                    f"trials {first} and {name} are both complete for the same cell and seed {trial.seed}; "
                    "remove the folder of one of them"
                )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error


def _text(label: object) -> str:
    return label if isinstance(label, str) else json.dumps(label, sort_keys=True)
