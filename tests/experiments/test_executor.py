"""Where trials run: actors that are reused, limits, kills, and what is left behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray
import ray.train.torch
from ray.util.placement_group import placement_group, placement_group_table

from chiasm.config import RunConfig
from chiasm.errors import ConfigError
from chiasm.plan import plan_run
from chiasm_experiments.study.executor import Ended, Pool, Reported
from chiasm_experiments.study.keys import Key, Load, load_of, make_key, warm_key
from chiasm_experiments.study.leftovers import NAMESPACE, Traces
from chiasm_experiments.study.places import Result, TrainerActor
from chiasm_experiments.study.settings import Resources
from chiasm_experiments.study.slots import GIB, count_slots, memory_fraction, trials_per_gpu
from chiasm_experiments.training.run import Job

SHAPE = {"width": 32, "depth": 1, "heads": 2, "kv_heads": 1, "mlp_width": 32, "context_length": 256}
WORLD = {"name": "world", "image_size": 96, "skills": ["colour"]}
RUN = {
    "vision": {"encoders": ["blind"], "adapter": "mlp"},
    "llm": {"name": "causal", "shape": SHAPE},
    "system": "",
    "stages": [
        {"name": "s", "data": {**WORLD, "task": "dialogues", "size": 8}, "train": ["adapter", "tokens"], "lr": 1e-3}
        | {"batch_size": 2, "steps": 4}
    ],
    "evaluate": {**WORLD, "size": 4},
}
LONG = 100_000


@pytest.fixture
def pool(cluster):
    """A pool of two slots."""
    made = []

    def make(study="tests", **change) -> Pool:
        resources = Resources.model_validate({"cpus_per_worker": 1, "loggers": [], "cache": "off"} | change)
        made.append(Pool(resources, lambda line: None, study))
        return made[-1]

    yield make
    for item in made:
        item.close()


@pytest.fixture
def job(tmp_path):
    def make(name, steps=4, lr=1e-3, width=32, rungs=(), **execution) -> Job:
        values = json.loads(json.dumps(RUN))
        values["stages"][0] |= {"steps": steps, "lr": lr}
        values["llm"]["shape"]["width"] = width
        run = RunConfig.model_validate(values)
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        settings = Resources.model_validate({"loggers": [], "cache": "off"} | execution).execution
        labels = {"trial": name, "study": "tests", "cell": {}}
        return Job(run.model_dump(mode="json"), str(folder), labels, settings, rungs=rungs, rung_questions=2)

    return make


def key_of(job) -> Key:
    run = RunConfig.model_validate(job.run)
    return make_key(run, plan_run(run))


def submit(pool, *jobs):
    for item in jobs:
        pool.submit(item, key_of(item))


def wait(pool, count, seconds=90.0) -> list[Ended | Reported]:
    """So many events, in order."""
    events: list[Ended | Reported] = []
    until = time.monotonic() + seconds
    while len(events) < count:
        assert time.monotonic() < until, (events, pool.progress())
        events += pool.events(1.0)
    return events


def until_it_trains(pool, *names):
    while not all("loss" in pool.progress().get(name, "") for name in names):
        assert not pool.events(0.1)


def processes(pool, trial) -> list[psutil.Process]:
    """Those of a trial's workers."""
    seen = ray.get(pool.hub.look.remote())[pool.running[trial].ticket]
    return [psutil.Process(process) for process in seen.processes]


def actors() -> set[str]:
    return {item["name"] for item in ray.util.list_named_actors(all_namespaces=True) if item["namespace"] == NAMESPACE}


