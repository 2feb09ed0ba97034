"""`chiasm watch`: what a study's folder tells, while others write to it."""

from __future__ import annotations

import json
import os
import sys
import time
import types

import numpy as np
import optuna
import pandas as pd
import pytest
import yaml
from click.testing import CliRunner
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState

from chiasm.errors import ConfigError
from chiasm_experiments.report.statistics import accuracy_interval
from chiasm_experiments.snapshot import look
from chiasm_experiments.study.storage import open_storage
from chiasm_experiments.watch import as_text, find, watch

PATH = "vision.adapter"
LABELS = ["linear", "mlp", "resampler"]
LEVELS = {PATH: CategoricalDistribution(LABELS)}
IMAGES = [0, 0, 1, 1, 2, 3, 4, 4]


def cell(label: str) -> dict[str, str]:
    return {PATH: label, "llm": "tiny"}


TRIALS = {
    "linear-s0": (cell("linear"), 0, "full", TrialState.COMPLETE),
    "linear-s1": (cell("linear"), 1, "full", TrialState.COMPLETE),
    "mlp-s0": (cell("mlp"), 0, "full", TrialState.COMPLETE),
    "mlp-s1": (cell("mlp"), 1, "full", TrialState.RUNNING),
    "small-s0": (cell("resampler"), 0, "small", TrialState.COMPLETE),
    "pruned-s0": (cell("resampler"), 1, "small", TrialState.PRUNED),
    "failed-s0": (cell("resampler"), 0, "full", TrialState.FAIL),
    "waiting-s0": (cell("resampler"), 1, "full", TrialState.WAITING),
}
SCORES = {
    "linear-s0": [1, 0, 1, 1, 0, 0, 1, 0],
    "linear-s1": [1, 1, 1, 1, 0, 0, 1, 1],
    "mlp-s0": [1, 1, 1, 1, 1, 0, 1, 1],
    "small-s0": [1, 1, 1, 1, 1, 1, 1, 1],
}


@pytest.fixture
def folder(tmp_path):
    """A study in the middle of its work."""
    root = tmp_path / "runs" / "adapters"
    plan = {
        "name": "adapters",
        "question": "Which adapter?",
        "factors": {PATH: LABELS, "llm": ["tiny"]},
        "fidelities": ["small", "full"],
        "revision": 2,
        "id": "abc",
        "config": {"budget": {"gpu_hours": 8.0, "money": 40.0, "price_per_gpu_hour": 5.0}},
        "trials": {n: {"levels": c, "seed": s, "fidelity": f} for n, (c, s, f, _) in TRIALS.items()},
    }
    for name, (levels, seed, fidelity, state) in TRIALS.items():
        trial = root / "trials" / name
        if state is TrialState.WAITING:
            continue
        trial.mkdir(parents=True)
        status = {"COMPLETE": "complete", "RUNNING": "running", "PRUNED": "pruned", "FAIL": "failed"}[state.name]
        manifest = {"trial": name, "cell": levels, "seed": seed, "fidelity": fidelity, "status": status}
        manifest |= {"workers": 2, "seconds": {"total": 900.0}, "steps": {"pretrain": 50, "finetune": 400}}
        if status == "complete":
            manifest["scores"] = {"world": float(np.mean(SCORES[name]))}
            write_questions(trial, SCORES[name])
        if status == "failed":
            manifest["error"] = "Traceback (most recent call last):\n  ...\nDivergedError: the loss is nan; lower lr\n"
        (trial / "manifest.json").write_text(json.dumps(manifest))
    (root / "study.json").write_text(json.dumps(plan))
    lines = [{"stage": "pretrain", "step": i, "loss": 9.0, "step_seconds": 9.0} for i in range(1, 51)]
    lines += [{"stage": "finetune", "step": i, "loss": 3 - i / 100, "step_seconds": 0.5} for i in range(1, 101)]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"stage": "finetune", "step": 101, "lo'
    (root / "trials" / "mlp-s1" / "metrics.jsonl").write_text(text)
    curve = [{"rung": 0, "share": 0.125, "step": 50, "scores": [1.0, 0.0], "accuracy": 0.5}]
    (root / "trials" / "mlp-s1" / "curve.json").write_text(json.dumps(curve))
    return root


def write_questions(trial, scores, benchmark="world"):
    rows = {"benchmark": benchmark, "split": "test", "question_id": [f"q{i}" for i in range(len(scores))]}
    rows |= {"cluster": [f"image{i}" for i in IMAGES], "score": np.array(scores, dtype=float)}
    pd.DataFrame(rows).to_parquet(trial / "questions.parquet")


