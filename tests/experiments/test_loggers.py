"""Who is told what a run does: TensorBoard's files read back, MLflow and W&B as they are called, and failures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml
from tensorboardX.proto.event_pb2 import Event, SessionLog

from chiasm.config import load_run
from chiasm.errors import ConfigError
from chiasm.plugin import hookimpl
from chiasm.registry import registry
from chiasm_experiments.loggers import Listeners, chosen
from chiasm_experiments.training.execution import Execution, parse_execution
from chiasm_experiments.training.local import postfix, run_here
from chiasm_experiments.training.run import Job

SHAPE = {"width": 32, "depth": 1, "heads": 2, "kv_heads": 1, "mlp_width": 32, "context_length": 512}
WORLD = {"name": "world", "image_size": 96, "skills": ["colour"]}
STAGE = {"data": {**WORLD, "task": "captions", "size": 8}, "train": ["adapter", "tokens"], "lr": 1e-3, "batch_size": 4}
RUN = {
    "vision": {"encoders": [{"name": "blind", "grid": [2, 2], "width": 16}], "adapter": "mlp"},
    "llm": {"name": "causal", "shape": SHAPE},
    "system": "",
    "stages": [{"name": "first", **STAGE}, {"name": "second", **STAGE, "train": ["adapter", "llm"], "lr": 5e-4}],
    "evaluate": {**WORLD, "size": 2},
}
MANIFEST = {"trial": "t", "study": None, "cell": {"a": "b"}, "run": {"llm": {"name": "x"}}, "workers": 1, "error": None}
MANIFEST |= {"environment": {}, "status": "running"}


def events(folder: Path) -> list[Event]:
    """All events below a folder, from the records of its files: length, checksum, content, checksum."""
    found = []
    for file in sorted(folder.glob("events.out.tfevents.*")):
        data, at = file.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            found.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
    return found


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    return {
        (value.tag, event.step): value.simple_value
        for event in events(folder)
        for value in event.summary.value
        if value.HasField("simple_value")
    }


@pytest.fixture
def job(tmp_path):
    def make(name="run", execution=None, **change) -> Job:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(RUN | change))
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        run = load_run(path).model_dump(mode="json")
        return Job(run, str(folder), {"trial": name, "study": None, "cell": {}}, execution or Execution())

    return make


def test_a_run_tells_tensorboard_the_table_and_the_hooks(job, tmp_path, capsys):
    heard: list[tuple] = []

    class Listener:
        @hookimpl
        def chiasm_run_started(self, manifest):
            heard.append(("started", manifest["status"]))

        @hookimpl
        def chiasm_stage_ended(self, stage, result):
            heard.append(("stage", stage, result["steps"]))

        @hookimpl
        def chiasm_run_ended(self, folder, manifest):
            heard.append(("ended", manifest["status"]))

    listener = Listener()
    registry().plugins.register(listener)
    try:
        manifest = run_here(job(execution=Execution(profile=1)))
    finally:
        registry().plugins.unregister(listener)
    assert heard == [("started", "running"), ("stage", "first", 2), ("stage", "second", 2), ("ended", "complete")]

    folder = tmp_path / "run"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for stage in ("first", "second"):
        wanted = {
            (name, line["step"]): value
            for line in lines
            if line["stage"] == stage
            for name, value in line.items()
            if name not in ("stage", "step")
        }
        assert len(wanted) == 2 * 9
        assert scalars(folder / "tensorboard" / stage) == pytest.approx(wanted, rel=1e-6)
    whole = events(folder / "tensorboard" / "run")
    assert any(
        "causal" in value.tensor.string_val[0].decode()
        for e in whole
        for value in e.summary.value
        if value.tensor.string_val
    )
    assert scalars(folder / "tensorboard" / "run") == {("score/world", 0): pytest.approx(manifest["scores"]["world"])}
    assert (folder / "profile" / "trace.json").is_file()

    rows = {(row["stage"], row["part"]): row for row in manifest["training"]}
    assert len(rows) == 2 * 5
    assert rows["first", "llm"]["trained"] == 0 == rows["second", "llm"]["frozen"]
    assert rows["first", "llm"]["frozen"] == rows["second", "llm"]["trained"] > 0
    assert (rows["first", "llm"]["lr"], rows["second", "llm"]["lr"]) == (None, 5e-4)
    assert rows["second", "tokens"]["trained"] == 0
    printed = [line.split() for line in capsys.readouterr().err.splitlines() if line.startswith("second")]
    counts = f"{rows['second', 'llm']['trained']:,}"
    assert ["second", "llm", counts, "0", "0.0005", "(adamw)", "float32", "float32"] in printed


def test_a_killed_run_hides_the_steps_that_it_repeats(tmp_path):
    for first in (1, 3):
        with Listeners(["tensorboard"], asked=True) as listeners:
            for step in range(first, first + 4):
                values = {"stage": "s", "step": step, "metrics": {"loss": float(10 * first + step)}}
                listeners.tell("chiasm_metrics", folder=tmp_path, **values)
            listeners.tell("chiasm_stage_ended", folder=tmp_path, stage="s", result={})
    starts = [
        event.step for event in events(tmp_path / "tensorboard" / "s") if event.session_log.status == SessionLog.START
    ]
    assert starts == [1, 3]


def test_a_listener_that_fails_is_reported_once_and_the_run_goes_on(job, tmp_path):
    calls = []

    class Broken:
        @hookimpl
        def chiasm_metrics(self, step):
            calls.append(step)
            raise OSError("disk full")

    broken, said = Broken(), []
    registry().plugins.register(broken, name="stranger")
    try:
        with Listeners(["tensorboard"], asked=True, say=said.append) as listeners:
            for step in (1, 2, 3):
                listeners.tell("chiasm_metrics", folder=tmp_path, stage="s", step=step, metrics={"loss": 1.0})
            listeners.tell("chiasm_run_ended", folder=tmp_path, manifest=MANIFEST)
    finally:
        registry().plugins.unregister(broken)
    assert calls == [1]
    assert said == ["stranger failed in chiasm_metrics and is told no more: OSError: disk full"]
    assert [step for _, step in scalars(tmp_path / "tensorboard" / "s")] == [1, 2, 3]


def test_a_run_that_fails_is_told_with_its_error(tmp_path):
    ended = []

    class Listener:
        @hookimpl
        def chiasm_run_ended(self, manifest):
            ended.append((manifest["status"], manifest["error"]))

    def fail():
        with Listeners([], asked=False) as listeners:
            listeners.tell("chiasm_run_started", folder=tmp_path, manifest=MANIFEST)
            raise ValueError("broke")

    listener = Listener()
    registry().plugins.register(listener)
    try:
        with pytest.raises(ValueError, match="broke"):
            fail()
    finally:
        registry().plugins.unregister(listener)
    assert ended == [("failed", "ValueError: broke")]


def test_which_loggers_a_run_has(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    assert chosen("auto") == ["tensorboard"]
    monkeypatch.setenv("WANDB_PROJECT", "p")
    assert chosen("auto") == ["tensorboard", "wandb"]
    assert chosen(()) == []
    assert parse_execution(["loggers=wandb,tensorboard"]).loggers == ("wandb", "tensorboard")
    assert parse_execution(["loggers=none"]).loggers == ()
    with pytest.raises(ConfigError, match="loggers.*'tensorboard', 'mlflow' or 'wandb'"):
        parse_execution(["loggers=tensorbord"])


def test_a_logger_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delitem(sys.modules, "chiasm_experiments.loggers.wandb", raising=False)
    with pytest.raises(ConfigError, match=r'pip install "chiasm-experiments\[wandb\]"'):
        Listeners(["tensorboard", "wandb"], asked=True)
    said = []
    with Listeners(["wandb"], asked=False, say=said.append):
        pass
    assert "goes on without it" in said[0]
    names = [name for name, _ in registry().plugins.list_name_plugin()]
    assert not any("tensorboard" in name for name in names)


@pytest.fixture
def fake_wandb(monkeypatch):
    made = []

    class Run:
        def __init__(self, **given):
            self.given, self.rows, self.summary, self.ended, self.axes = given, [], {}, None, {}
            made.append(self)

        def define_metric(self, name, step_metric):
            self.axes[name] = step_metric

        def log(self, values):
            self.rows.append(values)

        def finish(self, exit_code):
            self.ended = exit_code

    module = ModuleType("wandb")
    module.init = lambda **given: Run(**given)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delitem(sys.modules, "chiasm_experiments.loggers.wandb", raising=False)
    return made


def tell_a_run(folder: Path, name: str, said: list[str], steps=(1, 2), status="complete") -> None:
    with Listeners([name], asked=True, say=said.append) as listeners:
        listeners.tell("chiasm_run_started", folder=folder, manifest=MANIFEST | {"study": "study"})
        for step in steps:
            listeners.tell(
                "chiasm_metrics", folder=folder, stage="s", step=step, metrics={"loss": 1.0 / step, "lr": 0.1}
            )
        listeners.tell("chiasm_stage_ended", folder=folder, stage="s", result={})
        ended = MANIFEST | {"study": "study", "status": status, "scores": {"world": 0.5}}
        listeners.tell("chiasm_run_ended", folder=folder, manifest=ended)


def test_wandb_is_told_and_a_run_is_taken_up(tmp_path, fake_wandb):
    said: list[str] = []
    tell_a_run(tmp_path, "wandb", said)
    tell_a_run(tmp_path, "wandb", said, status="failed")
    (tmp_path / "other").mkdir()
    tell_a_run(tmp_path / "other", "wandb", said)
    first, second, other = fake_wandb
    assert not said
    assert first.rows == [{"s/step": 1, "s/loss": 1.0, "s/lr": 0.1}, {"s/step": 2, "s/loss": 0.5, "s/lr": 0.1}]
    assert first.axes == {"s/*": "s/step"}
    assert first.summary == {"score/world": 0.5}
    assert (first.ended, second.ended) == (0, 1)
    assert first.given["id"] == second.given["id"] != other.given["id"]
    assert (first.given["name"], first.given["group"]) == ("t", "study")
    assert first.given["config"]["cell"] == {"a": "b"}


@pytest.fixture
def fake_mlflow(monkeypatch):
    server = SimpleNamespace(experiments={}, runs={})

    class MlflowClient:
        def get_experiment_by_name(self, name):
            return SimpleNamespace(experiment_id=server.experiments[name]) if name in server.experiments else None

        def create_experiment(self, name):
            return server.experiments.setdefault(name, f"e{len(server.experiments)}")

        def create_run(self, experiment_id, run_name, tags):
            run_id = f"r{len(server.runs)}"
            server.runs[run_id] = SimpleNamespace(experiment=experiment_id, metrics=[], params={}, status="RUNNING")
            return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

        def update_run(self, run_id, status):
            server.runs[run_id].status = status

        def log_batch(self, run_id, metrics=(), params=(), tags=(), synchronous=None):
            assert len(metrics) <= 1000
            assert len(params) <= 100
            server.runs[run_id].metrics += [(m.key, m.step, m.value) for m in metrics]
            server.runs[run_id].params |= {p.key: p.value for p in params}

        def set_terminated(self, run_id, status):
            server.runs[run_id].status = status

    package, entities = ModuleType("mlflow"), ModuleType("mlflow.entities")
    package.MlflowClient = MlflowClient
    entities.Metric = lambda key, value, timestamp, step: SimpleNamespace(key=key, value=value, step=step)
    entities.Param = lambda key, value: SimpleNamespace(key=key, value=value)
    entities.RunTag = lambda key, value: SimpleNamespace(key=key, value=value)
    monkeypatch.setitem(sys.modules, "mlflow", package)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    monkeypatch.delitem(sys.modules, "chiasm_experiments.loggers.mlflow", raising=False)
    return server


def test_mlflow_is_told_and_a_run_is_taken_up(tmp_path, fake_mlflow):
    said: list[str] = []
    tell_a_run(tmp_path, "mlflow", said, steps=range(1, 1200))
    tell_a_run(tmp_path, "mlflow", said, status="failed")
    (tmp_path / "other").mkdir()
    tell_a_run(tmp_path / "other", "mlflow", said)
    assert not said
    assert list(fake_mlflow.experiments) == ["study"]
    assert list(fake_mlflow.runs) == ["r0", "r1"]
    first = fake_mlflow.runs["r0"]
    losses = [(step, value) for key, step, value in first.metrics if key == "s/loss"]
    assert losses == [(step, 1.0 / step) for step in [*range(1, 1200), 1, 2]]
    assert first.params == {"llm.name": "x", "workers": "1", "a": "b"}
    assert (first.status, fake_mlflow.runs["r1"].status) == ("FAILED", "FINISHED")


def test_a_bar_says_what_a_step_came_to():
    metrics = {"loss": 2.31, "tokens_per_second": 5200.0, "model_flop_utilisation": 0.412, "data_wait": 0.03}
    assert (
        postfix(metrics | {"peak_memory_bytes": 12.1 * 2**30}) == "loss 2.310, 5.2k tok/s, MFU 41%, data 3%, 12.1 GiB"
    )
    assert postfix({}) == ""
