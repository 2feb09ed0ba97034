"""The folder of a study: begun, taken up, or brought to what the study's file says now."""

from __future__ import annotations

import json
import secrets
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from chiasm.errors import ConfigError
from chiasm_experiments.study.cells import BASE, Skipped, Trial, fidelities
from chiasm_experiments.study.config import Study
from chiasm_experiments.study.edits import SETTINGS, changes, some
from chiasm_experiments.study.folder import DRIVERS, LOCK, STUDY, TRIALS
from chiasm_experiments.study.objective import directions, finite, values_of
from chiasm_experiments.study.presence import Presence, ProcessLock
from chiasm_experiments.study.record import (
    ADDED,
    COST,
    FIDELITY,
    FINISHED,
    HELD,
    LEVELS,
    SEED,
    SKIPPED,
    TRIAL,
    WARM,
    Record,
    delete_record,
)
from chiasm_experiments.study.source import Say, Source
from chiasm_experiments.study.storage import open_storage
from chiasm_experiments.training.files import MANIFEST, read_json, write_json


def added_seeds(folder: Path) -> list[int]:
    """The seeds that `--add-seeds` gave a study beside those of its file."""
    file = folder / STUDY
    return list(read_json(file).get("added_seeds") or []) if file.is_file() else []


def erase(folder: Path, url: str | None) -> None:
    """Deletes the results of a study, and its record where a database holds that.

    Raises:
        ConfigError: the folder holds something else, or a driver works on it.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    earlier = _read(folder) or {}
    with ProcessLock(folder / LOCK):
        presence = Presence(folder)
        others = presence.others()
        presence.close()
        if others:
            raise ConfigError(f"another driver ({others[0]}) works on {str(folder)!r}; stop it before --fresh")
        if url is not None and "id" in earlier:
            delete_record(open_storage(url, folder), earlier["id"])
        shutil.rmtree(folder)


class State:
    """The opened folder of a study. To be closed.

    Args:
        study: as its file has it, with the seeds that were added.
        folder: of its results; made where it is missing.
        source: knows its trials.
        skipped: the cells that it leaves out.
        notes: what its plan says that must not be silent.
        added: seeds that were added to those of its file.
        planned: how many trials there are to be; None: unknown.
        say: takes lines for the user.

    Raises:
        ConfigError: the folder or the database holds something else, or another driver works on an earlier form.
    """

    def __init__(
        self,
        study: Study,
        folder: Path,
        source: Source,
        *,
        skipped: Sequence[Skipped] = (),
        notes: Sequence[str] = (),
        added: Sequence[int] = (),
        planned: int | None = None,
        say: Say = print,
    ) -> None:
        self.study = study
        self.folder = folder
        self.source = source
        self.skipped = [asdict(item) for item in skipped]
        self.notes = list(notes)
        self.added = list(added)
        self.planned = planned
        self.say = say
        self._written: tuple[int, int, int] | None = None
        self._read()
        folder.mkdir(parents=True, exist_ok=True)
        with ProcessLock(folder / LOCK) as lock:
            earlier = self._read()  # another driver may have begun it just now
            self.presence = Presence(folder)
            try:
                self.owner = earlier["id"] if earlier else secrets.token_hex(8)
                if earlier is None:  # a call that is killed from here on leaves a folder that the next one knows
                    write_json(folder / STUDY, self._description(1, {}, []))
                revision = earlier["revision"] if earlier else 1
                storage = open_storage(study.config.storage, folder)
                self.record = Record(study, folder, storage, lock, self.presence, self.owner, revision)
                if earlier is not None:
                    self._edit(earlier)
                self.write()
            except BaseException:
                self.presence.close()
                raise

    def close(self) -> None:
        """Says goodbye to other drivers."""
        self.presence.close()

    def write(self) -> None:
        """Writes study.json as the record stands."""
        proposed, known = self._proposed_and_skipped(), self.record.trials()
        stands = (self.record.revision, len(known), len(proposed))
        if stands == self._written:
            return
        self._written = stands
        with self.record.lock:
            trials = {
                trial.user_attrs[TRIAL]: {name: trial.user_attrs[name] for name in (LEVELS, SEED, FIDELITY)}
                for trial in self.record.trials()
            }
            description = self._description(self.record.revision, trials, self._proposed_and_skipped())
            description["warm_start"] = self._warm_start()
            file = self.folder / STUDY
            if not file.is_file() or read_json(file) != description:
                write_json(file, description)

    def retry_failed(self) -> int:
        """Puts the trials that failed in line again; how many. They go on from their last checkpoints."""
        with self.record.lock:
            failed = [trial for trial in self.record.latest().values() if trial.state == TrialState.FAIL]
            for frozen in failed:
                trial = self.source.trial(frozen)
                assert trial is not None, "the record holds trials of the study alone"
                file = self.folder / TRIALS / frozen.user_attrs[TRIAL] / MANIFEST
                if file.is_file():  # else it would be taken for the end of this attempt
                    write_json(file, read_json(file) | {"status": "running", "error": None})
                kept = {ADDED: True} if ADDED in frozen.user_attrs else {}
                self.record.add(trial, frozen.params, kept)
        return len(failed)

    def _edit(self, earlier: Mapping[str, Any]) -> None:
        """Brings the record to what the study is now, and says what changed."""
        record, objective = self.record, self.study.config.objective
        told = list(changes(earlier, self._description(record.revision, {}, [])))
        trials = record.trials()
        invalid = [trial for trial in trials if self.source.trial(trial) is None]
        unfit = any(not self._fits(trial) for trial in trials if trial not in invalid)
        turned = any(record.ways(fidelity) != directions(objective) for fidelity in record.fidelities)
        others = self.presence.others()
        if others and (invalid or unfit or turned or any(not line.startswith(SETTINGS) for line in told)):
            raise ConfigError(
                f"another driver ({others[0]}) works on study {self.study.config.name!r} as it was before: "
                f"{'; '.join(told) or 'it has other trials now'}. Stop it first (Ctrl-C there), or undo the change"
            )
        for line in told:
            self.say(f"changed since the last call: {line}")
        gone = [trial.user_attrs[TRIAL] for trial in invalid if trial.state in FINISHED]
        if gone:
            self.say(f"no longer part of the study, {len(gone)} finished trials stay on disk: {some(gone)}")
        if invalid or unfit or turned:
            finished = sum(trial.state in FINISHED for trial in trials)
            copies = {fidelity: self._copies(fidelity) for fidelity in record.fidelities}
            record.revise(copies, sum(trial.user_attrs.get(COST, 0.0) for trial in invalid))
            self.say(f"revision {record.revision} keeps {finished - len(gone)} of {finished} finished trials")

    def _copies(self, fidelity: str) -> list[FrozenTrial]:
        """What is still valid of one fidelity, as the new revision has it."""
        record, copies = self.record, []
        several = bool(self.study.config.objective.minimize)
        for frozen in record.trials(fidelity):
            trial = self.source.trial(frozen)
            if trial is None:
                continue
            attributes = {name: value for name, value in frozen.user_attrs.items() if name != HELD}
            attributes |= record.attributes(trial)
            state, values = frozen.state, frozen.values
            if state == TrialState.RUNNING:  # its driver is gone; it goes on from its checkpoint
                state = TrialState.WAITING
            if state == TrialState.COMPLETE:
                values = self._values(trial, attributes[TRIAL])
                if values is None:  # its files are gone
                    continue
            params = self.source.params(trial)
            copies.append(
                optuna.create_trial(
                    state=state,
                    values=None if state != TrialState.COMPLETE else values,
                    params=params,
                    distributions={path: record.distributions[path] for path in params},
                    user_attrs=attributes,
                    intermediate_values={} if several else frozen.intermediate_values,
                )
            )
        return copies

    def _values(self, trial: Trial, name: str) -> list[float] | None:
        folder = self.folder / TRIALS / name
        if not (folder / MANIFEST).is_file():
            return None
        values = values_of(self.study.config.objective, read_json(folder / MANIFEST), trial.cell.plan, folder)
        return values if finite(values) else None

    def _fits(self, frozen: FrozenTrial) -> bool:
        """Whether a trial stands in the record as it would be added now."""
        trial = self.source.trial(frozen)
        assert trial is not None
        params = self.source.params(trial)
        wanted = {path: self.record.distributions[path] for path in params}
        return bool(frozen.params == params and frozen.distributions == wanted)

    def _proposed_and_skipped(self) -> list[dict[str, Any]]:
        """What a search proposed that is no cell."""
        first = self.record.fidelities[0]
        return [
            {"levels": trial.user_attrs[LEVELS], "fidelity": first, "reasons": trial.user_attrs[SKIPPED], "by": "plan"}
            for trial in self.record.studies[first].get_trials(deepcopy=False)
            if SKIPPED in trial.user_attrs
        ]

    def _warm_start(self) -> dict[str, int]:
        """How many trials of each earlier study a search began with."""
        trials = self.record.studies[self.record.fidelities[0]].get_trials(deepcopy=False)
        return dict(Counter(trial.user_attrs[WARM].partition("/")[0] for trial in trials if WARM in trial.user_attrs))

    def _description(
        self, revision: int, trials: Mapping[str, Mapping[str, Any]], proposed: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        config = self.study.config
        factors: dict[str, Any] = {path: list(levels) for path, levels in config.varied.items()}
        for about in trials.values():
            for path, label in about[LEVELS].items():
                if label == BASE and path in factors and BASE not in factors[path]:
                    factors[path].append(BASE)
        factors |= {path: numbers.model_dump(mode="json") for path, numbers in config.ranges.items()}
        return {
            "name": config.name,
            "question": config.question,
            "design": config.design,
            "factors": {path: factors[path] for path in config.factors},
            "seeds": list(config.seeds),
            "added_seeds": self.added,
            "control": next(({"path": path, "label": label} for path, label in config.control.items()), None),
            "objective": config.objective.model_dump(mode="json"),
            "fidelities": list(fidelities(self.study)),
            "planned": self.planned,
            "skipped": json.loads(json.dumps([*self.skipped, *proposed])),
            "notes": self.notes,
            "trials": dict(trials),
            "revision": revision,
            "id": self.owner,
            "config": config.model_dump(mode="json"),
        }

    def _read(self) -> dict[str, Any] | None:
        earlier = _read(self.folder)
        if earlier is not None and "id" not in earlier:
            raise ConfigError(
                f"{str(self.folder)!r} holds a study of an earlier version of chiasm; choose another folder, or pass "
                "--fresh to delete its results"
            )
        if earlier is not None and earlier["name"] != self.study.config.name:
            raise ConfigError(
                f"{str(self.folder)!r} holds study {earlier['name']!r}, not {self.study.config.name!r}; choose another "
                "folder, or pass --fresh to delete its results"
            )
        return earlier


def _read(folder: Path) -> dict[str, Any] | None:
    """What study.json says; None where a study is to be begun.

    Raises:
        ConfigError: the folder holds something else.
    """
    if (folder / STUDY).is_file():
        earlier: dict[str, Any] = read_json(folder / STUDY)
        return earlier
    # a call that begins it just now, or was killed while it did, has left no more than these
    begun = (LOCK, DRIVERS, STUDY, f".{STUDY}")
    if folder.is_dir() and not all(path.name.startswith(begun) for path in folder.iterdir()):
        raise ConfigError(f"{str(folder)!r} is not empty and holds no study; choose another folder")
    return None
