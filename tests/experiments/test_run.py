"""Whole runs and studies on the CPU: results, files, resuming, and asking a trained model."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from chiasm.config import load_run
from chiasm.errors import CheckpointError, ConfigError
from chiasm_experiments.evaluation import COLUMNS
from chiasm_experiments.study.config import Resources
from chiasm_experiments.training.execution import Execution, parse_execution
from chiasm_experiments.training.local import ask_here, evaluate_here, run_here
from chiasm_experiments.training.run import Job, load_run_folder

SHAPE = {"width": 32, "depth": 1, "heads": 2, "kv_heads": 1, "mlp_width": 32, "context_length": 512}
STAGE = {"train": ["fusion", "adapter", "tokens"], "lr": 1e-3, "batch_size": 4}
WORLD = {"name": "world", "image_size": 96, "skills": ["colour", "existence"]}
CLIP = {"image_size": 28, "patch_size": 14, "width": 16, "depth": 2, "heads": 2, "mlp_width": 16}
RUN = {
    "vision": {"encoders": [{"name": "clip", "shape": CLIP}], "adapter": "mlp"},
    "llm": {"name": "causal", "shape": SHAPE},
    "system": "",
    "stages": [
        {"name": "pretrain", "data": {**WORLD, "task": "captions", "size": 8}, **STAGE},
        {"name": "finetune", "data": {**WORLD, "task": "dialogues", "size": 8}, **STAGE, "train": ["adapter", "llm"]},
    ],
    "evaluate": {**WORLD, "size": 6},
}


@pytest.fixture
def job(tmp_path):
    """A job of RUN with some fields changed."""

    def make(name="run", **change) -> Job:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(RUN | change))
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        return Job(load_run(path).model_dump(mode="json"), str(folder), {"trial": name, "study": None, "cell": {}})

    return make


def test_a_run_leaves_everything_that_it_promises(job, tmp_path):
    manifest = run_here(job(), quiet=True)
    folder = tmp_path / "run"
    assert manifest == json.loads((folder / "manifest.json").read_text())
    assert manifest["status"] == "complete"
    assert manifest["visual_tokens"] == 4
    by_part = manifest["parameters"]["by_part"]
    assert by_part["encoders"]["trained"] == 0
    assert by_part["llm"]["frozen"] == 0
    assert sum(part["trained"] for part in by_part.values()) == manifest["parameters"]["trained"]
    assert [stage["name"] for stage in manifest["stages"]] == ["pretrain", "finetune"]
    assert manifest["environment"]["plugins"]["chiasm-encoders"]

    rows = pd.read_parquet(folder / "questions.parquet")
    assert tuple(rows.columns) == COLUMNS
    assert len(rows) == 6
    assert rows.question_id.is_unique
    assert manifest["scores"]["world"] == pytest.approx(rows.score.mean())
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(step["stage"], step["step"]) for step in steps] == [
        (s, i) for s in ("pretrain", "finetune") for i in (1, 2)
    ]

    first, second = (folder / "stages" / name for name in ("pretrain", "finetune"))
    before, after = load_file(first / "llm.safetensors"), load_file(second / "llm.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in after)
    vision = [load_file(stage / "encoders.safetensors") for stage in (first, second)]
    assert all(torch.equal(vision[0][name], vision[1][name]) for name in vision[0])


def test_saved_weights_give_the_same_answers_again(job, tmp_path):
    manifest = run_here(job(), quiet=True)
    rows, scores = evaluate_here(tmp_path / "run")
    kept = pd.read_parquet(tmp_path / "run" / "questions.parquet")
    assert [row["response"] for row in rows] == list(kept.response)
    assert scores == manifest["scores"]
    Image.new("L", (31, 17)).save(tmp_path / "grey.png")
    assert isinstance(ask_here(tmp_path / "run", tmp_path / "grey.png", "What colour?", 4), str)


def test_a_finished_run_is_not_trained_again_and_another_is_refused(job, tmp_path):
    first = run_here(job(), quiet=True)
    log = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert run_here(job(), quiet=True) == first
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == log
    with pytest.raises(ConfigError, match="holds a run with other settings"):
        run_here(job(seed=1), quiet=True)


def test_a_run_that_was_stopped_after_a_stage_ends_with_the_same_weights(job, tmp_path):
    """Stage 2 reads stage 1 from its files: the parts, and nothing that only the process knew."""
    run_here(job("whole"), quiet=True)
    run_here(job("stopped"), quiet=True)
    folder = tmp_path / "stopped"
    for name in ("manifest.json", "questions.parquet", "stages/finetune/parts.json"):
        (folder / name).unlink()
    (folder / "stages/finetune/.adapter.123").write_bytes(b"half a file")
    run_here(job("stopped"), quiet=True)
    assert not list(folder.rglob(".adapter.*"))
    for part in ("adapter", "fusion", "llm", "tokens"):
        file = f"stages/finetune/{part}.safetensors"
        if (tmp_path / "whole" / file).exists():
            wanted, found = load_file(tmp_path / "whole" / file), load_file(folder / file)
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    kept = [pd.read_parquet(tmp_path / name / "questions.parquet") for name in ("whole", "stopped")]
    pd.testing.assert_frame_equal(*kept)


def test_damaged_and_foreign_weights_are_told(job, tmp_path):
    run_here(job(), quiet=True)
    file = tmp_path / "run" / "stages" / "finetune" / "adapter.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"adapter\.safetensors' is damaged"):
        load_run_folder(tmp_path / "run")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"adapter\.safetensors"):
        load_run_folder(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"run\.json' cannot be read"):
        load_run_folder(tmp_path)


def test_cells_that_differ_in_one_part_start_alike_in_the_others(job):
    """The adapter's weights come from a stream of their own, whatever the encoder drew before."""
    from chiasm.build import build_vlm
    from chiasm.config import RunConfig

    blind = {"encoders": [{"name": "blind", "grid": [2, 2], "width": 16}], "adapter": "mlp"}
    one = build_vlm(RunConfig.model_validate(job("one").run))
    two = build_vlm(RunConfig.model_validate(job("two", vision=blind).run))
    for part in ("adapter", "tokens", "llm"):
        for a, b in zip(one.part(part).parameters(), two.part(part).parameters(), strict=True):
            assert torch.equal(a, b), part


