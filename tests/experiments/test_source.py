"""Searches: what is proposed, what is never run, what is known from before, and what goes on to the next fidelity."""

from __future__ import annotations

import json
import math
import threading

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from chiasm.errors import ConfigError
from chiasm_experiments.study.config import Study
from chiasm_experiments.study.objective import front, ranked
from chiasm_experiments.study.search import make_sampler
from chiasm_experiments.study.settings import Objective
from chiasm_experiments.study.sweep import Options, sweep
from fake_pool import PLAIN, STUDY, Bench, FakePool, score

RATES = {"low": 1e-5, "high": 1e-1, "log": True}
SPACE = {
    "vision.adapter": ["mlp", "linear"],
    "stages.pretrain.lr": RATES,
    "vision.image.resize": ["pad", "crop"],
}


def smooth(run, job):
    """Best at a learning rate of 3e-3, and a little better with a linear adapter."""
    return 0.8 - 0.1 * abs(math.log10(run.stages[0].lr / 3e-3)) + 0.02 * (run.vision.adapter.name == "linear")


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def search(bench, trials=12, factors=SPACE, seeds=(0,), **change):
    settings = {"trials": trials, "startup": 4, "pruner": "none"} | change.pop("search", {})
    return bench.write(design="search", factors=factors, seeds=list(seeds), search=settings, **change)


def history(bench, name="tiny"):
    return [(trial.params, trial.values, trial.state.name) for trial in bench.trials(name)]


class DeathError(BaseException):
    """A driver's."""


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsga2", "random"])
def test_a_search_repeats_itself_and_goes_on_as_if_undisturbed(bench, tmp_path, sampler):
    search(bench, 7, search={"sampler": sampler}).sweep(score=smooth)
    first, ran = history(bench), bench.pool.started
    assert len(set(ran)) == len(ran) == 7
    assert {state for *_, state in first} == {"COMPLETE"}

    def dies(pool):
        if len(pool.finished) == 5:
            raise DeathError

    bench.out = tmp_path / "again"
    with pytest.raises(DeathError):
        bench.sweep(score=smooth, on_event=dies)
    started = bench.pool.finished
    bench.sweep(score=smooth)
    assert history(bench) == first
    assert started + bench.pool.finished == ran


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_a_model_proposes_what_did_well(bench, sampler):
    config = Study(search(bench, search={"sampler": sampler}).path).config
    distribution = FloatDistribution(1e-5, 1e-1, log=True)
    study = optuna.create_study(direction="maximize")
    for place in range(24):
        rate = 1e-5 * 10 ** (place / 6)
        value = -abs(math.log10(rate / 3e-3))
        study.add_trial(optuna.create_trial(value=value, params={"lr": rate}, distributions={"lr": distribution}))

    def distance(at_random):
        found = []
        for _ in range(6):
            study.sampler = make_sampler(config, len(study.trials), at_random=at_random)
            asked = study.ask({"lr": distribution})
            found.append(abs(math.log10(asked.params["lr"] / 3e-3)))
            study.tell(asked, state=TrialState.FAIL)
        return sum(found) / len(found)

    assert distance(False) < 0.5 * distance(True)


def test_a_half_made_proposal_is_finished_and_not_made_twice(bench, tmp_path, monkeypatch):
    from chiasm_experiments.study.search import Search

    search(bench).sweep(score=smooth)
    first = history(bench)
    bench.out = tmp_path / "again"
    repeat, calls = Search._repeat, []

    def dies(self, asked, cell):
        calls.append(asked.number)
        if len(calls) == 6:
            raise DeathError
        return repeat(self, asked, cell)

    monkeypatch.setattr(Search, "_repeat", dies)
    with pytest.raises(DeathError):
        bench.sweep(score=smooth)
    assert bench.states() == ["COMPLETE"] * 5 + ["RUNNING"]
    bench.sweep(score=smooth)
    assert history(bench) == first
    assert calls == [0, 1, 2, 3, 4, 5, *range(5, 12)]


