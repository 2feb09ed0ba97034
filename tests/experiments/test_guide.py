"""Runs that are stopped, judged at rungs, and pruned."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from chiasm.config import load_run
from chiasm_experiments.evaluation import load_benchmarks
from chiasm_experiments.interfaces import Question
from chiasm_experiments.training.execution import Execution
from chiasm_experiments.training.files import CURVE, MANIFEST, METRICS
from chiasm_experiments.training.guide import StoppedError, Unguided
from chiasm_experiments.training.local import Signals
from chiasm_experiments.training.run import Job, execute
from chiasm_experiments.training.rungs import spread
from chiasm_experiments.training.shared import claim
from chiasm_experiments.training.workers import Workers

ALONE = Workers(0, 1, torch.device("cpu"))
STEPS = 8
SHAPE = {"width": 32, "depth": 1, "heads": 2, "kv_heads": 1, "mlp_width": 32, "context_length": 512}
CLIP = {"image_size": 28, "patch_size": 14, "width": 16, "depth": 2, "heads": 2, "mlp_width": 16}
WORLD = {"name": "world", "image_size": 96, "skills": ["colour", "existence"]}
STAGE = {"train": ["adapter", "tokens"], "lr": 1e-2, "batch_size": 4}
RUN = {
    "vision": {"encoders": [{"name": "clip", "shape": CLIP}], "adapter": "mlp"},
    # dropout, so that random numbers that a rung drew would be seen
    "llm": {"name": "causal", "shape": SHAPE, "lora": {"rank": 2, "dropout": 0.5}},
    "system": "",
    "stages": [
        {"name": "pretrain", "data": {**WORLD, "task": "captions", "size": 8}, **STAGE, "steps": 2},
        {"name": "finetune", "data": {**WORLD, "task": "dialogues", "size": 8}, **STAGE, "steps": STEPS}
        | {"train": ["adapter", "tokens", "llm"]},
    ],
    "evaluate": {**WORLD, "size": 10},
}
RUNGS = (0.25, 0.5)


@pytest.fixture
def make(tmp_path):
    """A job of RUN with some fields of Job changed."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(RUN))
    values = load_run(path).model_dump(mode="json")

    def job(name, **change) -> Job:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        labels = {"trial": name, "study": None, "cell": {}}
        return Job(values, str(folder), labels, **{"execution": Execution(loggers=()), "rung_questions": 4} | change)

    return job


class Judge(Unguided):
    """Stops after something was told, prunes at a rung, and notes what it is told."""

    def __init__(self, stop=None, prune=None):
        self.stop = stop
        self.prune = prune
        self.steps: list[tuple[str, int]] = []
        self.reports: list[tuple[int, float, list[float | None]]] = []

    def progress(self, what, step, steps, metrics):
        self.steps.append((what, step))

    def stopping(self):
        return self.steps[-1] == self.stop

    def report(self, rung, share, scores):
        self.reports.append((rung, share, scores))
        return rung != self.prune

    def trained(self):
        return [step for what, step in self.steps if what == "finetune"]


def run(job, guide=None):
    return execute(job, guide or Unguided(), workers=ALONE)


def weights(tmp_path, name):
    files = (tmp_path / name / "stages" / "finetune").glob("*.safetensors")
    return {f"{file.stem}.{key}": value for file in files for key, value in load_file(file).items()}


def same(one, two):
    return bool(one) and one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_rungs_change_nothing_of_what_is_learned(make, tmp_path):
    without = run(make("without"))
    judge = Judge()
    found = run(make("with", rungs=RUNGS), judge)
    assert same(weights(tmp_path, "with"), weights(tmp_path, "without"))
    assert found["scores"] == without["scores"]
    assert [(rung, share, len(scores)) for rung, share, scores in judge.reports] == [(0, 0.25, 4), (1, 0.5, 4)]
    curve = json.loads((tmp_path / "with" / CURVE).read_text())
    assert curve == found["curve"]
    assert [(point["rung"], point["share"], point["step"]) for point in curve] == [(0, 0.25, 2), (1, 0.5, 4)]
    for point, (_, _, scores) in zip(curve, judge.reports, strict=True):
        assert point["scores"] == scores
        assert point["accuracy"] == pytest.approx(sum(scores) / len(scores))
    assert without["curve"] == []
    assert 0 < found["first_step_seconds"] < found["seconds"]["total"]
    # a question's time is not training's
    log = [json.loads(line) for line in (tmp_path / "with" / METRICS).read_text().splitlines()]
    steps = sum(line["step_seconds"] for line in log if line["stage"] == "finetune")
    assert found["stages"][1]["seconds"] == pytest.approx(steps, abs=0.2)


def test_a_stopped_run_goes_on_where_it_was_and_reports_its_rungs_again(make, tmp_path):
    # features that were kept in memory would be computed again, in other batches and so with other roundings
    live = {"rungs": RUNGS, "execution": Execution(loggers=(), cache="off")}
    whole = Judge()
    run(make("whole", **live), whole)
    # while a rung's questions are asked, after they are, and between two rungs
    for place, (stop, step, reported) in enumerate(
        [(("rung 0", 2), 2, 0), (("rung 0", 4), 2, 1), (("finetune", 3), 3, 1)]
    ):
        job, first, second = make(f"stopped {place}", **live), Judge(stop), Judge()
        job.run["evaluation_batch_size"] = 2
        with pytest.raises(StoppedError, match=f"'finetune' was stopped after step {step} of 8"):
            run(job, first)
        folder = tmp_path / f"stopped {place}"
        assert json.loads((folder / MANIFEST).read_text())["status"] == "running"
        assert [path.name for path in (folder / "stages" / "finetune").glob("*")] == [f"checkpoint-0000000{step}"]
        assert run(job, second)["status"] == "complete"
        assert first.trained() + second.trained() == list(range(1, STEPS + 1))
        assert first.reports == whole.reports[:reported]
        assert second.reports == whole.reports
        assert ("rung 0", 4) in second.steps or reported
        assert ("rung 0", 4) not in second.steps or not reported
        assert same(weights(tmp_path, folder.name), weights(tmp_path, "whole"))