def test_actors_are_reused_and_a_trial_goes_where_its_parts_are(pool, job):
    two = pool()
    assert (two.size, two.free, two.warm()) == (2, 2, frozenset())
    wide, narrow = job("wide", width=64), job("narrow")
    submit(two, wide, narrow)
    assert two.free == 0
    ended = {event.trial: event for event in wait(two, 2)}
    assert {event.status for event in ended.values()} == {"complete"}
    assert ended["wide"].manifest == json.loads((Path(wide.folder) / "manifest.json").read_text())
    wide_key, narrow_key = (key_of(item).parts for item in (wide, narrow))
    assert two.warm() == {wide_key, narrow_key}
    assert wide_key != narrow_key
    started = actors()
    held = {place.parts: place.actor for place in two.idle}
    # the one that holds its parts, though the other was idle for longer
    submit(two, job("wide again", width=64, lr=1e-2))
    assert two.running["wide again"].place.actor is held[wide_key]
    assert two.warm() == {narrow_key}
    # no place holds these: the one that is idle takes it, and no third is made
    submit(two, job("other", width=16))
    assert two.running["other"].place.actor is held[narrow_key]
    assert [event.status for event in wait(two, 2)] == ["complete"] * 2
    assert actors() == started
    two.close()
    until = time.monotonic() + 10
    while actors():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_trials_stop_wait_are_pruned_fail_and_die(pool, job, tmp_path):
    two = pool(concurrent=2)
    submit(two, job("stopped", steps=LONG), job("pruned", steps=40, rungs=(0.25, 0.5)))
    first = wait(two, 1)[0]
    assert isinstance(first, Reported)
    assert (first.trial, first.rung, first.share, len(first.scores)) == ("pruned", 0, 0.25, 2)
    two.answer("pruned", True)
    second = wait(two, 1)[0]
    assert isinstance(second, Reported)
    assert second.rung == 1
    two.answer("pruned", False)
    pruned = wait(two, 1)[0]
    assert isinstance(pruned, Ended)
    assert pruned.status == "pruned"
    assert pruned.manifest is not None
    assert [point["scores"] for point in pruned.manifest["curve"]] == [list(first.scores), list(second.scores)]

    until_it_trains(two, "stopped")
    asked = time.monotonic()
    two.stop()
    (ended,) = wait(two, 1)
    assert ended == Ended("stopped", "stopped")
    assert time.monotonic() - asked < 5

    # one that waits at a rung is stopped too
    submit(two, job("waits", steps=40, rungs=(0.5,)))
    assert isinstance(wait(two, 1)[0], Reported)
    two.stop(["waits"])
    assert wait(two, 1) == [Ended("waits", "stopped")]

    # an error of the trial keeps its traceback, and one of ours keeps the actor
    before = {place.actor for place in two.idle}
    submit(two, job("diverges", lr=1e30, steps=50))
    (failed,) = wait(two, 1)
    assert (failed.status, failed.trial) == ("failed", "diverges")
    assert "DivergedError" in failed.error
    assert "Traceback" in failed.error
    assert {place.actor for place in two.idle} == before

    # SIGKILL from outside is the loss of a worker, which the trial begins again from
    submit(two, job("killed", steps=LONG, checkpoint_seconds=0))
    until_it_trains(two, "killed")
    (process,) = processes(two, "killed")
    process.send_signal(signal.SIGKILL)
    (lost,) = wait(two, 1)
    assert (lost.trial, lost.status) == ("killed", "lost")
    assert f"process {process.pid}" in lost.error
    assert "SIGKILL" in lost.error
    submit(two, job("killed", steps=LONG, checkpoint_seconds=0), job("unwanted", steps=LONG))
    until_it_trains(two, "killed", "unwanted")
    # the driver's own kill is a failure with the driver's reason, and the others go on
    two.kill("unwanted", "no longer wanted")
    assert wait(two, 1) == [Ended("unwanted", "failed", error="no longer wanted")]
    two.stop()
    assert wait(two, 1) == [Ended("killed", "stopped")]
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))


