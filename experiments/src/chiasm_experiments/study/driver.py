"""The loop of a study: Optuna holds the trials and their states, Ray runs them, and the folder holds their results."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from chiasm.errors import ChiasmError, ConfigError
from chiasm_experiments.study.cells import BASE, Cell, Trial, levels_of, make_cells, make_trials, refuse_invalid
from chiasm_experiments.study.config import Study
from chiasm_experiments.study.sharing import Sharing
from chiasm_experiments.training.files import MANIFEST, read_json, write_json
from chiasm_experiments.training.run import Job, check_data

STUDY, JOURNAL, TRIALS, STAGES = "study.json", "optuna.journal", "trials", "stages"
RUNS_VARIABLE = "CHIASM_RUNS"
"""Environment variable: the folder of all results."""

Say = Callable[[str], None]


class StudyFailedError(ChiasmError):
    """Trials of a study failed; the others are finished and reported."""


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of a study's trials."""

    folder: Path
    complete: int
    failed: int


def runs_folder() -> Path:
    """Where results go: `$CHIASM_RUNS`, else `runs` here, else in the home folder for a submitted job.

    A job that was submitted with a working directory runs in a temporary copy of it, which is deleted later.
    """
    if folder := os.environ.get(RUNS_VARIABLE):
        return Path(folder).expanduser().absolute()
    here = Path.cwd()
    return Path.home() / "chiasm-runs" if "working_dir_files" in here.parts else here / "runs"


def sweep(path: Path, out: Path | None = None, *, fresh: bool = False, say: Say = print) -> Ended:
    """Runs a study to its end, taking up what an earlier call left.

    Args:
        path: the study's YAML file.
        out: folder of this study's results; None: `runs_folder()/NAME`.
        fresh: delete earlier results of this study first.
        say: takes lines for the user.

    Raises:
        ConfigError: the study, a cell or the folder is wrong; nothing was started.
        DataError: a data set cannot be used; nothing was started.
    """
    study = Study(path)
    cells = make_cells(study)
    refuse_invalid(cells, study)
    check_all_data(cells.cells)
    trials = make_trials(study, cells)
    folder = (out or runs_folder() / study.config.name).absolute()
    if fresh and folder.exists():
        shutil.rmtree(folder)
    _claim(folder, study, trials)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    record = optuna.create_study(
        study_name=study.config.name,
        storage=JournalStorage(JournalFileBackend(str(folder / JOURNAL))),
        direction="maximize",
        load_if_exists=True,
    )
    for trial in trials:
        record.enqueue_trial(trial.params, user_attrs={"trial": trial.name}, skip_if_exists=True)
    if record.get_trials(deepcopy=False, states=(TrialState.WAITING, TrialState.RUNNING)):
        _start_ray(say)
        _Driver(study, record, trials, folder, say).run()
    states = [trial.state for trial in record.get_trials(deepcopy=False)]
    return Ended(folder, states.count(TrialState.COMPLETE), states.count(TrialState.FAIL))


def check_all_data(cells: Sequence[Cell]) -> None:
    """Checks each data set and benchmark of a study once.

    Raises:
        DataError: one is missing, empty or unreadable.
    """
    seen: set[str] = set()
    for cell in cells:
        key = repr([[ref.model_dump() for ref in stage.data] for stage in cell.run.stages] + [cell.run.evaluate])
        if key not in seen:
            seen.add(key)
            check_data(cell.run)


def _claim(folder: Path, study: Study, trials: Sequence[Trial]) -> None:
    """Writes what the study is into its folder, or finds it there unchanged.

    Raises:
        ConfigError: the folder holds another study, or an earlier form of this one.
    """
    config = study.config
    description = {
        "name": config.name,
        "question": config.question,
        "factors": dict(levels_of(study)),
        "seeds": list(config.seeds),
        "design": config.design,
        "control": next(({"path": path, "label": label} for path, label in config.control.items()), None),
        "objective": config.objective.maximize,
        "trials": {trial.name: trial.params for trial in trials},
    }
    file = folder / STUDY
    if file.is_file():
        earlier = read_json(file)
        changed = [key for key in description if description[key] != earlier.get(key)]
        if changed:
            raise ConfigError(
                f"{str(folder)!r} holds an earlier form of study {config.name!r}; changed since: {', '.join(changed)}. "
                "Rename the study to keep both, or pass --fresh to delete the earlier results"
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{str(folder)!r} is not empty and holds no study; choose another folder")
    write_json(file, description)


def _start_ray(say: Say) -> None:
    """Joins the cluster that RAY_ADDRESS names (as in a submitted job), or starts Ray on this machine."""
    # Ray Train's own knob: how soon the end of a run on several workers is noticed; its default costs 5 s a trial
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        say(f"joining the Ray cluster at {os.environ['RAY_ADDRESS']}")
        ray.init(log_to_driver=False, logging_level="warning")
    else:
        say("starting Ray on this machine")
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="warning")