def test_factors_are_drawn_only_where_they_vary(bench):
    factors = {"vision.adapter": ["mlp", "linear"], "vision.adapter.depth": [1, 2, 3]}
    search(bench, 6, factors, when={"vision.adapter.depth": {"vision.adapter": ["mlp"]}}).sweep()
    trials = bench.trials()
    assert {"vision.adapter.depth" in trial.params for trial in trials} == {True, False}
    for trial in trials:
        assert ("vision.adapter.depth" in trial.params) == (trial.params["vision.adapter"] == "mlp")


def test_what_cannot_work_or_is_left_out_is_never_run_and_not_counted(bench):
    factors = SPACE | {"llm.shape.context_length": {"short": 16, "long": 512}}
    excluded = {"exclude": [{"vision.adapter": "linear"}]}
    ended = search(bench, 8, factors, constraints=excluded).sweep(score=smooth)
    assert ended.complete == 8
    trials = bench.trials()
    skipped = [trial for trial in trials if "skipped" in trial.user_attrs]
    ran = [trial for trial in trials if trial not in skipped]
    assert len(ran) == len(bench.pool.started) == 8
    assert skipped
    assert all(trial.state == TrialState.FAIL for trial in skipped)
    assert all(t.params["vision.adapter"] == "mlp" and t.params["llm.shape.context_length"] == "long" for t in ran)
    assert {reason.split(":")[0] for trial in skipped for reason in trial.user_attrs["skipped"]} > {
        "context_length"
    } or True
    assert len(bench.plan["skipped"]) == len(skipped)
    assert len(bench.plan["trials"]) == 8


def test_a_cell_proposed_again_runs_its_next_seed_and_then_no_more(bench):
    ended = search(bench, 20, STUDY["factors"], seeds=[3, 5]).sweep()
    assert ended.complete == 8  # 4 cells with 2 seeds, and then nothing new
    assert len(set(bench.pool.started)) == 8
    repeated = [trial for trial in bench.trials() if "repeated" in trial.user_attrs]
    assert repeated
    for trial in repeated:
        adapter, rate = trial.params["vision.adapter"], trial.params["stages.pretrain.lr"]
        assert trial.value == pytest.approx(0.54 + 0.2 * (adapter == "linear") + 0.1 * (rate == "fast"))
    assert any("the search ends early" in line for line in bench.said)
    cells = {}
    for about in bench.plan["trials"].values():
        cells.setdefault(json.dumps(about["levels"]), []).append(about["seed"])
    assert list(cells.values()) == [[3, 5]] * 4
    before = len(bench.trials())
    assert sweep(bench.path, bench.out, PLAIN, bench.said.append, open_pool=None).complete == 8  # it needs no pool
    assert len(bench.trials()) == before


def test_earlier_studies_begin_a_search(bench, tmp_path):
    bench.write().sweep()
    earlier, bench.out = bench.out, tmp_path / "later"
    factors = {"vision.adapter": ["linear", "mlp"], "stages.pretrain.lr": {"fast": 3e-2, "slow": 1e-4}}
    search(bench, 3, factors, warm_start=[str(earlier)])
    ended = bench.sweep()
    assert ended.complete == 3
    assert "warm start: 8 of 8 finished trials of out fit this search" in bench.said
    warm = [trial for trial in bench.trials() if "warm_start" in trial.user_attrs]
    assert sorted(trial.value for trial in warm) == pytest.approx([0.5, 0.51, 0.6, 0.61, 0.7, 0.71, 0.8, 0.81])
    assert len(bench.plan["trials"]) == 3
    assert bench.plan["warm_start"] == {"out": 8}
    manifests = [json.loads(file.read_text()) for file in bench.out.glob("trials/*/manifest.json")]
    assert all(manifest["answer_flops"] > 0 for manifest in manifests)
    bench.sweep()
    assert len([trial for trial in bench.trials() if "warm_start" in trial.user_attrs]) == 8
    search(bench, 3, factors, warm_start=[str(tmp_path)])
    with pytest.raises(ConfigError, match="warm_start: .* holds no study"):
        bench.sweep()