def cli(*words, cwd, **env):
    return subprocess.run(
        [sys.executable, "-m", "chiasm.cli", *map(str, words)],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("train", "run.yaml", "--out", "o"), "run.yaml:1: "),
        (("plan", "gone.yaml"), "does not exist"),
        (("ask", ".", "gone.png", "q"), "does not exist"),
        (("ask", ".", "broken.png", "q"), "'.' holds no run; wanted a folder that `chiasm train` wrote"),
        (("evaluate", "."), "'.' holds no run; wanted a folder that `chiasm train` wrote"),
        (("check", "encoder", "clipp"), "Did you mean 'clip'?"),
    ],
)
def test_the_command_line_tells_errors_without_a_traceback(tmp_path, monkeypatch, call, words, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("vison: 1\n")
    (tmp_path / "broken.png").write_bytes(b"x")
    code, _, said = call(*words)
    assert code == 2
    assert says in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_study_runs_through_ray_resumes_and_reports(tmp_path):
    """Two cells and two seeds; the second call does nothing twice."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    study = {
        "name": "tiny",
        "base": "run.yaml",
        "factors": {"vision.adapter": ["linear", "mlp"]},
        "seeds": [0, 1],
        "resources": {"cpus_per_worker": 0.5, "concurrent": 2},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    environment = {"CHIASM_RUNS": str(tmp_path / "runs"), "RAY_AUTH_MODE": "disabled"}
    first = cli("sweep", "study.yaml", "--json", cwd=tmp_path, **environment)
    assert first.returncode == 0, first.stderr
    told = json.loads(first.stdout)
    assert (told["complete"], told["failed"]) == (4, 0)
    folder = tmp_path / "runs" / "tiny"
    results = pd.read_parquet(folder / "results.parquet")
    assert len(results) == 4 * 6
    for name in ("report.md", "report.html", "report.png"):
        assert (folder / name).stat().st_size > 500
    manifests = {path: path.read_bytes() for path in folder.glob("trials/*/manifest.json")}
    assert len(manifests) == 4

    import optuna

    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / "optuna.journal")))
    trials = optuna.load_study(study_name="tiny", storage=storage).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 4
    for trial in trials:
        manifest = json.loads((folder / "trials" / trial.user_attrs["trial"] / "manifest.json").read_text())
        assert trial.value == pytest.approx(manifest["scores"]["world"])
        assert manifest["cell"] == {"vision.adapter": trial.params["vision.adapter"]}
        assert manifest["environment"]["command"][1:] == ["sweep", "study.yaml", "--json"]

    again = cli("sweep", "study.yaml", "--json", cwd=tmp_path, **environment)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["complete"] == 4
    assert {path: path.read_bytes() for path in folder.glob("trials/*/manifest.json")} == manifests


@pytest.mark.slow
def test_two_workers_train_the_model_of_one(cluster, call, job, tmp_path):
    """A trial on two workers that hold shards and talk through gloo ends as the same run in one process."""
    change = {"stages": [RUN["stages"][1]]}
    study = {
        "name": "on2",
        "base": RUN | change,
        "factors": {"vision.adapter": ["mlp"]},
        "seeds": [0],
        "resources": {"workers": 2, "cpus_per_worker": 0.5, "strategy": "fsdp"},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    code, _, said = call("sweep", tmp_path / "study.yaml", "--out", tmp_path / "on2", "--json")
    assert code == 0, said
    (trial,) = (tmp_path / "on2" / "trials").iterdir()
    manifest = json.loads((trial / "manifest.json").read_text())
    assert manifest["workers"] == 2
    assert manifest["strategy"]["name"] == "fsdp"

    one = run_here(job(**change), quiet=True)
    assert one["strategy"]["name"] == "alone"
    losses = [stage["first_loss"] for stage in (*one["stages"], *manifest["stages"])]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for part in ("adapter", "llm"):
        files = [folder / "stages" / "finetune" / f"{part}.safetensors" for folder in (tmp_path / "run", trial)]
        wanted, found = map(load_file, files)
        assert set(found) == set(wanted)
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)
    assert manifest["scores"] == one["scores"]


@pytest.mark.slow
def test_a_failing_trial_is_recorded_and_the_others_go_on(cluster, call, tmp_path):
    """A learning rate that diverges fails its own trial, with its reason, and no other."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    study = {
        "name": "fails",
        "base": "run.yaml",
        "factors": {"stages.finetune.lr": {"mad": 1e30, "sane": 1e-3}},
        "seeds": [0],
        "resources": {"concurrent": 1},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    code, out, _ = call("sweep", tmp_path / "study.yaml", "--out", tmp_path / "fails")
    assert code == 1
    assert 0 <= out.index("mad-s0") < out.index("sane-s0")
    manifests = [json.loads(file.read_text()) for file in tmp_path.glob("fails/trials/*/manifest.json")]
    found = {manifest["cell"]["stages.finetune.lr"]: manifest for manifest in manifests}
    assert found["sane"]["status"] == "complete"
    assert found["mad"]["status"] == "failed"
    assert "DivergedError" in found["mad"]["error"]
    assert "lower lr" in found["mad"]["error"]
    report = (tmp_path / "fails" / "report.md").read_text()
    assert "1 failed" in report


def test_how_a_run_is_executed_is_read_from_words_and_from_a_study():
    given = parse_execution(["cache=on", "loader_workers=3", "cache_folder=null"])
    assert given == Execution(cache="on", loader_workers=3)
    resources = Resources(workers=2, cache="on", loader_workers=3)
    assert resources.execution == given
    with pytest.raises(ConfigError, match=r"compile: Input should be 'auto', 'on' or 'off'; cach: .*names are loader_"):
        parse_execution(["compile=maybe", "cach=on"])
    with pytest.raises(ConfigError, match="wanted NAME=VALUE, given 'cache'"):
        parse_execution(["cache"])