class _Driver:
    """One call's loop over the trials that are still to run."""

    def __init__(self, study: Study, record: optuna.Study, trials: Sequence[Trial], folder: Path, say: Say) -> None:
        from chiasm_experiments.study.executor import Pool

        self.record = record
        self.folder = folder
        self.say = say
        self.by_name = {trial.name: trial for trial in trials}
        self.sharing = Sharing(trials, folder / TRIALS)
        self.pool = Pool(study.config.resources)
        self.retries = study.config.resources.retries
        self.distributions: dict[str, Any] = {
            path: CategoricalDistribution(sorted({*labels, BASE}, key=[*labels, BASE].index))
            for path, labels in levels_of(study)
        } | {"seed": CategoricalDistribution(study.config.seeds)}
        self.asked: dict[str, optuna.Trial] = {}
        self.attempts: dict[str, int] = {}
        # asked for and not started: a driver that was killed leaves such, which are taken up, and not asked for again
        self.waiting = [
            optuna.trial.Trial(record, trial._trial_id)
            for trial in record.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        ]

    def run(self) -> None:
        """Until no trial waits or runs."""
        from tqdm import tqdm

        waiting = len(self.record.get_trials(deepcopy=False, states=(TrialState.WAITING,))) + len(self.waiting)
        self.say(f"{waiting} trials to run, {self.pool.size} at once; results in {self.folder}")
        with tqdm(total=waiting, unit="trial", disable=not sys.stderr.isatty()) as bar:
            try:
                while waiting or self.asked:
                    while waiting and self.pool.free:
                        self._start(self._next())
                        waiting -= 1
                    for outcome in self.pool.wait(1.0):
                        if outcome.lost and self._retry(outcome.trial, outcome.error or ""):
                            continue
                        self._tell(outcome.trial, outcome.manifest, outcome.error)
                        bar.update()
                    if not bar.disable:
                        bar.set_postfix_str("; ".join(f"{k}: {v}" for k, v in self.pool.progress().items())[:160])
            finally:
                self.pool.close()

    def _next(self) -> optuna.Trial:
        """The first trial whose common stages no running one trains just now; else the first of all."""
        running = list(self.asked)
        for place, asked in enumerate(self.waiting):
            if not self.sharing.would_wait(asked.user_attrs["trial"], running):
                return self.waiting.pop(place)
        while self.record.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            asked = self.record.ask(fixed_distributions=self.distributions)
            if not self.sharing.would_wait(asked.user_attrs["trial"], running):
                return asked
            self.waiting.append(asked)
        return self.waiting.pop(0)

    def _start(self, asked: optuna.Trial) -> None:
        trial = self.by_name[asked.user_attrs["trial"]]
        self.asked[trial.name] = asked
        self._submit(trial)

    def _submit(self, trial: Trial) -> None:
        self.attempts[trial.name] = self.attempts.get(trial.name, 0) + 1
        labels = {"trial": trial.name, "study": self.record.study_name, "cell": trial.cell.levels}
        folder = self.folder / TRIALS / trial.name
        folder.mkdir(parents=True, exist_ok=True)
        values, execution = trial.run.model_dump(mode="json"), self.pool.execution
        shared = None  # a folder that the study names is for all stages
        if execution.stages_folder is None:
            execution = execution.model_copy(update={"stages_folder": self.folder / STAGES})
            shared = self.sharing.common[trial.name]
        self.pool.submit(Job(values, str(folder), labels, execution, shared))

    def _retry(self, name: str, error: str) -> bool:
        if self.attempts[name] > self.retries:
            return False
        self.say(f"{name}: {error.splitlines()[0]}; starting it again ({self.attempts[name]} of {self.retries})")
        self._submit(self.by_name[name])
        return True

    def _tell(self, name: str, manifest: dict[str, Any] | None, error: str | None) -> None:
        """Records how a trial ended; its files are complete before Optuna is told."""
        asked, trial = self.asked.pop(name), self.by_name[name]
        if manifest is not None and manifest["scores"]:
            score = sum(manifest["scores"].values()) / len(manifest["scores"])
            self.record.tell(asked, score)
            self.say(f"{name}: accuracy {100 * score:.1f} in {manifest['seconds']['total']:.0f} s")
            return
        error = error or "the run was evaluated on nothing; name a benchmark in `evaluate`"
        file = self.folder / TRIALS / name / MANIFEST
        earlier = read_json(file) if file.is_file() else {}
        failed = {"trial": name, "cell": trial.cell.levels, "seed": trial.seed, "status": "failed", "error": error}
        write_json(file, earlier | failed)
        self.record.tell(asked, state=TrialState.FAIL)
        self.say(f"{name}: failed: {error.strip().splitlines()[-1]}")