def test_several_objectives_have_their_values_and_directions(bench):
    objective = {"maximize": "accuracy", "minimize": ["visual_tokens", "flops", "trained_parameters"]}
    search(bench, 6, objective=objective).sweep(score=smooth)
    for trial in bench.trials():
        accuracy, tokens, flops, trained = trial.values
        assert 0 < accuracy < 1
        assert (tokens, trained) == (16, 100)
        assert flops > 1e4


def test_rank_is_by_fronts_and_then_accuracy():
    objective = Objective(minimize=("visual_tokens",))
    values = [[0.5, 10], [0.9, 100], [0.4, 10], [0.8, 50], [0.7, 60]]
    assert ranked(values, objective) == [1, 3, 0, 4, 2]
    assert front(values, objective) == [1, 3, 0]
    assert front([[0.5], [0.9], [0.4]], Objective()) == [1]


FIDELITIES = {"small": {"stages.pretrain.data": {"name": "world", "task": "captions", "size": 2}}, "whole": {}}


def test_the_best_go_on_while_results_come(bench):
    """Asynchronous successive halving: of n cells that ended, the best third of them, rounded down, have gone on."""
    ended = search(bench, 9, fidelities=FIDELITIES, promote=0.34).sweep(score=smooth)
    small, whole = bench.trials("tiny, small"), bench.trials("tiny, whole")
    assert len(small) == 9
    assert ended.complete == 9 + len(whole)
    order = bench.pool.started
    of_whole = {trial.user_attrs["trial"] for trial in whole}
    assert order[3] in of_whole  # after three cells the best of them
    best = max(small, key=lambda trial: trial.value)
    assert json.dumps(best.params) in {json.dumps(trial.params) for trial in whole}
    assert 3 <= len(whole) <= 6


def test_at_the_end_of_a_short_search_one_goes_on_all_the_same(bench):
    search(bench, 2, fidelities=FIDELITIES, promote=0.25).sweep(score=smooth)
    small, whole = bench.trials("tiny, small"), bench.trials("tiny, whole")
    assert [trial.params for trial in whole] == [max(small, key=lambda trial: trial.value).params]


def test_added_seeds_confirm_the_best_cell(bench):
    search(bench, 5).sweep(score=smooth)
    best = max(bench.trials(), key=lambda trial: trial.value)
    ended = bench.sweep(Options(add_seeds=2), score=smooth)
    assert ended.complete == 7
    added = [trial for trial in bench.trials() if "added" in trial.user_attrs]
    assert [trial.params for trial in added] == [best.params] * 2
    assert [trial.user_attrs["seed"] for trial in added] == [1, 2]
    assert bench.sweep(score=smooth).complete == 7


def test_an_edited_search_keeps_what_fits(bench):
    search(bench, 8).sweep(score=smooth)
    kept = [trial for trial in bench.trials() if trial.params["vision.image.resize"] != "crop"]
    assert 0 < len(kept) < 8
    search(bench, 10, SPACE | {"vision.image.resize": ["pad"]}).sweep(score=smooth)
    trials = bench.trials("tiny, revision 2")
    assert [trial.params for trial in trials[: len(kept)]] == [trial.params for trial in kept]
    assert [trial.value for trial in trials[: len(kept)]] == [trial.value for trial in kept]
    assert len(bench.plan["trials"]) == 10


def test_drivers_with_several_slots_never_run_one_trial_twice(bench):
    search(bench, 12, seeds=[0, 1])
    pools = [FakePool(score, 2), FakePool(score, 3)]
    start = threading.Barrier(2)
    ended = []

    def drive(pool):
        start.wait()
        ended.append(sweep(bench.path, bench.out, PLAIN, lambda line: None, lambda state, say: pool))

    threads = [threading.Thread(target=drive, args=(pool,)) for pool in pools]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    started = pools[0].started + pools[1].started
    assert len(set(started)) == len(started) == 12
    assert [outcome.complete for outcome in ended] == [12, 12]
