"""Rungs: who is pruned, how that is recorded, and that a trial is never judged twice."""

from __future__ import annotations

import pytest
from optuna.trial import TrialState

from chiasm_experiments.study.judge import rung_base
from chiasm_experiments.study.record import RUNGS
from fake_pool import Bench, FakePool

LEVELS = [f"{level}e-4" for level in range(1, 9)]


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def grid(bench, **settings):
    """Eight cells in the order of their learning rates, judged after a quarter and a half."""
    factors = {"stages.pretrain.lr": {label: float(label) for label in LEVELS}}
    return bench.write(factors=factors, seeds=[0], search={"rungs": [0.25, 0.5], **settings})


def rate(run):
    return round(run.stages[0].lr * 1e4)


def falling(run, job):
    """The first cell is the best at every rung and at the end."""
    quality = 0.9 - 0.1 * rate(run)
    return [quality / 2, quality / 1.5, quality]


def pruned(bench, name="tiny"):
    return [trial.number for trial in bench.trials(name) if trial.state == TrialState.PRUNED]


def test_the_median_prunes_what_is_below_the_half(bench):
    bench.write(
        design="search",
        factors={"stages.pretrain.lr": {label: float(label) for label in LEVELS}},
        seeds=[0],
        search={"rungs": [0.25, 0.5], "pruner": "median", "startup": 2, "trials": 8, "sampler": "random"},
    )
    ended = bench.sweep(score=falling)
    assert ended.complete + ended.pruned == 8
    trials = [trial for trial in bench.trials() if "trial" in trial.user_attrs]
    reported: dict[int, list[float]] = {0: [], 1: []}
    complete = 0
    for trial in trials:
        entries = trial.user_attrs[RUNGS]
        for entry in entries:
            known = sorted(reported[entry["rung"]])
            if complete >= 2:
                half = len(known) // 2
                median = known[half] if len(known) % 2 else (known[half - 1] + known[half]) / 2
                best_so_far = max(item["accuracy"] for item in entries[: entry["rung"] + 1])
                assert entry["go_on"] == (best_so_far >= median)
            else:
                assert entry["go_on"]
        if trial.state == TrialState.COMPLETE:  # the median is that of complete trials
            complete += 1
            for entry in entries:
                reported[entry["rung"]].append(entry["accuracy"])
        else:
            assert entries[-1]["go_on"] is False
            assert trial.intermediate_values == {round(100 * entry["share"]): entry["accuracy"] for entry in entries}
    assert ended.pruned > 0


def test_successive_halving_keeps_the_better_half_of_each_rung(bench):
    """Of Hyperband's brackets the first prunes at every rung; the trials are told apart by what it noted."""
    assert rung_base([0.25, 0.5]) == 2
    assert rung_base([1 / 27, 1 / 9, 1 / 3]) == 3
    ended = grid(bench, pruner="hyperband").sweep(score=falling)
    assert ended.complete + ended.pruned == 8
    assert ended.pruned > 0
    trials = bench.trials()
    assert trials[0].state == TrialState.COMPLETE
    passed: dict[str, list[float]] = {}
    for trial in trials:
        for entry in trial.user_attrs[RUNGS]:
            noted = entry["noted"]
            for key, value in noted.items():
                if key not in str(trial.user_attrs[RUNGS][: entry["rung"]]):
                    passed.setdefault(key, []).append(value)
        if trial.state == TrialState.PRUNED:
            # it was in the worse half of those that had come so far in its bracket
            last = trial.user_attrs[RUNGS][-1]
            assert last["noted"]
    assert "completed_rung_0" in passed
    assert bench.states().count("PRUNED") == ended.pruned


def test_wilcoxon_prunes_what_answers_the_same_questions_worse(bench):
    def answers(run, job):
        right = [1.0] * (20 - 2 * rate(run)) + [0.0] * (2 * rate(run))
        return [right, right, sum(right) / 20]

    ended = grid(bench, pruner="wilcoxon").sweep(score=answers)
    # by scipy one-sided p < 0.1 needs two questions fewer of 20, here with zeros split
    assert pruned(bench) == [trial.number for trial in bench.trials() if trial.number >= 1][-ended.pruned :]
    assert ended.complete >= 1
    assert ended.pruned >= 6
    first = bench.trials()[0].user_attrs[RUNGS][0]
    assert first["scores"] == [1.0] * 18 + [0.0] * 2
    # neither better trials nor ones that cannot be told apart are pruned
    bench.out = bench.folder / "rising"

    def rising(run, job):
        right = [1.0] * (2 + 2 * rate(run)) + [0.0] * (18 - 2 * rate(run))
        return [right, right, sum(right) / 20]

    assert grid(bench, pruner="wilcoxon").sweep(score=rising).pruned == 0


@pytest.mark.parametrize("pruner", ["hyperband", "wilcoxon"])
def test_several_objectives_are_pruned_by_accuracy_alone(bench, pruner):
    def answers(run, job):
        right = [1.0] * (20 - 2 * rate(run)) + [0.0] * (2 * rate(run))
        return [right, right, sum(right) / 20]

    alone = grid(bench, pruner=pruner).sweep(score=answers)
    first = pruned(bench)
    bench.out = bench.folder / "both"
    grid(bench, pruner=pruner)
    bench.write(**{**bench.study, "objective": {"minimize": "visual_tokens"}})
    both = bench.sweep(score=answers)
    assert (both.complete, both.pruned) == (alone.complete, alone.pruned)
    assert pruned(bench) == first
    for trial in bench.trials():
        assert (trial.values is None) == (trial.state == TrialState.PRUNED)


def test_rungs_without_a_pruner_are_learning_curves(bench):
    factors = {"stages.pretrain.lr": {label: float(label) for label in LEVELS}}
    bench.write(factors=factors, seeds=[0], search={"rungs": [0.25, 0.5]})
    ended = bench.sweep(score=falling)
    assert ended.complete == 8
    for place, trial in enumerate(bench.trials()):
        quality = 0.9 - 0.1 * (place + 1)
        assert trial.intermediate_values == pytest.approx({25: quality / 2, 50: quality / 1.5})


class DeathError(BaseException):
    """A driver's."""


def test_a_rung_is_judged_once_whatever_dies_between_verdict_and_end(bench):
    """The answer that a driver was about to give is the one that the next driver gives."""
    grid(bench, pruner="hyperband").sweep(score=falling)
    undisturbed = [(trial.state, trial.user_attrs[RUNGS]) for trial in bench.trials()]

    class Mortal(FakePool):
        def answer(self, trial, go_on):
            if not go_on:
                raise DeathError
            super().answer(trial, go_on)

    bench.out = bench.folder / "again"
    with pytest.raises(DeathError):
        bench.sweep(pool=Mortal(falling))
    assert "RUNNING" in bench.states()
    bench.sweep(score=falling)
    assert [(trial.state, trial.user_attrs[RUNGS]) for trial in bench.trials()] == undisturbed


def test_what_was_pruned_is_not_run_again(bench):
    grid(bench, pruner="hyperband").sweep(score=falling)
    number = len(pruned(bench))
    assert number
    assert bench.sweep(score=falling).pruned == number
    assert bench.pool.started == []
