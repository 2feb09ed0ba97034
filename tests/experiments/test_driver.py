"""Studies from their file to their end, on a pool that trains nothing: order, failures, resuming, editing, stopping."""

from __future__ import annotations

import json
import os
import signal
import threading

import pytest
from optuna.trial import TrialState
from ray.exceptions import RaySystemError

from chiasm.errors import ConfigError
from chiasm_experiments.study.executor import Ended
from chiasm_experiments.study.sweep import ClusterLostError, Options, sweep
from fake_pool import PLAIN, STUDY, Bench, FakePool, score, statuses


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path).write()


def short(names):
    """Trial names without what tells their content."""
    return [name.rpartition("-")[0] for name in names]


def test_every_cell_runs_with_every_seed_in_blocks(bench):
    ended = bench.sweep()
    assert (ended.complete, ended.failed, ended.left, ended.stopped, ended.exit_code) == (8, 0, 0, None, 0)
    seeds = [name[-1] for name in short(bench.pool.started)]
    assert seeds == ["0"] * 4 + ["1"] * 4
    assert bench.states() == ["COMPLETE"] * 8
    for trial in bench.trials():
        assert set(trial.params) == {"vision.adapter", "stages.pretrain.lr"}
        assert trial.value == pytest.approx(
            0.5
            + 0.2 * (trial.params["vision.adapter"] == "linear")
            + 0.1 * (trial.params["stages.pretrain.lr"] == "fast")
            + 0.01 * trial.user_attrs["seed"]
        )
    assert bench.plan["planned"] == 8
    assert {about["seed"] for about in bench.plan["trials"].values()} == {0, 1}
    assert set(bench.plan["trials"]) == set(bench.pool.started)
    assert bench.pool.closed


def test_a_finished_study_starts_no_pool(bench):
    bench.sweep()
    bench.pool = None

    def refuse(state, say):
        raise AssertionError("there was nothing to run")

    ended = sweep(bench.path, bench.out, PLAIN, bench.said.append, refuse)
    assert ended.complete == 8


def test_a_driver_that_dies_at_any_event_loses_and_repeats_nothing(bench):
    """An exception stands for its death: nothing is told, and its presence ends with it."""

    class DeathError(BaseException):
        pass

    finished: list[str] = []
    for die_at in range(1, 12):
        count = 0

        def dies(pool, die_at=die_at):
            nonlocal count
            count += 1
            if count > die_at % 3:
                raise DeathError

        try:
            bench.sweep(size=2, on_event=dies)
        except DeathError:
            finished += bench.pool.finished
            continue
        finished += bench.pool.finished
        break
    bench.sweep()
    finished += bench.pool.finished
    assert len(finished) == len(set(finished)) == 8
    assert bench.states() == ["COMPLETE"] * 8


def test_a_result_that_was_not_told_is_taken_and_not_run_again(bench):
    """The driver was killed between the end of a trial and its word to Optuna."""

    class DeathError(BaseException):
        pass

    class Untold(FakePool):
        def events(self, seconds):
            super().events(seconds)
            raise DeathError

    with pytest.raises(DeathError):
        bench.sweep(pool=Untold(score))
    (first,) = bench.pool.finished
    assert bench.states().count("RUNNING") == 1
    bench.sweep()
    assert first not in bench.pool.started
    assert len(bench.pool.started) == 7
    assert bench.states() == ["COMPLETE"] * 8


def test_failures_are_recorded_with_their_reason_and_retried_when_asked(bench):
    def fails(run, job):
        return ValueError("no") if run.vision.adapter.name == "mlp" and run.seed == 1 else score(run, job)

    ended = bench.sweep(score=fails)
    assert (ended.complete, ended.failed) == (6, 2)
    failed = [trial for trial in bench.trials() if trial.state == TrialState.FAIL]
    assert {trial.user_attrs["error"] for trial in failed} == {"Traceback\nValueError: no"}
    manifests = [json.loads(file.read_text()) for file in bench.out.glob("trials/*/manifest.json")]
    assert [m["error"] for m in manifests if m["status"] == "failed"] == ["Traceback\nValueError: no"] * 2
    assert all(set(m["cell"]) == set(STUDY["factors"]) and m["seed"] in (0, 1) for m in manifests)

    assert bench.sweep().failed == 2
    assert bench.pool.started == []
    ended = bench.sweep(Options(retry_failed=True))
    assert (ended.complete, ended.failed) == (8, 0)
    assert len(bench.pool.started) == 2
    assert set(statuses(bench.out).values()) == {"complete"}


def test_too_many_failures_stop_the_study(bench):
    bench.write(max_failures=3)
    ended = bench.sweep(score=lambda run, job: ValueError("no"))
    assert (ended.failed, ended.left) == (3, 5)
    assert "max_failures" in ended.stopped
    assert bench.sweep().complete == 5


