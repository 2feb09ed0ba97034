"""Optuna's record of a study: its trials, the state of each, what came out, and which driver holds it.

There is one Optuna study for each fidelity. Its parameters are the factors; seeds are repetitions and none of them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from chiasm.errors import ConfigError
from chiasm_experiments.study.cells import BASE, Trial, fidelities
from chiasm_experiments.study.config import Study, StudyConfig
from chiasm_experiments.study.folder import TRIALS
from chiasm_experiments.study.objective import directions
from chiasm_experiments.study.presence import Presence, ProcessLock

TRIAL, SEED, FIDELITY, LEVELS, CELL = "trial", "seed", "fidelity", "levels", "cell"
HELD, COST = "held", "cost_hours"
SKIPPED, REPEATED, WARM, ADDED, ERROR, RUNGS = "skipped", "repeated", "warm_start", "added", "error", "rungs"
"""User attributes of Optuna's trials."""
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
OPEN = (TrialState.WAITING, TrialState.RUNNING)
OWNER, SPENT = "chiasm_folder", "spent_hours"
"""User attributes of Optuna's studies: which folder's record they are, and what trials cost that they hold no more."""


def distributions(config: StudyConfig) -> dict[str, BaseDistribution]:
    """Each factor as Optuna's distribution; in listed designs the base run's own value is a choice of each."""
    extra = () if config.design == "search" else (BASE,)
    found: dict[str, BaseDistribution] = {
        path: CategoricalDistribution((*levels, *(label for label in extra if label not in levels)))
        for path, levels in config.varied.items()
    }
    for path, numbers in config.ranges.items():
        kind = IntDistribution if numbers.whole else FloatDistribution
        found[path] = kind(numbers.low, numbers.high, log=numbers.log)
    return {path: found[path] for path in config.factors}


def content_of(name: str) -> str:
    """The end of a trial's name, which tells what was run: equal for equal runs, whatever their cells are called."""
    return name.rpartition("-")[2]