@pytest.fixture
def recorded(folder):
    """The same with Optuna's record: a study for each fidelity in its newest revision, and others beside them."""
    storage = open_storage(None, folder)
    for fidelity in ("small", "full"):
        name = f"adapters, {fidelity}, revision 2"
        study = optuna.create_study(study_name=name, storage=storage, direction="maximize")
        for other in (f"adapters, {fidelity}", f"{name}, rungs", f"theirs, {fidelity}, revision 2"):
            made = optuna.create_study(study_name=other, storage=storage)
            if "theirs" not in other:
                made.set_user_attr("chiasm_folder", "abc")
            about = {"trial": "mlp-s1" if "revision" in other else "gone", "cost_hours": 9.0}
            made.add_trial(optuna.create_trial(state=TrialState.FAIL, user_attrs=about))
        study.set_user_attr("chiasm_folder", "abc")
        for name, (levels, seed, own, state) in TRIALS.items():
            if own == fidelity:
                told = {"trial": name, "seed": seed, "fidelity": fidelity, "levels": levels, "cost_hours": 0.25}
                told |= {"error": "its worker died: out of memory"} if state is TrialState.FAIL else {}
                value = {"value": 0.5} if state is TrialState.COMPLETE else {}
                params = {PATH: levels[PATH]}
                frozen = optuna.create_trial(state=state, params=params, distributions=LEVELS, user_attrs=told, **value)
                study.add_trial(frozen)
    return folder


def test_trials_by_state(recorded):
    snapshot = look(recorded)
    assert snapshot.counts == {"complete": 4, "running": 1, "pruned": 1, "failed": 1, "waiting": 1}
    assert [trial.name for trial in snapshot.trials] == list(TRIALS)
    assert snapshot.notes == ()
    (failed,) = snapshot.of("failed")
    assert failed.error == "its worker died: out of memory"
    assert sum(trial.hours for trial in snapshot.trials) == pytest.approx(0.25 * len(TRIALS))
    first = snapshot.trials[0]
    assert (first.cell, first.seed, first.fidelity, first.label) == (cell("linear"), 0, "full", "adapter=linear")
    assert first.accuracy == 0.5


def test_how_far_a_running_trial_is(recorded):
    log = recorded / "trials" / "mlp-s1" / "metrics.jsonl"
    os.utime(log, (time.time() - 300,) * 2)
    (running,) = look(recorded).of("running")
    now = running.progress
    assert (now.stage, now.step, now.steps, now.loss) == ("finetune", 100, 400, 2.0)
    assert now.steps_per_second == pytest.approx(2.0)
    assert now.seconds_left == pytest.approx(150.0)
    assert now.quiet_seconds == pytest.approx(300, abs=60)
    assert now.rung == (0, 0.5)
    told = "mlp-s1  finetune 100/400, loss 2.000, 2.00 steps/s, 50.0 at rung 0, 2:30 left of the stage, no step for 5:"
    assert told in as_text(look(recorded), 200)
    log.write_bytes(b"")
    assert "mlp-s1  starting" in as_text(look(recorded))


def test_a_long_log_is_read_at_its_end(recorded):
    lines = [{"stage": "finetune", "step": i, "loss": 1.0, "step_seconds": 0.1, "pad": "x" * 100} for i in range(5000)]
    log = recorded / "trials" / "mlp-s1" / "metrics.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (running,) = look(recorded).of("running")
    assert running.progress.step == 4999
    assert running.progress.steps_per_second == pytest.approx(10)


def test_the_best_cells_have_the_interval_of_the_report(recorded):
    """Over images and seeds where there are several, over images alone with one; the whole fidelity first."""
    cells = look(recorded).cells
    assert [(c.label, c.fidelity, c.seeds) for c in cells] == [
        ("adapter=mlp", "full", 1),
        ("adapter=linear", "full", 2),
        ("adapter=resampler", "small", 1),
    ]
    wanted = accuracy_interval([SCORES["linear-s0"], SCORES["linear-s1"]], IMAGES)
    found = cells[1].benchmarks["world"]
    assert cells[1].accuracy == pytest.approx(found.estimate)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))
    assert found.low < found.estimate < found.high
    text = " ".join(as_text(look(recorded)).split())
    assert f"adapter=linear full 2 62.5 [{100 * found.low:.1f}, {100 * found.high:.1f}]" in text


def test_without_optunas_record_states_are_those_of_the_manifests(folder):
    snapshot = look(folder)
    assert snapshot.counts == {"complete": 4, "running": 1, "pruned": 1, "failed": 1, "waiting": 1}
    assert snapshot.of("failed")[0].error == "DivergedError: the loss is nan; lower lr"
    assert snapshot.trials[0].hours == pytest.approx(2 * 900 / 3600)
    assert not (folder / "optuna.journal").exists()


def test_a_record_that_cannot_be_read_is_noted(recorded):
    (recorded / "optuna.journal").write_text("not a journal\nnor this\n")
    snapshot = look(recorded)
    assert "Optuna's record cannot be read" in snapshot.notes[0]
    assert snapshot.counts["complete"] == 4
    assert "note: Optuna's record" in as_text(snapshot)


