"""Which trials are pruned at their rungs: Optuna's pruners, asked about what the trials reported."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, WilcoxonPruner
from optuna.trial import FrozenTrial, TrialState

from chiasm_experiments.study.config import StudyConfig
from chiasm_experiments.study.record import REPEATED, RUNGS, WARM, Record


class Judge:
    """Answers the trials of one fidelity at their rungs.

    Optuna's pruners know one objective and one number for each step. So they are shown the record as they want it: a
    study in memory with accuracy alone, in which a step is a rung, or for a test over questions a question. What a
    trial reported and what it was answered stands with it in the record, so that it is never judged twice.

    Args:
        record: of the study.
        fidelity: whose trials are compared with each other.
    """

    def __init__(self, record: Record, fidelity: str) -> None:
        self.record = record
        self.study = record.studies[fidelity]
        self.config = record.config
        self.pruner = make_pruner(self.config)
        self.base = rung_base(self.config.rungs)

    def report(self, running: optuna.Trial, rung: int, share: float, scores: Sequence[float | None]) -> bool:
        """Whether a trial goes on after a rung. Asked again about the same rung it says the same.

        Args:
            running: the trial in the record.
            rung: counted from 0.
            share: of the last stage's steps that are done.
            scores: of the questions asked there, the same in every trial; None: not scored.
        """
        entries: list[dict[str, Any]] = list(running.user_attrs.get(RUNGS, ()))
        for entry in entries:
            if entry["rung"] == rung:
                return bool(entry["go_on"])
        known = [score for score in scores if score is not None]
        accuracy = sum(known) / len(known) if known else None
        entry = {"rung": rung, "share": share, "accuracy": accuracy, "go_on": True}
        if isinstance(self.pruner, WilcoxonPruner):
            entry["scores"] = list(scores)
        if self.pruner is not None and accuracy is not None:
            entry |= self._judge(running, [*entries, entry])
        if accuracy is not None and not self.config.objective.minimize:  # Optuna's own charts draw these
            running.report(accuracy, round(100 * share))
        running.set_user_attr(RUNGS, [*entries, entry])
        return bool(entry["go_on"])

    def _judge(self, running: optuna.Trial, entries: list[dict[str, Any]]) -> dict[str, Any]:
        """What the pruner says, and what it wants to remember of the trial."""
        assert self.pruner is not None
        if isinstance(self.pruner, WilcoxonPruner):
            view, judged = self._by_question(entries[-1])
        else:
            view, judged = self._by_rung(running.number, entries)
        go_on = judged is None or not self.pruner.prune(view, judged)
        # successive halving notes in the trial which of its rungs were passed
        noted = {} if judged is None else view.get_trials()[judged.number].system_attrs
        return {"go_on": go_on, "noted": noted}

    def _by_rung(self, number: int, entries: list[dict[str, Any]]) -> tuple[optuna.Study, FrozenTrial]:
        """All trials under their own numbers, which decide Hyperband's bracket; a step is a power of the base."""
        view = _memory(self.study.study_name)
        for trial in self.study.get_trials(deepcopy=False):
            own = entries if trial.number == number else trial.user_attrs.get(RUNGS, ())
            steps = {self.base ** entry["rung"]: entry["accuracy"] for entry in own if entry["accuracy"] is not None}
            noted: dict[str, Any] = {}
            for entry in own:
                noted |= entry.get("noted", {})
            _show(view, trial, steps, noted)
        return view, view.get_trials()[number]

    def _by_question(self, entry: Mapping[str, Any]) -> tuple[optuna.Study, FrozenTrial | None]:
        """The finished trials that answered at this rung, and of each the answers there alone.

        What a trial answers to a question at one rung and at the next are no two observations.
        """
        view = _memory(self.study.study_name)
        steps = _answered(entry)
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            for other in trial.user_attrs.get(RUNGS, ()):
                answers = _answered(other) if other["rung"] == entry["rung"] else {}
                if steps.keys() <= answers.keys():
                    _show(view, trial, answers, {})
        if not view.get_trials():
            return view, None
        view.add_trial(optuna.create_trial(state=TrialState.RUNNING, intermediate_values=steps))
        return view, view.get_trials()[-1]


def make_pruner(config: StudyConfig) -> BasePruner | None:
    """Optuna's pruner as the study asks for it; None: nothing is pruned."""
    if not config.rungs:
        return None
    base = rung_base(config.rungs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        match config.pruner:
            case "median":
                return MedianPruner(n_startup_trials=config.search.startup)
            case "hyperband":
                # rungs are powers of the base, and the last power is the whole trial
                return HyperbandPruner(1, base ** len(config.rungs), base)
            case "wilcoxon":
                return WilcoxonPruner()
    return None


def rung_base(rungs: Sequence[float]) -> int:
    """How much more is spent from each rung to the next, as a whole number: what successive halving divides by."""
    shares = [*rungs, 1.0]
    ratios = [later / earlier for earlier, later in itertools.pairwise(shares)]
    return max(2, round(sum(ratios) / len(ratios))) if ratios else 2


def _memory(name: str) -> optuna.Study:
    return optuna.create_study(study_name=name, direction="maximize")


def _answered(entry: Mapping[str, Any]) -> dict[int, float]:
    return {place: score for place, score in enumerate(entry.get("scores", ())) if score is not None}


def _show(view: optuna.Study, trial: FrozenTrial, steps: Mapping[int, float], noted: Mapping[str, Any]) -> None:
    """Adds a trial to a view; one whose value was taken from others is none to compare with."""
    state = trial.state
    if state == TrialState.WAITING or {REPEATED, WARM} & trial.user_attrs.keys():
        state, steps = TrialState.FAIL, {}
    value = trial.values[0] if state == TrialState.COMPLETE else None
    view.add_trial(
        optuna.create_trial(state=state, value=value, intermediate_values=dict(steps), system_attrs=dict(noted))
    )
