"""Stages that runs have in common: trained once, taken up by another run, and never taken for one another."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from chiasm.config import RunConfig, load_run
from chiasm_experiments.data.llava import LlavaConfig, LlavaDataset
from chiasm_experiments.data.mixture import load_mixture
from chiasm_experiments.study.cells import make_cells, make_trials
from chiasm_experiments.study.config import Study
from chiasm_experiments.study.sharing import Sharing
from chiasm_experiments.training import shared
from chiasm_experiments.training.execution import Execution
from chiasm_experiments.training.files import METRICS
from chiasm_experiments.training.guide import Unguided
from chiasm_experiments.training.identity import stage_key
from chiasm_experiments.training.local import evaluate_here
from chiasm_experiments.training.run import Job, execute, load_run_folder
from chiasm_experiments.training.shared import claim, refer, stage_folder
from chiasm_experiments.training.workers import Workers

ALONE = Workers(0, 1, torch.device("cpu"))
SHAPE = {"width": 32, "depth": 1, "heads": 2, "kv_heads": 1, "mlp_width": 32, "context_length": 512}
CLIP = {"image_size": 28, "patch_size": 14, "width": 16, "depth": 2, "heads": 2, "mlp_width": 16}
WORLD = {"name": "world", "image_size": 96, "skills": ["colour"], "size": 8}
STAGE = {"train": ["fusion", "adapter", "tokens"], "lr": 1e-3, "batch_size": 4}
RUN = {
    "vision": {"encoders": [{"name": "clip", "shape": CLIP}], "adapter": "mlp"},
    "llm": {"name": "causal", "shape": SHAPE},
    "system": "",
    "stages": [
        {"name": "pretrain", "data": {**WORLD, "task": "captions"}, **STAGE},
        {"name": "finetune", "data": {**WORLD, "task": "dialogues"}, **STAGE, "train": ["adapter", "llm"]},
    ],
    "evaluate": {**WORLD, "size": 4},
}


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A job of RUN whose second stage has a learning rate of its own, sharing what it can."""
    monkeypatch.setattr(Workers, "current", classmethod(lambda cls: ALONE))

    def job(name, lr=1e-3, common=1, **change) -> Job:
        run = RUN | change
        run["stages"] = [run["stages"][0], run["stages"][1] | {"lr": lr}]
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(run))
        folder = tmp_path / "trials" / name
        folder.mkdir(parents=True, exist_ok=True)
        execution = Execution(stages_folder=tmp_path / "stages", checkpoint_seconds=0)
        values = load_run(path).model_dump(mode="json")
        return Job(values, str(folder), {"trial": name, "study": None, "cell": {}}, execution, common)

    return job


class Told(Unguided):
    """A guide that tells a function of the progress."""

    def __init__(self, tell=lambda *_: None):
        self.progress = tell


quiet = Unguided()