def test_half_written_files_are_not_there_yet(recorded):
    with (recorded / "optuna.journal").open("a") as journal:
        journal.write('{"op_code": 4, "wor')
    for name in ("linear-s0/manifest.json", "linear-s1/questions.parquet", "mlp-s1/curve.json"):
        file = recorded / "trials" / name
        file.write_bytes(file.read_bytes()[:20])
    snapshot = look(recorded)
    assert snapshot.notes == ()
    assert snapshot.counts == {"complete": 3, "running": 1, "pruned": 1, "failed": 1, "waiting": 2}
    (half,) = (c for c in snapshot.cells if c.label == "adapter=linear")
    assert half.benchmarks == {}
    assert "adapter=linear" in as_text(snapshot)


def test_looking_changes_nothing(recorded):
    before = {path: path.stat().st_mtime_ns for path in recorded.rglob("*")}
    look(recorded)
    assert {path: path.stat().st_mtime_ns for path in recorded.rglob("*")} == before


def test_the_command_prints_text_or_json(recorded):
    result = CliRunner().invoke(watch, [str(recorded), "--once"])
    assert result.exit_code == 0, result.output
    for told in (
        "8 trials: 4 complete, 1 running",
        "Which adapter?",
        "out of memory",
        "2.00 CPU-hours",
        "finetune 100/",
    ):
        assert told in result.output
    assert "2.00 CPU-hours, of 8 in all, 10.00 of 40 paid" in result.output
    assert "\x1b" not in result.output
    write_questions(recorded / "trials" / "mlp-s0", [1.0] * 8, "one image")
    rows = pd.read_parquet(recorded / "trials" / "mlp-s0" / "questions.parquet").assign(cluster="same")
    rows.to_parquet(recorded / "trials" / "mlp-s0" / "questions.parquet")
    told = json.loads(CliRunner().invoke(watch, [str(recorded), "--json"]).output)
    assert told["counts"]["complete"] == 4
    best = told["cells"][0]
    assert best["benchmarks"]["one image"]["low"] is None  # no interval from one image; JSON has no infinity
    assert len(told["trials"]) == 8


def test_lines_fit_the_terminal(recorded):
    text = as_text(look(recorded), 60)
    assert max(map(len, text.splitlines())) == 60
    styled = as_text(look(recorded), 60, color=True)
    assert "\x1b[1mrunning\x1b[0m" in styled


def test_it_ends_with_the_study(recorded, monkeypatch):
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 2:
            for name in ("mlp-s1", "waiting-s0"):
                (recorded / "trials" / name).mkdir(exist_ok=True)
                manifest = {"status": "failed", "error": "x"}
                (recorded / "trials" / name / "manifest.json").write_text(json.dumps(manifest))
            (recorded / "optuna.journal").unlink()

    monkeypatch.setattr("time.sleep", sleep)
    result = CliRunner().invoke(watch, [str(recorded), "--every", "2"])
    assert result.exit_code == 0
    assert looks == [2.0, 2.0]
    assert result.output.count("8 trials:") == 3


def test_a_study_is_found_by_its_file(recorded, tmp_path, monkeypatch):
    monkeypatch.setenv("CHIASM_RUNS", str(tmp_path / "runs"))
    file = tmp_path / "study.yaml"
    study = {"name": "adapters", "base": {"x": 1}, "factors": {PATH: LABELS}, "storage": "sqlite:///x.db"}
    file.write_text(yaml.safe_dump(study))
    assert find(file) == (recorded, "sqlite:///x.db")
    assert find(recorded) == (recorded, None)
    assert find(file, recorded) == (recorded, "sqlite:///x.db")
    file.write_text(yaml.safe_dump(study | {"name": "other"}))
    with pytest.raises(ConfigError, match="other' holds no study, or it has not begun"):
        find(file)


def test_optunas_dashboard_gets_the_storage_with_the_drivers_lock(recorded, monkeypatch):
    served = []
    module = types.SimpleNamespace(run_server=lambda storage, **where: served.append((storage, where)))
    monkeypatch.setitem(sys.modules, "optuna_dashboard", module)
    result = CliRunner().invoke(watch, [str(recorded), "--optuna", "--port", "9001"])
    assert "http://127.0.0.1:9001" in result.output
    ((storage, where),) = served
    assert where == {"host": "127.0.0.1", "port": 9001}
    assert {study.study_name for study in storage.get_all_studies()} >= {
        "adapters, small, revision 2",
        "adapters, full",
    }
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    result = CliRunner().invoke(watch, [str(recorded), "--optuna"])
    assert "pip install 'chiasm-experiments[dashboard]'" in str(result.exception)


def test_without_a_cluster_rays_dashboard_is_said_to_be_missing(recorded, monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    error = CliRunner().invoke(watch, [str(recorded), "--ray"]).exception
    assert "no Ray cluster answers at http://127.0.0.1:1" in str(error)
    assert "RAY_ADDRESS=auto chiasm sweep" in error.__notes__[0]