def test_a_pruned_run_says_so_and_leaves_no_checkpoint(make, tmp_path):
    job = make("pruned", rungs=RUNGS, execution=Execution(loggers=(), checkpoint_seconds=0))
    manifest = run(job, Judge(prune=1))
    assert manifest == json.loads((tmp_path / "pruned" / MANIFEST).read_text())
    assert (manifest["status"], manifest["rung"]) == ("pruned", 1)
    assert [point["rung"] for point in manifest["curve"]] == [0, 1]
    assert [stage["name"] for stage in manifest["stages"]] == ["pretrain"]
    assert manifest["seconds"]["train"] > manifest["stages"][0]["seconds"]
    assert "scores" not in manifest
    assert not list((tmp_path / "pruned").rglob("*checkpoint-*"))
    again = Judge()
    assert run(job, again) == manifest
    assert not again.steps
    # who judges no more gets the whole run
    assert run(make("pruned"))["status"] == "complete"
    run(make("whole"))
    assert same(weights(tmp_path, "pruned"), weights(tmp_path, "whole"))


def test_a_stop_ends_the_evaluation_and_the_wait_for_another_run(make, tmp_path):
    class During(Judge):
        def stopping(self):
            return self.steps[-1][0] == "evaluate"

    job = make("evaluated")
    job.run["evaluation_batch_size"] = 4
    with pytest.raises(StoppedError, match="after 4 of 10 questions"):
        run(job, During())
    found = Judge()
    assert run(job, found)["status"] == "complete"
    assert [step for what, step in found.steps if what == "evaluate"] == [4, 8, 10]
    assert not found.trained()

    held = claim(tmp_path / "store", "key", ALONE, lambda: None)
    with held as mine, pytest.raises(StoppedError), claim(tmp_path / "store", "key", ALONE, lambda: None, lambda: True):
        pytest.fail("two runs hold one stage")
    assert not mine.finished
    with claim(tmp_path / "store", "key", ALONE, lambda: None):
        pass  # it is free again


def test_a_stopped_run_leaves_a_common_stage_to_others(make, tmp_path):
    execution = Execution(loggers=(), stages_folder=tmp_path / "stages")
    with pytest.raises(StoppedError):
        run(make("first", execution=execution), Judge(("finetune", 3)))
    judge = Judge()
    assert run(make("second", execution=execution), judge)["status"] == "complete"
    assert judge.trained() == list(range(4, STEPS + 1))
    # one that is pruned in a stage that others have too leaves it as it was before
    execution = Execution(loggers=(), stages_folder=tmp_path / "others")
    assert run(make("pruned", execution=execution, rungs=RUNGS), Judge(prune=0))["status"] == "pruned"
    assert len([path for path in (tmp_path / "others").iterdir() if path.is_dir()]) == 1


def test_questions_of_a_rung_are_spread_over_skills_and_the_same_in_any_order():
    questions = [Question(f"q{i}", "?", ("a",), (), "c", "often" if i % 4 else "rare", 0.0) for i in range(40)]
    some = spread(questions, 8)
    assert [q.skill for q in some].count("rare") == 2
    assert [questions.index(q) for q in some] == sorted(questions.index(q) for q in some)
    assert {q.id for q in spread(questions[::-1], 8)} == {q.id for q in some}
    assert {q.id for q in spread(questions, 4)} < {q.id for q in some}
    assert spread(questions, 99) == questions
    # a cycle of skills would let questions at even distances be of one kind
    benchmark = load_benchmarks(load_run_value()["evaluate"])["world"]
    assert {q.skill for q in spread(benchmark.questions(), 2)} == {"colour", "existence"}


def load_run_value():
    from chiasm.config import RunConfig

    return {"evaluate": RunConfig.model_validate(RUN).evaluate}


def test_sigterm_lets_chiasm_train_write_a_checkpoint(make, tmp_path):
    long = RUN | {"stages": [RUN["stages"][1] | {"steps": 5000}]}
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(long))
    words = ["train", "long.yaml", "--out", "out", "--set", "cache=off", "--set", "loggers=none"]
    command = [sys.executable, "-m", "chiasm.cli", *words]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    log = tmp_path / "out" / METRICS
    until = time.monotonic() + 100
    while not log.is_file() or log.read_bytes().count(b"\n") < 3:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in errors
    assert "SIGTERM: writing a checkpoint" in errors
    assert "to go on from there, give the same command again" in errors
    (checkpoint,) = (tmp_path / "out").glob("stages/finetune/checkpoint-*")
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert int(checkpoint.name.partition("-")[2]) == steps[-1] == len(steps)


def test_the_second_signal_ends_the_process(tmp_path):
    told: list[str] = []
    with Signals("out", told.append) as signals:
        assert signals.received is None
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
    assert len(told) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    code = (
        "import os, signal; from chiasm_experiments.training.local import Signals; entered = Signals('out').__enter__()"
    )
    code += "; [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]; print('alive')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == -signal.SIGINT
    assert "alive" not in ended.stdout