def test_limits_end_what_hangs_and_what_takes_too_long(pool, job):
    one = pool(concurrent=1)
    submit(one, job("too long", steps=LONG), job("hangs", steps=LONG), job("other"))
    assert one.free == 0
    assert one.progress()["hangs"] == "waits for a place"
    until_it_trains(one, "too long")
    one.resources = one.resources.model_copy(update={"trial_seconds": 0.5})
    (late,) = wait(one, 1)
    one.resources = one.resources.model_copy(update={"trial_seconds": None})
    assert (late.trial, late.status) == ("too long", "failed")
    assert late.error.startswith("took longer than trial_seconds (0.5); its last sign was: s ")
    until_it_trains(one, "hangs")
    (process,) = processes(one, "hangs")
    process.send_signal(signal.SIGSTOP)
    one.resources = one.resources.model_copy(update={"stall_seconds": 2.0})
    (stalled,) = wait(one, 1)
    assert (stalled.trial, stalled.status) == ("hangs", "failed")
    assert stalled.error.startswith("showed no progress for stall_seconds (2); its last sign was: s ")
    one.resources = one.resources.model_copy(update={"stall_seconds": 1800.0})
    process.wait(30)  # Ray gives a process some seconds to end by itself
    (other,) = wait(one, 1)
    assert (other.trial, other.status) == ("other", "complete")
    # after an error that nobody foresaw the process is not used again
    broken = job("broken")
    broken.run["stages"][0]["lr"] = "fast"
    one.submit(broken, Key("any", Load("any")))
    (failed,) = wait(one, 1)
    assert (failed.trial, failed.status) == ("broken", "failed")
    assert "ValidationError" in failed.error
    assert one.warm() == frozenset()


