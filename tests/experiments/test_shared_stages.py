"""Stages that runs have in common: trained once, taken up by another run, and never taken for one another."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from chiasm.config import load_run
from chiasm_experiments.training.execution import Execution
from chiasm_experiments.training.files import METRICS
from chiasm_experiments.training.local import evaluate_here
from chiasm_experiments.training.run import Job, execute, load_run_folder
from chiasm_experiments.training.shared import stage_folder
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

    def job(name, lr=1e-3, stages=1, **change) -> Job:
        run = RUN | change
        run["stages"] = [run["stages"][0], run["stages"][1] | {"lr": lr}]
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(run))
        folder = tmp_path / "trials" / name
        folder.mkdir(parents=True, exist_ok=True)
        execution = Execution(stages_folder=tmp_path / "stages", checkpoint_seconds=0)
        values = load_run(path).model_dump(mode="json")
        return Job(values, str(folder), {"trial": name, "study": None, "cell": {}}, execution, stages)

    return job


def quiet(*_):
    """Takes progress."""


def weights(folder, stage):
    place = stage_folder(folder / "stages" / stage)
    return {f"{file.stem}.{k}": v for file in place.glob("*.safetensors") for k, v in load_file(file).items()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_common_stage_is_trained_once_and_changes_no_result(make, tmp_path):
    first = execute(make("slow"), quiet)
    second = execute(make("fast", lr=1e-2), quiet)
    alone = execute(make("alone", lr=1e-2, stages=0), quiet)
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

    def steps(name):
        lines = [json.loads(line) for line in (trials / name / METRICS).read_text().splitlines()]
        return [(line["stage"], line["step"], line["loss"]) for line in lines]

    assert steps("fast") == steps("alone")
    assert [stage["name"] for stage in second["stages"]] == ["pretrain", "finetune"]


def test_runs_that_differ_in_the_evaluation_alone_share_every_stage(make, tmp_path):
    execute(make("few", stages=None), quiet)
    more = execute(make("more", stages=None, evaluate={**WORLD, "size": 6}), quiet)
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
