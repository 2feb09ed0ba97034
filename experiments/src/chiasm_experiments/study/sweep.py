"""`chiasm sweep`: from a study's file to the end of its trials."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
from optuna.trial import TrialState

from chiasm.errors import ChiasmError, ConfigError
from chiasm_experiments.folders import new_folder
from chiasm_experiments.study.cells import Cell, Cells, Trial, fidelities, make_cells, make_trials, refuse_invalid
from chiasm_experiments.study.config import Study
from chiasm_experiments.study.driver import Driver
from chiasm_experiments.study.folder import TRIALS, runs_folder
from chiasm_experiments.study.search import Search
from chiasm_experiments.study.sharing import Sharing
from chiasm_experiments.study.signals import listening
from chiasm_experiments.study.source import Listed, Makers, Say
from chiasm_experiments.study.state import State, added_seeds, erase
from chiasm_experiments.training.run import check_data

if TYPE_CHECKING:
    from chiasm_experiments.study.executor import Pool


class ClusterLostError(ChiasmError):
    """The cluster on which a study ran cannot be reached any more."""


@dataclass(frozen=True, slots=True)
class Options:
    """What one call asks for beside the study itself.

    Args:
        fresh: delete earlier results first.
        retry_failed: start the trials that failed again.
        add_seeds: so many more; in a search for the best cells.
        only: part of the labels of the cells to run now; None: all.
    """

    fresh: bool = False
    retry_failed: bool = False
    add_seeds: int = 0
    only: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a study's trials.

    Args:
        folder: of the results.
        complete: trials with a result.
        pruned: those stopped at a rung.
        failed: those with an error.
        left: those that wait, or keep a checkpoint.
        stopped: why the call ended before the study did.
        exit_code: 0, or what a shell expects after a signal.
    """

    folder: Path
    complete: int
    pruned: int
    failed: int
    left: int
    stopped: str | None = None
    exit_code: int = 0


def ray_pool(state: State, say: Say) -> Pool:
    """Where trials run: the nodes of a Ray cluster, all of which have what this one has.

    Raises:
        ConfigError: a node has other versions, or the cluster holds not even one trial.
    """
    start_ray(say)
    from chiasm_experiments.study.executor import Pool
    from chiasm_experiments.study.nodes import check_nodes

    check_nodes()
    record = state.record
    return Pool(record.config.resources, say, f"{record.config.name}-{record.owner}")


def sweep(
    path: Path,
    out: Path | None = None,
    options: Options = Options(),
    say: Say = print,
    open_pool: Callable[[State, Say], Pool] = ray_pool,
) -> Outcome:
    """Runs a study to its end, taking up what an earlier call left, beside other calls that do the same.

    Args:
        path: the study's YAML file.
        out: folder of this study's results; None: `runs_folder()/NAME`.
        options: of this call.
        say: takes lines for the user.
        open_pool: makes what runs trials, if there are any to run.

    Raises:
        ConfigError: the study, a cell, the folder or an option is wrong; nothing was started.
        DataError: a data set cannot be used; nothing was started.
    """
    study = Study(path)
    folder = (out or runs_folder() / study.config.name).absolute()
    added = [] if options.fresh else added_seeds(folder)
    new = _more_seeds([*study.config.seeds, *added], options.add_seeds)
    study.config = study.config.model_copy(update={"seeds": tuple(dict.fromkeys([*study.config.seeds, *added, *new]))})
    every = {fidelity: make_cells(study, Makers.sample, fidelity) for fidelity in fidelities(study)}
    for cells in every.values():
        refuse_invalid(cells, study)
    check_all_data([cell for cells in every.values() for cell in cells.cells])
    notes = [note for cells in every.values() for note in cells.notes]
    for note in notes:
        say(f"note: {note}")
    source, sharing, planned = _source(study, every, folder, say)
    if options.only is not None:
        _require_label(options.only, study, every)
    if options.fresh:
        erase(folder, study.config.storage)
    new_folder(folder)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    skipped = [] if isinstance(source, Search) else [item for cells in every.values() for item in cells.skipped]
    extra = [*added, *new]
    state = State(study, folder, source, skipped=skipped, notes=notes, added=extra, planned=planned, say=say)
    try:
        source.begin(state.record)
        if options.retry_failed:
            say(f"{state.retry_failed()} trials that failed start again")
        if new and isinstance(source, Search):
            source.confirm(new)
        return _drive(state, source, sharing, options, say, open_pool)
    finally:
        state.write()
        state.close()


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