KILLED = """
import os, signal, sys
import ray
from ray.util.placement_group import placement_group
from chiasm_experiments.study.leftovers import Traces
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="error")
Traces("killed")
group = placement_group([{"CPU": 64}], lifetime="detached")  # which waits for ever
print(group.id.hex(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_driver_left_is_removed_by_the_next_one_of_its_study(cluster, pool):
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", KILLED, address]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    group = killed.stdout.strip()
    mine = placement_group([{"CPU": 64}])
    state = {name: placement_group_table()[name]["state"] for name in (group, mine.id.hex())}
    other = Traces("another study")
    living = pool("killed")  # it removes
    after = {name: placement_group_table()[name]["state"] for name in state}
    assert after[group] == "REMOVED"
    assert state[group] == "PENDING"
    assert state[mine.id.hex()] == after[mine.id.hex()] == "PENDING"
    ray.util.remove_placement_group(mine)
    # of a driver that lives nothing is removed
    assert Traces("killed").clear() == []
    assert other.clear() == []
    assert any(name.startswith("killed/") and name.endswith("/hub") for name in actors())
    assert living.free == living.size


@pytest.mark.slow
def test_trials_on_several_workers_are_stopped_and_killed_like_others(pool, job, tmp_path):
    """How they are lost is in `test_several_workers.py`."""
    several = pool(workers=2, cpus_per_worker=0.5, concurrent=1)
    before = set(placement_group_table())
    submit(several, job("stopped", steps=40, rungs=(0.25,)))
    assert isinstance(wait(several, 1)[0], Reported)
    several.stop()
    assert wait(several, 1) == [Ended("stopped", "stopped")]
    assert list((tmp_path / "stopped").glob("stages/s/checkpoint-00000010/random-1.safetensors"))

    submit(several, job("killed", steps=LONG))
    until_it_trains(several, "killed")
    several.kill("killed", "no longer wanted")
    assert wait(several, 1) == [Ended("killed", "failed", error="no longer wanted")]
    assert {group["state"] for name, group in placement_group_table().items() if name not in before} == {"REMOVED"}
    several.close()
    assert not {name for name in actors() if name.startswith("tests/")}


def test_what_drove_lost_workers_ends_with_them(pool, job, monkeypatch):
    """A controller that fails leaves its workers alive, and the GPUs with them, until its parent ends."""
    several = pool(workers=2, cpus_per_worker=0.5, concurrent=1)

    def fit(self):
        raise ray.train.ControllerError(RuntimeError("no module named so"))

    monkeypatch.setattr(ray.train.torch.TorchTrainer, "fit", fit)
    here = TrainerActor.__ray_metadata__.modified_class(several.resources, 0)
    result = here.run(job("lost"), several.hub, "lost#1")
    assert result.status == "lost"
    assert "no module named so" in result.error
    assert not result.reusable


def test_runs_share_a_key_where_their_frozen_parts_are_the_same(job):
    def key(**change):
        return warm_key(RunConfig.model_validate(RUN | change))

    assert key() == key(evaluate=[]) == key(stages=[RUN["stages"][0] | {"lr": 1.0}])
    different = [
        key(),
        key(seed=1),  # random weights
        key(precision="bfloat16"),
        key(llm=RUN["llm"] | {"shape": SHAPE | {"depth": 2}}),
        key(vision={"encoders": ["blind", "blind"], "adapter": "mlp"}),
        key(stages=[RUN["stages"][0] | {"train": ["llm"]}]),
    ]
    assert len(set(different)) == len(different)
    pretrained = {"name": "causal", "pretrained": "some/model"}
    assert warm_key(RunConfig.model_validate(RUN)) == key()
    blind = {"vision": {"encoders": [{"name": "clip", "pretrained": "some/clip"}]}}
    assert key(llm=pretrained, **blind) == key(llm=pretrained, **blind, seed=1)


def test_runs_share_a_load_where_models_tokens_and_training_are_of_one_size():
    def load(**change):
        run = RunConfig.model_validate(RUN | change)
        return load_of(run, plan_run(run))

    stage = RUN["stages"][0]
    assert load() == load(seed=1) == load(stages=[stage | {"lr": 1.0, "steps": 9}]) == load(evaluate=[])
    clip = {"name": "clip", "shape": {"image_size": 28, "patch_size": 14, "width": 8, "depth": 1, "heads": 1}
            | {"mlp_width": 8}}  # fmt: skip
    different = [
        load(),
        load(precision="bfloat16"),
        # no language model that learns is part of what is warm, and its size counts all the same
        load(llm=RUN["llm"] | {"shape": SHAPE | {"depth": 2}}, stages=[stage | {"train": ["llm"]}]),
        load(stages=[stage | {"train": ["llm"]}]),
        load(stages=[stage | {"batch_size": 4}]),
        load(vision={"encoders": [clip], "adapter": "mlp"}),
        load(vision={"encoders": [{"name": "blind", "grid": [2, 2]}], "adapter": "mlp"}),
    ]
    assert len(set(different)) == len(different)


@pytest.mark.parametrize(
    ("busy", "peak", "most", "count"),
    [
        (0.2, 1 * GIB, 4, 4),  # five by time, many by memory
        (0.2, 1 * GIB, 8, 5),
        (0.25, 1 * GIB, 8, 4),
        (0.45, 1 * GIB, 4, 2),
        (0.6, 1 * GIB, 4, 1),
        (1.0, 1 * GIB, 4, 1),
        (0.0, 1 * GIB, 4, 4),
        (0.2, 30 * GIB, 4, 2),  # 80 / (30 * 1.15 + 0.75)
        (0.2, 70 * GIB, 4, 1),
        (0.2, 200 * GIB, 4, 1),
        (None, 1 * GIB, 4, 1),
        (0.2, None, 4, 1),
    ],
)
def test_how_many_trials_share_a_gpu(busy, peak, most, count):
    assert trials_per_gpu(busy, peak, 80 * GIB, most) == count
    assert trials_per_gpu(busy, peak, None, most) == 1
    if peak is not None and count > 1:
        # what each may reserve holds what the measured one took
        assert memory_fraction(1 / count, 80 * GIB) * 80 * GIB >= peak
        assert count * (memory_fraction(1 / count, 80 * GIB) * 80 + 0.75) <= 80.01


@pytest.mark.parametrize(
    ("nodes", "cpus", "gpus", "workers", "count"),
    [
        ([{"CPU": 4}], 1, 0, 1, 4),
        ([{"CPU": 4}], 3, 0, 1, 1),
        ([{"CPU": 2}, {"CPU": 2}], 3, 0, 1, 0),  # not 4 / 3: a worker lies on one node
        ([{"CPU": 0.3}], 0.1, 0, 1, 3),
        ([{"CPU": 16, "GPU": 4}], 1, 0.4, 1, 8),  # not 10: a share lies on one GPU
        ([{"CPU": 16, "GPU": 1}], 1, 0.25, 1, 4),
        ([{"CPU": 2, "GPU": 1}], 1, 0.25, 1, 2),
        ([{"CPU": 16, "GPU": 2}, {"CPU": 16}], 1, 1, 1, 2),
        ([{"CPU": 16, "GPU": 3}, {"CPU": 16, "GPU": 3}], 1, 2, 1, 2),
        ([{"CPU": 16, "GPU": 4}, {"CPU": 16, "GPU": 4}], 2, 1, 4, 2),
        ([{"CPU": 16, "GPU": 1}, {"CPU": 16, "GPU": 1}], 2, 1, 2, 1),
    ],
)
def test_slots_are_what_the_nodes_hold(nodes, cpus, gpus, workers, count):
    assert count_slots(nodes, cpus, gpus, workers) == count


def test_a_cluster_that_holds_no_trial_is_refused(pool):
    with pytest.raises(ConfigError, match=r"a trial takes 1 x \{CPU: 3, GPU: 0\}, and the nodes .*lower workers"):
        pool(cpus_per_worker=3)
    with pytest.raises(ConfigError, match=r"GPU: 1\}"):
        pool(gpus_per_worker=1)


def test_several_trials_share_a_gpu_once_one_was_measured(cluster, monkeypatch):
    """The pool's own accounts, with a cluster of one GPU that is made up, and actors that are."""
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0}}])
    pool = Pool(Resources(loggers=()), lambda line: None, "shares")
    made, killed = [], []

    class Actor:
        def __init__(self, share):
            made.append(share)
            self.run = self

        def remote(self, *_):
            return ray.put(None)

    monkeypatch.setattr(pool, "_new", Actor)
    monkeypatch.setattr(ray, "kill", killed.append)

    def submit(name, kind, parts="any", size=2):
        pool.submit(Job({}, "", {"trial": name}), Key(parts, Load(kind, (size,))))

    assert (pool.size, pool.free) == (1, 1)
    submit("a1", "a")
    assert (made, pool.free) == ([1.0], 0)
    submit("a2", "a")  # there is no room before the first was measured
    assert set(pool.running) == {"a1"}
    manifest = {"gpu_busy": 0.3, "peak_gpu_bytes": GIB}
    end(pool, "a1", manifest, monkeypatch)
    # the whole actor gives way to one that has a third
    assert (made, len(killed)) == ([1.0, 0.3333], 1)
    assert (pool.size, pool.free) == (3, 2)
    submit("a3", "a")
    submit("a4", "a", "others that do less", size=1)
    assert made == [1.0, *[0.3333] * 3]
    assert pool.free == 0
    submit("b1", "b")  # not measured: it needs the whole
    end(pool, "a2", manifest, monkeypatch)
    end(pool, "a3", manifest, monkeypatch)
    assert set(pool.running) == {"a4"}
    assert pool.free == 0
    end(pool, "a4", manifest, monkeypatch)
    assert set(pool.running) == {"b1"}
    assert (made[-1], len(killed)) == (1.0, 4)
    end(pool, "b1", {"gpu_busy": 0.95, "peak_gpu_bytes": GIB}, monkeypatch)
    submit("b2", "b")
    assert pool.running["b2"].place.share == 1.0
    assert len(made) == 5
    pool.running.clear()
    pool.idle.clear()
    monkeypatch.undo()
    pool.close()


def end(pool, trial, manifest, monkeypatch):
    """Ends a trial that only the pool believes in."""
    item = pool.running[trial]
    with monkeypatch.context() as patch:
        patch.setattr(ray, "get", lambda _: Result("complete", manifest, gpu_bytes=80 * GIB))
        pool._end(item)
    pool._start()