class Record:
    """The trials of a study in its newest revision.

    Args:
        study: as its file has it now.
        folder: of the study.
        storage: of Optuna's studies.
        lock: held while trials are added, taken or taken over.
        presence: of this driver among others.
        owner: tells this folder's record from another's in the same database.
        revision: Optuna keeps the choices of a parameter for ever, so a study whose factors change gets another.

    Raises:
        ConfigError: the database holds a study of this name for another folder.
    """

    def __init__(
        self,
        study: Study,
        folder: Path,
        storage: BaseStorage,
        lock: ProcessLock,
        presence: Presence,
        owner: str,
        revision: int = 1,
    ) -> None:
        self.config = study.config
        self.folder = folder
        self.storage = storage
        self.lock = lock
        self.presence = presence
        self.owner = owner
        self.revision = revision
        self.fidelities = fidelities(study)
        self.distributions = distributions(study.config)
        self.studies = {fidelity: self._open(self._name(fidelity)) for fidelity in self.fidelities}
        self._names = {content_of(path.name): path.name for path in (folder / TRIALS).glob("*") if path.is_dir()}

    def trials(self, fidelity: str | None = None, states: Sequence[TrialState] | None = None) -> list[FrozenTrial]:
        """Those of one fidelity or of all, in the order in which they were added; what was only proposed is left out.

        Args:
            fidelity: None: all of them, from the cheapest.
            states: only those in one of these.
        """
        wanted = self.fidelities if fidelity is None else (fidelity,)
        found = [t for name in wanted for t in self.studies[name].get_trials(deepcopy=False, states=states)]
        return [trial for trial in found if TRIAL in trial.user_attrs]

    def latest(self, fidelity: str | None = None) -> dict[str, FrozenTrial]:
        """By what was run the newest trial of it: one that failed may have been tried again."""
        return {content_of(trial.user_attrs[TRIAL]): trial for trial in self.trials(fidelity)}

    def name_of(self, trial: Trial) -> str:
        """The name of a trial in the folder: that of an earlier one of the same run, whatever its cell was called."""
        return self._names.setdefault(content_of(trial.name), trial.name)

    def add(self, trial: Trial, params: Mapping[str, Any], attributes: Mapping[str, Any] | None = None) -> None:
        """Puts a trial in line. The lock is held, and it was not there.

        Args:
            trial: to run.
            params: its factors as Optuna has them.
            attributes: further ones.
        """
        self.studies[trial.cell.fidelity].add_trial(
            optuna.create_trial(
                state=TrialState.WAITING,
                params=dict(params),
                distributions={path: self.distributions[path] for path in params},
                user_attrs=self.attributes(trial) | dict(attributes or {}),
            )
        )

    def attributes(self, trial: Trial) -> dict[str, Any]:
        """What Optuna is told about a trial beside its parameters."""
        return {
            TRIAL: self.name_of(trial),
            SEED: trial.seed,
            FIDELITY: trial.cell.fidelity,
            CELL: trial.cell.label,
            LEVELS: dict(trial.cell.levels),
        }

    def take(self, waiting: FrozenTrial, units: float) -> optuna.Trial | None:
        """A waiting trial, running and this driver's now; None where another was quicker.

        Args:
            waiting: the trial.
            units: GPUs that it takes, or CPUs where it takes no GPU.
        """
        with self.lock:
            try:
                taken = self.storage.set_trial_state_values(waiting._trial_id, state=TrialState.RUNNING)
            except optuna.exceptions.UpdateFinishedTrialError:
                return None
            if not taken:
                return None
            return self.hold(optuna.Trial(self.studies[waiting.user_attrs[FIDELITY]], waiting._trial_id), units)

    def hold(self, running: optuna.Trial, units: float | None = None) -> optuna.Trial:
        """Notes that a running trial is this driver's from now on; the lock is held, or it was this driver's before.

        Args:
            running: the trial.
            units: GPUs or CPUs that it takes; None: nothing yet, which costs nothing.
        """
        running.set_user_attr(HELD, {"driver": self.presence.id, "since": time.time(), "units": units})
        return running

    def orphans(self) -> list[optuna.Trial]:
        """The running trials whose drivers died, this driver's now. Their time up to then counts as spent."""
        with self.lock:
            found = [
                (study, trial)
                for study in self.studies.values()
                for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
                if not self._held(trial)
            ]
            taken = []
            for study, frozen in found:
                trial = optuna.Trial(study, frozen._trial_id)
                held = trial.user_attrs.get(HELD)
                if held is not None:
                    self._pay(trial, self.presence.seen(held["driver"]))
                taken.append(self.hold(trial))
            self.presence.forget_dead()
            return taken

    def let_go(self, running: optuna.Trial) -> None:
        """Leaves a running trial to whoever comes next."""
        self._pay(running, time.time())
        running.set_user_attr(HELD, None)

    def end(
        self,
        running: optuna.Trial,
        state: TrialState,
        values: Sequence[float] | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        """Tells Optuna how a trial ended; its files are complete before."""
        self._pay(running, time.time())
        for name, value in (attributes or {}).items():
            running.set_user_attr(name, value)
        running.study.tell(running, values, state=state, skip_if_finished=True)

    def others_run(self) -> int:
        """How many trials other living drivers run."""
        running = [t for s in self.studies.values() for t in s.get_trials(deepcopy=False, states=(TrialState.RUNNING,))]
        return sum(self._held(trial) and trial.user_attrs[HELD]["driver"] != self.presence.id for trial in running)

    def ways(self, fidelity: str) -> list[str]:
        """The directions that Optuna's study of a fidelity has."""
        return [direction.name.lower() for direction in self.studies[fidelity].directions]

    def revise(self, copies: Mapping[str, Sequence[FrozenTrial]], spent: float) -> None:
        """Goes over to a new revision.

        Args:
            copies: for each fidelity the trials to begin with, as `optuna.create_trial` makes them.
            spent: what the trials that are not among them cost.
        """
        spent += self.spent_before
        self.revision += 1
        names = {summary.study_name for summary in self.storage.get_all_studies()}
        for name in map(self._name, self.fidelities):
            if name in names:  # an earlier call was killed while it copied
                optuna.delete_study(study_name=name, storage=self.storage)
        self.studies = {fidelity: self._open(self._name(fidelity)) for fidelity in self.fidelities}
        self.studies[self.fidelities[0]].set_user_attr(SPENT, spent)
        for fidelity, study in self.studies.items():
            study.add_trials(copies[fidelity])

    @property
    def spent_before(self) -> float:
        """What trials cost that earlier revisions had and this one has not."""
        return float(self.studies[self.fidelities[0]].user_attrs.get(SPENT, 0.0))

    def _held(self, trial: FrozenTrial) -> bool:
        held = trial.user_attrs.get(HELD)
        return held is not None and (held["driver"] == self.presence.id or self.presence.lives(held["driver"]))

    @staticmethod
    def _pay(running: optuna.Trial, until: float | None) -> None:
        """Adds what a trial took since it was started to what it cost so far.

        Args:
            running: the trial.
            until: seconds of the epoch; None: unknown.
        """
        held = running.user_attrs.get(HELD)
        if held is not None and held["units"] and until is not None:
            hours = held["units"] * max(0.0, until - held["since"]) / 3600
            running.set_user_attr(COST, running.user_attrs.get(COST, 0.0) + hours)

    def _name(self, fidelity: str) -> str:
        words = [self.config.name]
        if len(self.fidelities) > 1:
            words.append(fidelity)
        if self.revision > 1:
            words.append(f"revision {self.revision}")
        return ", ".join(words)

    def _open(self, name: str) -> optuna.Study:
        wanted = directions(self.config.objective)
        study = optuna.create_study(study_name=name, storage=self.storage, directions=wanted, load_if_exists=True)
        owner = study.user_attrs.get(OWNER)
        if owner is None and not study.get_trials(deepcopy=False):
            study.set_user_attr(OWNER, self.owner)
        elif owner != self.owner:
            raise ConfigError(
                f"storage: the database holds a study {name!r} whose results lie in another folder; rename this one, "
                "or give another database"
            )
        return study


def delete_record(storage: BaseStorage, owner: str) -> None:
    """Removes every revision of a folder's record from a storage."""
    for study in storage.get_all_studies():
        if study.user_attrs.get(OWNER) == owner:
            storage.delete_study(study._study_id)