def start_ray(say: Say) -> None:
    """Joins the cluster that RAY_ADDRESS names (as in a submitted job), or starts Ray on this machine."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        say(f"joining the Ray cluster at {os.environ['RAY_ADDRESS']}")
        ray.init(log_to_driver=False, logging_level="warning")
    else:
        say("starting Ray on this machine")
        # a cluster that was killed here may have left its address, for which Ray would wait
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="warning")


def _source(
    study: Study, every: dict[str, Cells], folder: Path, say: Say
) -> tuple[Listed | Search, Sharing, int | None]:
    """What says what to run next, what its trials share, and how many there are to be."""
    trials = folder / TRIALS
    if study.config.design == "search":
        return Search(study, Makers(study), say), Sharing(trials, None), study.config.search.trials
    listed = {fidelity: make_trials(study, cells) for fidelity, cells in every.items()}
    flat: list[Trial] = [trial for own in listed.values() for trial in own]
    return Listed(listed, say), Sharing(trials, flat), len(flat) if len(listed) == 1 else None


def _drive(
    state: State,
    source: Listed | Search,
    sharing: Sharing,
    options: Options,
    say: Say,
    open_pool: Callable[[State, Say], Pool],
) -> Outcome:
    """Runs what there is to run, if there is anything."""
    record = state.record
    source.plan()
    state.write()
    stopped, code = None, 0
    if _something(state, source):
        pool = open_pool(state, say)
        from ray.exceptions import RayError

        with listening() as signals:  # behind ray.init, which takes SIGTERM for itself
            try:
                driver = Driver(state, source, pool, sharing, signals, options.only, say)
                left = len(record.trials(states=(TrialState.WAITING, TrialState.RUNNING)))
                say(f"{left} trials in line, {pool.size} at once; results in {state.folder}")
                driver.run()
            except RayError as error:
                what = " ".join(str(error).split())[:300]
                raise ClusterLostError(
                    f"the Ray cluster is gone or refuses: {what}. Finished trials are kept and the others have their "
                    "checkpoints; give the same command again to go on from there"
                ) from error
            finally:
                with contextlib.suppress(RayError):
                    pool.close()
            stopped, code = driver.stopped, signals.exit_code
    return _outcome(state, stopped, code)


def _something(state: State, source: Listed | Search) -> bool:
    """Whether anything waits, runs, or is still to be proposed."""
    return any(
        study.get_trials(deepcopy=False, states=(TrialState.WAITING, TrialState.RUNNING))
        for study in state.record.studies.values()
    ) or (isinstance(source, Search) and not source.spent)


def _outcome(state: State, stopped: str | None, code: int) -> Outcome:
    states = [trial.state for trial in state.record.latest().values()]
    left = states.count(TrialState.WAITING) + states.count(TrialState.RUNNING)
    return Outcome(
        state.folder,
        states.count(TrialState.COMPLETE),
        states.count(TrialState.PRUNED),
        states.count(TrialState.FAIL),
        left,
        stopped,
        code,
    )


def _more_seeds(seeds: Sequence[int], count: int) -> list[int]:
    return list(range(max(seeds) + 1, max(seeds) + 1 + count))


def _require_label(only: str, study: Study, every: dict[str, Cells]) -> None:
    """Refuses a part of a label that no cell has.

    Raises:
        ConfigError: with all labels.
    """
    if study.config.design == "search":
        raise ConfigError("--only: a search proposes its cells, so none can be chosen; narrow its factors instead")
    labels = list(dict.fromkeys(cell.label for cells in every.values() for cell in cells.cells))
    if not any(only.lower() in label.lower() for label in labels):
        raise ConfigError(f"--only: no cell has {only!r} in its label; labels:\n" + "\n".join(f"  {x}" for x in labels))