def weights(folder, stage):
    place = stage_folder(folder / "stages" / stage)
    return {f"{file.stem}.{k}": v for file in place.glob("*.safetensors") for k, v in load_file(file).items()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def steps(folder):
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [(line["stage"], line["step"], line["loss"]) for line in lines]


def test_a_common_stage_is_trained_once_and_changes_no_result(make, tmp_path):
    first = execute(make("slow"), quiet)
    second = execute(make("fast", lr=1e-2), quiet)
    alone = execute(make("alone", lr=1e-2, common=0), quiet)
    assert [stage["shared"] for stage in first["stages"]] == [False, False]
    assert [stage["shared"] for stage in second["stages"]] == [True, False]
    assert first["seconds"]["shared"] == 0
    assert second["seconds"]["shared"] == first["stages"][0]["seconds"] == second["stages"][0]["seconds"] > 0
    (folder,) = (tmp_path / "stages").glob("[!.]*")
    trials = tmp_path / "trials"
    assert {path.name for path in trials.glob("*/stages/pretrain/*.safetensors")} > {"adapter.safetensors"}
    assert not list((trials / "fast").glob("stages/pretrain/*.safetensors"))
    assert stage_folder(trials / "fast" / "stages" / "pretrain") == folder
    for stage in ("pretrain", "finetune"):
        assert same(weights(trials / "fast", stage), weights(trials / "alone", stage))
    assert not same(weights(trials / "fast", "finetune"), weights(trials / "slow", "finetune"))
    assert second["scores"] == alone["scores"]

    assert steps(trials / "fast") == steps(trials / "alone")
    assert [stage["name"] for stage in second["stages"]] == ["pretrain", "finetune"]


def test_runs_that_differ_in_the_evaluation_alone_share_every_stage(make, tmp_path):
    execute(make("few", common=None), quiet)
    more = execute(make("more", common=None, evaluate={**WORLD, "size": 6}), quiet)
    assert [stage["shared"] for stage in more["stages"]] == [True, True]
    rows, scores = evaluate_here(tmp_path / "trials" / "more")
    assert len(rows) == 6
    assert scores == more["scores"]
    # moved as a whole, a study still finds its stages
    (tmp_path / "study").mkdir()
    for name in ("trials", "stages"):
        (tmp_path / name).rename(tmp_path / "study" / name)
    moved = load_run_folder(tmp_path / "study" / "trials" / "more")[1]
    held = weights(tmp_path / "study" / "trials" / "more", "finetune")
    assert torch.equal(moved.adapter.state_dict()["layers.0.weight"], held["adapter.layers.0.weight"])


def test_a_run_that_dies_in_a_common_stage_is_taken_up_by_another(make, tmp_path):
    class DiedError(Exception):
        pass

    def dies(what, step, *_):
        if (what, step) == ("pretrain", 3):
            raise DiedError

    long = {"stages": [RUN["stages"][0] | {"steps": 5}, RUN["stages"][1]]}
    with pytest.raises(DiedError):
        execute(make("first", **long), Told(dies))
    seen = []
    second = execute(make("second", lr=1e-2, **long), Told(lambda what, step, *_: seen.append((what, step))))
    assert [step for what, step in seen if what == "pretrain"] == [3, 4, 5]
    assert second["stages"][0]["shared"] is False
    execute(make("alone", lr=1e-2, common=0, **long), quiet)
    trials = tmp_path / "trials"
    assert same(weights(trials / "second", "pretrain"), weights(trials / "alone", "pretrain"))
    assert steps(trials / "second") == steps(trials / "alone")
    # the one that died finds the stage finished, by another
    again = execute(make("first", **long), quiet)
    assert [stage["shared"] for stage in again["stages"]] == [True, False]
    assert not list((tmp_path / "stages").rglob("checkpoint-*"))


def finish(folder) -> None:
    """Leaves in a folder what a trained stage leaves."""
    (folder / "parts.json").write_text("[]")


def test_of_runs_that_start_at_once_one_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "POLL_SECONDS", 0.01)
    trained, waited = [], []
    start = threading.Barrier(4)

    def run(name):
        start.wait()
        with claim(tmp_path, "key", ALONE, lambda: waited.append(name)) as stage:
            if not stage.finished:
                time.sleep(0.1)
                trained.append(name)
                finish(stage.folder)
            stage.publish()
        assert stage.folder == tmp_path / "key"

    threads = [threading.Thread(target=run, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(trained) == 1
    assert set(waited) == set(range(4)) - set(trained)
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["key"]


HOLDER = """
import fcntl, pathlib, platform, sys, time
store = pathlib.Path(sys.argv[1])
file = (store / ".key.lock").open("ab")
fcntl.flock(file, fcntl.LOCK_EX)
folder = store / f".key@{platform.node()}"
folder.mkdir()
(folder / "checkpoint-00000007").mkdir()
print("held", flush=True)
time.sleep(60)
"""


def test_a_killed_run_leaves_its_work_to_the_one_that_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "POLL_SECONDS", 0.01)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    waits = []

    def waiting():
        waits.append(time.monotonic())
        if len(waits) == 5:
            holder.send_signal(signal.SIGKILL)
            holder.wait()

    with claim(tmp_path, "key", ALONE, waiting) as stage:
        assert len(waits) >= 5
        assert not stage.finished
        assert (stage.folder / "checkpoint-00000007").is_dir()
    holder.stdout.close()


def test_a_folder_of_another_machine_is_taken_over_when_it_is_quiet(tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(shared, "QUIET_SECONDS", 0.1)
    other = tmp_path / ".key@elsewhere"
    (other / "checkpoint-00000007").mkdir(parents=True)
    with claim(tmp_path, "key", ALONE, lambda: None) as stage:
        assert (stage.folder / "checkpoint-00000007").is_dir()
        assert not other.exists()


def test_where_locks_do_not_reach_both_train_and_the_first_result_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "POLL_SECONDS", 0.01)
    other = tmp_path / ".key@elsewhere"
    other.mkdir()
    finish(other)
    with claim(tmp_path, "key", ALONE, lambda: os.utime(other)) as stage:
        assert not stage.finished
        finish(stage.folder)
        (other / "by").write_text("the other")
        other.rename(tmp_path / "key")
        assert stage.publish() is False
    assert (tmp_path / "key" / "by").read_text() == "the other"
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["key"]


def test_without_any_locks_a_stage_is_trained_all_the_same(tmp_path, monkeypatch):
    def refuses(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuses)
    with claim(tmp_path, "key", ALONE, lambda: None) as stage:
        assert stage.folder.name.endswith(f"-{os.getpid()}")
        finish(stage.folder)
        assert stage.publish()
    with claim(tmp_path, "key", ALONE, lambda: None) as stage:
        assert stage.finished


ENVIRONMENT = {"packages": {"torch": "1"}, "plugins": {"mine": "1"}, "git_revision": "a", "gpu": "x"}


def key(values, index=0, dtype=torch.float32, parts=(), **environment_):
    run = RunConfig.model_validate(values)
    mixtures = [load_mixture(stage.data) for stage in run.stages]
    return stage_key(run, index, mixtures, dtype, ENVIRONMENT | environment_, parts)


def changed(*path, value):
    values = json.loads(json.dumps(RUN))
    node = values
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    return values


def test_the_key_holds_what_the_result_depends_on_and_nothing_else():
    mine = key(RUN)
    assert key(changed("evaluate", value=[])) == mine
    assert key(changed("stages", 1, "lr", value=1.0)) == mine
    assert key(changed("stages", 0, "micro_batch_size", value=1)) == mine
    assert key(RUN, gpu="y") == mine
    others = [
        key(RUN, index=1),
        key(RUN, dtype=torch.bfloat16),
        key(RUN, packages={"torch": "2"}),
        key(RUN, plugins={"mine": "2"}),
        key(RUN, git_revision="b"),
        key(changed("seed", value=1)),
        key(changed("system", value="x")),
        key(changed("llm", "shape", "depth", value=2)),
        key(changed("tokens", value={"turns": "template"})),
        key(changed("vision", "adapter", value="linear")),
        key(changed("vision", "encoders", 0, "layers", value=-1)),
        key(changed("vision", "image", value={"resize": "squash"})),
        key(changed("stages", 0, "lr", value=1.0)),
        key(changed("stages", 0, "data", "size", value=9)),
    ]
    assert len({mine, *others}) == 1 + len(others)
    # in bfloat16 a random part that a later stage trains is kept more finely; in float32 it makes no difference
    frozen = changed("stages", 1, "train", value=["adapter"])
    assert key(frozen, parts=["llm"]) == key(RUN, parts=["llm"])
    assert key(frozen, dtype=torch.bfloat16, parts=["llm"]) != key(RUN, dtype=torch.bfloat16, parts=["llm"])


def test_the_key_holds_the_content_of_files(tmp_path):
    data = LlavaDataset.tiny()
    config = LlavaConfig(file=data.config.file)
    before = LlavaDataset(config).identity()
    assert LlavaDataset(config).identity() == before
    content = config.file.read_text()
    config.file.write_text(content.replace("Red", "Rot"))
    assert LlavaDataset(config).identity() != before
    config.file.write_text(content)
    assert LlavaDataset(config).identity() == before

    weights_file = tmp_path / "model" / "model.safetensors"
    weights_file.parent.mkdir()
    weights_file.write_bytes(b"1")
    values = changed("llm", value={"name": "causal", "pretrained": str(tmp_path / "model")})
    first = key(values)
    assert key(values) == first
    os.utime(weights_file, ns=(1, 1))
    assert key(values) != first


def test_trials_that_would_wait_are_started_later(tmp_path):
    run = json.loads(json.dumps(RUN))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    study = {
        "name": "s",
        "base": "run.yaml",
        "factors": {"vision.adapter": ["mlp", "linear"], "stages.finetune.lr": [1e-3, 1e-2]},
        "seeds": [0, 1],
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    loaded = Study(tmp_path / "study.yaml")
    trials = make_trials(loaded, make_cells(loaded))
    sharing = Sharing(tmp_path / "trials", trials)
    for trial in trials:
        sharing.add(trial.name, trial)
    names = [trial.name for trial in trials]  # mlp slow, mlp fast, linear slow, linear fast; then seed 1
    assert {sharing.common(name) for name in names} == {1}
    assert [sharing.would_wait(name, [names[0]]) for name in names] == [False, True] + [False] * 6
    assert [sharing.would_wait(name, [names[0], names[6]]) for name in names[1:]] == [True, *[False] * 5, True]
    done = tmp_path / "stages" / "key"
    done.mkdir(parents=True)
    finish(done)
    refer(tmp_path / "trials" / names[0] / "stages" / "pretrain", "key", done)
    assert not any(sharing.would_wait(name, [names[0]]) for name in names)


@pytest.mark.parametrize(("pretrained", "alike"), [(None, 4), ("some/clip", 8)])
def test_trials_that_want_the_same_features_are_counted(tmp_path, pretrained, alike):
    """Those of random encoders differ between seeds."""
    shape = {"image_size": 28, "patch_size": 14, "width": 8, "depth": 1, "heads": 1, "mlp_width": 8}
    options = {"shape": shape} if pretrained is None else {"pretrained": pretrained}
    run = RunConfig.model_validate(json.loads(json.dumps(RUN)) | {"vision": {"encoders": [{"name": "clip"} | options]}})
    runs = [
        run.model_copy(
            update={"seed": seed, "stages": (*run.stages[:-1], run.stages[-1].model_copy(update={"lr": lr}))}
        )
        for seed in (0, 1)
        for lr in (1e-4, 1e-3, 1e-2, 1e-1)
    ]
    trials = [SimpleNamespace(run=each) for each in runs]
    known, unknown = Sharing(tmp_path, trials), Sharing(tmp_path, None)
    for sharing, wanted in ((known, alike), (unknown, 2)):
        for place, trial in enumerate(trials):
            sharing.add(str(place), trial)
        assert {sharing.alike(str(place)) for place in range(8)} == {wanted}


def test_trials_that_train_their_encoders_want_no_features(tmp_path):
    frozen = RunConfig.model_validate(RUN)
    last = frozen.stages[-1]
    trained = frozen.model_copy(
        update={"stages": (*frozen.stages[:-1], last.model_copy(update={"train": (*last.train, "encoders")}))}
    )
    sharing = Sharing(tmp_path, [SimpleNamespace(run=run) for run in (frozen, trained, trained)])
    sharing.add("frozen", SimpleNamespace(run=frozen))
    assert sharing.alike("frozen") == 1


@pytest.mark.slow
def test_a_study_of_the_second_stage_trains_the_first_once_for_each_seed(tmp_path):
    """Through Ray, two trials at a time."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    study = {
        "name": "common",
        "base": "run.yaml",
        "factors": {"stages.finetune.lr": [1e-3, 1e-2]},
        "seeds": [0, 1],
        "resources": {"cpus_per_worker": 0.5, "concurrent": 2, "loggers": []},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    command = [sys.executable, "-m", "chiasm.cli", "sweep", "study.yaml", "--json"]
    variables = os.environ | {"CHIASM_RUNS": str(tmp_path), "RAY_AUTH_MODE": "disabled"}

    result = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    files = sorted((tmp_path / "common" / "trials").glob("*/manifest.json"))
    manifests = [json.loads(file.read_text()) for file in files]
    assert len(manifests) == 4
    for seed in (0, 1):
        of_seed = [manifest["stages"] for manifest in manifests if manifest["seed"] == seed]
        assert sorted(first["shared"] for first, _ in of_seed) == [False, True]
        assert not any(second["shared"] for _, second in of_seed)
    stages = {path.name for path in (tmp_path / "common" / "stages").glob("[!.]*")}
    assert len(stages) == 2
    assert "time saved by shared stages" in (tmp_path / "common" / "report.md").read_text()
