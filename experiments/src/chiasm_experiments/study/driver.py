"""The loop of a study: what runs next, what came of it, and when to stop."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from chiasm_experiments.study.budget import exceeded
from chiasm_experiments.study.cells import Trial
from chiasm_experiments.study.folder import STAGES, TRIALS
from chiasm_experiments.study.judge import Judge
from chiasm_experiments.study.keys import Key, make_key
from chiasm_experiments.study.objective import finite, values_of
from chiasm_experiments.study.record import CELL, ERROR, FIDELITY, HELD, RUNGS, TRIAL
from chiasm_experiments.study.sharing import Sharing
from chiasm_experiments.study.signals import Signals
from chiasm_experiments.study.source import Say, Source
from chiasm_experiments.study.state import State
from chiasm_experiments.training.files import MANIFEST, read_json, write_json
from chiasm_experiments.training.run import Job

if TYPE_CHECKING:
    from chiasm_experiments.study.executor import Ended, Pool, Reported

LOOK_SECONDS = 5.0
"""How often it is looked for trials whose drivers died."""
WAIT_SECONDS = 1.0
"""The longest wait for an event, and so for a signal to be heeded."""


@dataclass(slots=True)
class _Running:
    """A trial in the pool."""

    asked: optuna.Trial
    trial: Trial
    attempts: int = 1


class Driver:
    """One call's loop over a study.

    Args:
        state: the study's folder.
        source: says what to run next.
        pool: runs it.
        sharing: knows which stages trials have in common.
        signals: may ask to stop.
        only: part of the labels of the cells to run; None: all.
        say: takes lines for the user.
    """

    def __init__(
        self,
        state: State,
        source: Source,
        pool: Pool,
        sharing: Sharing,
        signals: Signals,
        only: str | None = None,
        say: Say = print,
    ) -> None:
        self.state = state
        self.record = state.record
        self.config = state.record.config
        self.source = source
        self.pool = pool
        self.sharing = sharing
        self.signals = signals
        self.only = only
        self.say = say
        self.judges = {fidelity: Judge(self.record, fidelity) for fidelity in self.record.fidelities}
        self.running: dict[str, _Running] = {}
        self.held: list[optuna.Trial] = []
        """Running in the record, this driver's, and not in the pool: taken over, or proposed and not yet started."""
        self.failures = 0
        self.stopped: str | None = None
        """Why no further trial starts."""
        self._stopping = self._waits = False
        self._looked = float("-inf")
        self._keys: dict[str, Key] = {}

    def run(self) -> None:
        """Until nothing is left to run here or elsewhere, or something stops it."""
        with tqdm(unit="trial", disable=not sys.stderr.isatty()) as bar:
            while True:
                self._heed()
                if self.stopped is None:
                    self._look_for_orphans()
                    self._fill()
                if not self.running and (self.stopped is not None or not self._elsewhere()):
                    break
                for event in self.pool.events(WAIT_SECONDS):
                    self._take(event)
                self._show(bar)
        for asked in self.held:
            self.record.let_go(asked)

    def _heed(self) -> None:
        """Stops what runs where a signal or too many failures ask for it."""
        if self.signals.asked is not None and not self._stopping:
            name = "Ctrl-C" if self.signals.asked.name == "SIGINT" else self.signals.asked.name
            self.stopped = f"stopped by {name}"
            self.say(
                f"{name}: {len(self.running)} running trials write their checkpoints and end"
                + ("; Ctrl-C again ends them at once" if name == "Ctrl-C" else "")
            )
            self._stop()
        elif self.config.max_failures is not None and self.failures >= self.config.max_failures and not self._stopping:
            self.stopped = f"{self.failures} trials failed, which is the limit (max_failures)"
            self.say(f"{self.stopped}; the {len(self.running)} that run write their checkpoints and end")
            self._stop()

    def _stop(self) -> None:
        self._stopping = True
        self.pool.stop()

    def _look_for_orphans(self) -> None:
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._looked = time.monotonic()
            for orphan in self.record.orphans():
                resumed = self.source.resume(orphan)
                if resumed is not None:
                    self.held.append(resumed)

    def _fill(self) -> None:
        """Starts trials while there are places for them."""
        while self.pool.free > 0 and self.stopped is None:
            reason = exceeded(self.config.budget, self.record)
            if reason is not None:
                self.stopped = reason
                self.say(f"{reason}; no further trial starts, and the {len(self.running)} that run are finished")
                return
            asked = self._next()
            if asked is None:
                return
            self._start(asked)

    def _next(self) -> optuna.Trial | None:
        """One that is held, else one that waits, else a new proposal; None where there is nothing now."""
        while True:
            self.source.plan()
            waiting = self._wanted(self.record.trials(states=(TrialState.WAITING,)))
            held = [asked for asked in self.held if self._wanted([asked])]
            candidates: list[tuple[optuna.Trial | FrozenTrial, Trial]] = []
            for candidate in (*held, *waiting):
                trial = self._trial(candidate)
                if trial is not None:
                    candidates.append((candidate, trial))
            if not candidates:
                return None if self.only else self.source.propose()
            chosen = self._choose(candidates)
            if isinstance(chosen, optuna.Trial):
                self.held.remove(chosen)
                return chosen
            trial = self._trial(chosen)
            assert trial is not None
            taken = self.record.take(chosen, self.pool.takes(self._key(chosen.user_attrs[TRIAL], trial)))
            if taken is not None:
                return taken

    def _choose(self, candidates: Sequence[tuple[Any, Trial]]) -> Any:
        """The first whose parts an idle actor holds and which waits for no running one; else the first that waits not.

        Stages that a running trial trains are worth waiting for, so one that needs them comes only when all do.
        """
        running, warm = list(self.running), self.pool.warm()
        if len(candidates) == 1:
            return candidates[0][0]
        free = [item for item in candidates if not self.sharing.would_wait(item[0].user_attrs[TRIAL], running)]
        for candidate, trial in free if warm else ():
            if self._key(candidate.user_attrs[TRIAL], trial).parts in warm:
                return candidate
        return (free or candidates)[0][0]

    def _key(self, name: str, trial: Trial) -> Key:
        if name not in self._keys:
            self._keys[name] = make_key(trial.run, trial.cell.plan)
        return self._keys[name]

    def _wanted(self, trials: Sequence[Any]) -> list[Any]:
        if self.only is None:
            return list(trials)
        return [trial for trial in trials if self.only.lower() in trial.user_attrs[CELL].lower()]

    def _trial(self, asked: optuna.Trial | FrozenTrial) -> Trial | None:
        trial = self.source.trial(asked)
        if trial is not None:
            self.sharing.add(asked.user_attrs[TRIAL], trial)
        return trial

    def _start(self, asked: optuna.Trial) -> None:
        """Runs a trial, or takes the result that it has already."""
        name, trial = asked.user_attrs[TRIAL], self._trial(asked)
        assert trial is not None, "the record holds trials of the study alone"
        self.state.write()
        file = self.record.folder / TRIALS / name / MANIFEST
        manifest = read_json(file) if file.is_file() else {}
        self.running[name] = _Running(asked, trial)
        if manifest.get("status") == "complete" or (manifest.get("status") == "pruned" and self.config.rungs):
            self._end(name, manifest, None)
        elif manifest.get("status") == "failed":
            self._end(name, None, manifest.get("error") or "unknown")
        else:
            self._submit(name)

    def _submit(self, name: str) -> None:
        running = self.running[name]
        trial, config, cost = running.trial, self.config, running.trial.cell.plan.cost
        labels = {
            "trial": name,
            "study": config.name,
            "cell": trial.cell.levels,
            "fidelity": trial.cell.fidelity,
            "seed": trial.seed,
            "answer_flops": None if cost is None else cost.inference,
        }
        folder = self.record.folder / TRIALS / name
        folder.mkdir(parents=True, exist_ok=True)
        values, execution = trial.run.model_dump(mode="json"), self.pool.execution
        shared = None  # a folder that the study names is for all stages
        if execution.stages_folder is None:
            execution = execution.model_copy(update={"stages_folder": self.record.folder / STAGES})
            shared = self.sharing.common(name)
        questions = config.search.rung_questions
        alike = self.sharing.alike(name)
        job = Job(values, str(folder), labels, execution, shared, alike, config.rungs, questions)
        key = self._key(name, trial)
        if running.asked.user_attrs[HELD]["units"] is None:
            self.record.hold(running.asked, self.pool.takes(key))
        self.pool.submit(job, key)

    def _take(self, event: Ended | Reported) -> None:
        from chiasm_experiments.study.executor import Reported

        name = event.trial
        if isinstance(event, Reported):
            running = self.running[name]
            judge = self.judges[running.trial.cell.fidelity]
            self.pool.answer(name, judge.report(running.asked, event.rung, event.share, event.scores))
        elif event.status in ("complete", "pruned"):
            self._end(name, event.manifest, None)
        elif event.status == "stopped" or (event.status == "lost" and self._stopping):
            self.record.let_go(self.running.pop(name).asked)
        elif event.status == "lost" and self.running[name].attempts <= self.config.resources.retries:
            running = self.running[name]
            reason = (event.error or "unknown").strip().splitlines()[0]
            self.say(f"{name}: {reason}; starting it again ({running.attempts} of {self.config.resources.retries})")
            running.attempts += 1
            self._submit(name)
        else:
            self._end(name, None, event.error or "unknown")

    def _end(self, name: str, manifest: dict[str, Any] | None, error: str | None) -> None:
        """Records how a trial ended. Its files are complete before Optuna is told."""
        running = self.running.pop(name)
        asked, trial, folder = running.asked, running.trial, self.record.folder / TRIALS / name
        if manifest is not None and manifest["status"] == "pruned":
            self.record.end(asked, TrialState.PRUNED)
            points = asked.user_attrs.get(RUNGS) or [{}]
            reached = points[-1].get("accuracy")
            self.say(f"{name}: pruned at rung {manifest['rung']}" + (f" with {100 * reached:.1f}" if reached else ""))
            return
        if manifest is not None:
            values = values_of(self.config.objective, manifest, trial.cell.plan, folder)
            if values is not None and finite(values):
                self.record.end(asked, TrialState.COMPLETE, values)
                self.say(f"{name}: accuracy {100 * values[0]:.1f} in {manifest['seconds']['total']:.0f} s")
                return
            error = f"its scores are {manifest['scores']}; name a benchmark in `evaluate`"
        assert error is not None
        self._failed(folder, asked, trial, error)
        self.record.end(asked, TrialState.FAIL, attributes={ERROR: error})
        self.failures += 1
        self.say(f"{name}: failed: {error.strip().splitlines()[-1]}")

    def _failed(self, folder: Any, asked: optuna.Trial, trial: Trial, error: str) -> None:
        file = folder / MANIFEST
        earlier = read_json(file) if file.is_file() else {"run": trial.run.model_dump(mode="json")}
        about = {
            "trial": asked.user_attrs[TRIAL],
            "study": self.config.name,
            "cell": trial.cell.levels,
            "fidelity": asked.user_attrs[FIDELITY],
            "seed": trial.seed,
        }
        write_json(file, earlier | about | {"status": "failed", "error": error})

    def _elsewhere(self) -> bool:
        """Whether other drivers run trials: they may die, and what they find may bring others about."""
        others = self.record.others_run()
        if others and not self._waits:
            self.say(f"{others} trials run under another driver; waiting for them, Ctrl-C leaves them to it")
        self._waits = others > 0
        if self._waits:
            self.pool.rest()  # its actors may be waiting for the places of idle ones here
        return self._waits

    def _show(self, bar: Any) -> None:
        if bar.disable:
            return
        states = [trial.state for trial in self.record.trials()]
        finished = sum(state not in (TrialState.WAITING, TrialState.RUNNING) for state in states)
        bar.total = max(len(states), self.state.planned or 0)
        bar.n = finished
        bar.set_postfix_str("; ".join(f"{k}: {v}" for k, v in self.pool.progress().items())[:160])