def test_lost_workers_are_retried_so_often_and_then_failed(bench):
    bench.write(resources={"retries": 1})
    lost = {"count": 0}

    def loses(run, job):
        if run.vision.adapter.name == "linear" and run.seed == 0:
            lost["count"] += 1
            return Ended(job.labels["trial"], "lost", error="killed by signal 9\nmore")
        return score(run, job)

    ended = bench.sweep(score=loses)
    assert lost["count"] == 4
    assert (ended.complete, ended.failed) == (6, 2)
    assert any("killed by signal 9; starting it again (1 of 1)" in line for line in bench.said)


def test_a_signal_stops_politely_and_the_next_call_goes_on(bench):
    def interrupt(number):
        def heard(pool):
            if len(pool.finished) == 3 and not pool.stopped:
                os.kill(os.getpid(), number)

        return heard

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    ended = bench.sweep(size=2, on_event=interrupt(signal.SIGINT))
    assert ended.exit_code == 130
    assert ended.stopped == "stopped by Ctrl-C"
    assert (ended.complete, ended.left) == (4, 4)
    assert bench.states().count("RUNNING") == 1
    ended = bench.sweep(on_event=interrupt(signal.SIGTERM))
    assert ended.exit_code == 143
    assert ended.stopped == "stopped by SIGTERM"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert bench.sweep().complete == 8
    assert bench.states() == ["COMPLETE"] * 8


def test_a_second_ctrl_c_ends_at_once(bench):
    def twice(pool):
        os.kill(os.getpid(), signal.SIGINT)
        if pool.stopped:
            raise AssertionError("the second one was not heeded")

    with pytest.raises(KeyboardInterrupt):
        bench.sweep(on_event=lambda pool: [twice(pool), twice(pool)])
    assert bench.pool.closed
    assert bench.sweep().complete == 8


def test_a_cluster_that_dies_is_told_and_nothing_is_lost(bench):
    def dies(pool):
        if len(pool.finished) == 2:
            raise RaySystemError("the node has crashed")

    with pytest.raises(ClusterLostError, match=r"the Ray cluster is gone.*crashed.*go on from there"):
        bench.sweep(on_event=dies)
    assert bench.pool.closed
    assert bench.sweep().complete == 8
    assert len(bench.pool.started) == 6


def test_two_drivers_share_the_work_and_run_nothing_twice(bench):
    pools = [FakePool(score), FakePool(score)]
    start = threading.Barrier(2)
    ended, errors = [], []

    def drive(pool):
        start.wait()
        try:
            ended.append(sweep(bench.path, bench.out, PLAIN, lambda line: None, lambda state, say: pool))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=drive, args=(pool,)) for pool in pools]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    started = pools[0].started + pools[1].started
    assert len(started) == len(set(started)) == 8
    assert [outcome.complete for outcome in ended] == [8, 8]
    assert bench.states() == ["COMPLETE"] * 8


def test_a_living_drivers_trials_are_not_taken_and_a_dead_ones_are(bench):
    inner = {}

    def other(pool):
        if not inner and pool.queue:
            held = pool.queue[0][0].labels["trial"]
            second = FakePool(score)

            def let_go(_):  # the second has nothing left but what the first holds
                if len(second.started) == 7 and not second.queue:
                    raise RuntimeError("enough")

            second.on_event = let_go
            inner["pool"], inner["held"] = second, held
            with pytest.raises(RuntimeError, match="enough"):
                sweep(bench.path, bench.out, PLAIN, lambda line: None, lambda state, say: second)

    bench.sweep(on_event=other)
    assert inner["held"] not in inner["pool"].started
    assert bench.pool.started == [inner["held"]]
    assert bench.states() == ["COMPLETE"] * 8


def test_only_runs_the_cells_that_are_asked_for(bench):
    ended = bench.sweep(Options(only="LINEAR"))
    assert (ended.complete, ended.left) == (4, 4)
    assert all("linear" in name for name in bench.pool.started)
    with pytest.raises(ConfigError, match=r"no cell has 'square'.*labels:\n  mlp, slow"):
        bench.sweep(Options(only="square"))
    assert bench.sweep().complete == 8


def test_added_seeds_are_remembered(bench):
    bench.sweep()
    assert bench.sweep(Options(add_seeds=2)).complete == 16
    assert sorted({about["seed"] for about in bench.plan["trials"].values()}) == [0, 1, 2, 3]
    assert bench.plan["added_seeds"] == [2, 3]
    assert bench.sweep().complete == 16
    assert bench.pool.started == []
    assert not [line for line in bench.said if "changed" in line]


def test_fresh_deletes_earlier_results_and_nothing_else(bench):
    bench.sweep()
    first = (bench.out / "study.json").read_text()
    bench.sweep(Options(fresh=True))
    assert len(bench.pool.started) == 8
    assert json.loads(first)["id"] != bench.plan["id"]
    bench.out = bench.folder / "thesis"
    bench.out.mkdir()
    (bench.out / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match="is not empty and holds no study"):
        bench.sweep(Options(fresh=True))
    assert (bench.out / "thesis.tex").read_text() == "precious"


def test_a_spent_budget_stops_new_trials_and_finishes_running_ones(bench, monkeypatch):
    from chiasm_experiments.study import record

    clock = {"now": 1000.0}
    monkeypatch.setattr(record.time, "time", lambda: clock["now"])

    def tick(pool):
        clock["now"] += 3600

    bench.write(budget={"gpu_hours": 3})
    ended = bench.sweep(size=2, on_event=tick)
    # 1 h; then 2 h, as it had waited beside the first; the third had begun before
    assert (ended.complete, ended.left) == (3, 5)
    assert "the budget of 3 GPU-hours is spent" in ended.stopped
    bench.write(budget={"money": 20, "price_per_gpu_hour": 2})
    ended = bench.sweep(on_event=tick)
    assert "the budget of 20 is spent: 20 for 10 GPU-hours" in ended.stopped
    assert any("settings that change no result of a finished trial: budget" in line for line in bench.said)
    bench.write()
    assert bench.sweep().complete == 8


def test_edits_are_told_and_what_is_still_valid_is_kept(bench):
    bench.sweep()
    factors = dict(STUDY["factors"]) | {"stages.pretrain.lr": {"fast": 1e-2, "faster": 1e-1}}
    bench.write(factors=factors, seeds=[1, 2], question="Which?")
    ended = bench.sweep()
    said = "\n".join(bench.said)
    assert "levels of stages.pretrain.lr added: faster" in said
    assert "levels of stages.pretrain.lr removed: slow" in said
    assert "seeds added: 2" in said
    assert "seeds removed: 0" in said
    assert "question" in said
    assert "6 finished trials stay on disk" in said
    assert "revision 2 keeps 2 of 8 finished trials" in said
    assert ended.complete == 8
    assert len(bench.pool.started) == 6
    assert bench.states("tiny, revision 2") == ["COMPLETE"] * 8
    assert len(list((bench.out / "trials").iterdir())) == 14
    # back again: what lies on disk is taken, and only Optuna's record is made anew
    bench.write()
    ended = bench.sweep()
    assert ended.complete == 8
    assert bench.pool.started == []


def test_a_new_factor_whose_level_is_the_bases_keeps_the_results(bench):
    bench.sweep()
    names = set(bench.plan["trials"])
    bench.write(factors=STUDY["factors"] | {"vision.image.resize": ["pad", "squash"]})
    ended = bench.sweep()
    assert ended.complete == 16
    assert len(bench.pool.started) == 8
    assert names < set(bench.plan["trials"])
    assert all(bench.plan["trials"][name]["levels"]["vision.image.resize"] == "pad" for name in names)


def test_an_edit_beside_a_living_driver_is_refused(bench):
    def edit(pool):
        if len(pool.finished) == 1:
            bench.write(seeds=[0, 1, 2])
            with pytest.raises(ConfigError, match="another driver .* seeds added: 2"):
                sweep(bench.path, bench.out, PLAIN, lambda line: None, lambda state, say: FakePool(score))

    assert bench.sweep(on_event=edit).complete == 8


def test_a_trial_whose_parts_are_loaded_comes_first(bench):
    bench.write(
        seeds=[0],
        factors={
            "vision.encoders": {"a": [{"name": "blind"}], "b": [{"name": "blind", "width": 8}]},
            "vision.adapter": ["mlp", "linear"],
        },
    )
    bench.sweep()
    in_order, keys = bench.pool.started, bench.pool.keys
    assert keys[0] == keys[1] != keys[2] == keys[3]
    assert bench.pool.alike == [2] * 4, "two adapters see the images through the same encoder"

    def warm(pool):
        pool.warm_keys = frozenset(key.parts for key in keys[3:])

    bench.sweep(Options(fresh=True), on_event=warm)
    assert bench.pool.started == [in_order[0], *in_order[2:], in_order[1]]


FIDELITIES = {
    "small": {"stages.pretrain.data": {"name": "world", "task": "captions", "size": 2}},
    "whole": {},
}


def test_the_best_share_and_their_controls_go_on(bench):
    encoders = {"seeing": [{"name": "blind", "grid": [4, 4]}], "blind": [{"name": "blind", "grid": [2, 2]}]}
    bench.write(
        factors={"vision.encoders": encoders, **STUDY["factors"]},
        control={"vision.encoders": "blind"},
        fidelities=FIDELITIES,
        promote=0.25,
    )
    ended = bench.sweep()
    assert ended.complete == 16 + 4
    whole = bench.trials("tiny, whole")
    assert {
        (t.params["vision.encoders"], t.params["vision.adapter"], t.params["stages.pretrain.lr"]) for t in whole
    } == {
        ("seeing", "linear", "fast"),
        ("blind", "linear", "fast"),
    }
    assert bench.plan["fidelities"] == ["small", "whole"]
    assert any(line.startswith("fidelity small is finished; on to whole: ") for line in bench.said)
    assert bench.sweep().complete == 20
    assert bench.pool.started == []
