"""Runs with LoRA: planned, trained in two stages, saved small, and read again; and what is held in which format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from chiasm.build import build_vlm
from chiasm.config import ComponentRef, RunConfig, load_run
from chiasm.errors import CheckpointError
from chiasm.plan import plan_run
from chiasm_experiments.study.cells import make_cells
from chiasm_experiments.study.config import Study
from chiasm_experiments.training.local import evaluate_here, run_here
from chiasm_experiments.training.precision import place
from chiasm_experiments.training.run import Job, load_run_folder

RECIPE = Path(__file__).parents[2] / "experiments/recipes/omnifusion-7b.yaml"
STAGE = {"train": ["fusion", "adapter", "tokens"], "lr": 1e-2, "batch_size": 4}
WORLD = {"name": "world", "image_size": 96, "skills": ["colour", "existence"]}
CLIP = {"image_size": 28, "patch_size": 14, "width": 16, "depth": 2, "heads": 2, "mlp_width": 16}
LORA = {"rank": 3, "alpha": 6, "targets": ["q_proj", "down_proj"]}
LEARNED = 2 * 3 * ((32 + 32) + (32 + 64))
"""Parameters of LORA in the zoo's Llama of two blocks, width 32 and MLP width 64."""


def run_of(llm: dict[str, Any]) -> dict[str, Any]:
    return {
        "vision": {"encoders": [{"name": "clip", "shape": CLIP}], "adapter": "mlp"},
        "llm": llm,
        "system": "",
        "stages": [
            {"name": "pretrain", "data": {**WORLD, "task": "captions", "size": 8}, **STAGE},
            {"name": "finetune", "data": {**WORLD, "task": "dialogues", "size": 8}, **STAGE}
            | {"train": ["adapter", "llm"]},
        ],
        "evaluate": {**WORLD, "size": 6},
    }


def train(folder: Path, llm: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(run_of(llm)))
    labels = {"trial": folder.name, "study": None, "cell": {}}
    run_here(Job(load_run(file).model_dump(mode="json"), str(folder), labels), quiet=True)
    return folder


@pytest.fixture(scope="module")
def llama(zoo: Any) -> str:
    return zoo.save(zoo.root / "llama-512", zoo.random_model("llama", max_position_embeddings=512))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, llama: str) -> Path:
    """The folder of a finished run with LoRA; not to be changed."""
    return train(tmp_path_factory.mktemp("lora") / "run", {"name": "causal", "pretrained": llama, "lora": LORA})


def test_a_run_with_lora_saves_its_matrices_and_answers_again(trained: Path, llama: str) -> None:
    manifest = json.loads((trained / "manifest.json").read_text())
    base = load_file(f"{llama}/model.safetensors")
    untouched = sum(value.numel() for value in base.values())
    assert manifest["parameters"]["by_part"]["llm"] == {"trained": LEARNED, "frozen": untouched}
    # the first stage leaves the language model alone, and its weights stand in the checkpoint
    assert not (trained / "stages/pretrain/llm.safetensors").exists()
    file = trained / "stages/finetune/llm.safetensors"
    saved = load_file(file)
    assert sum(value.numel() for value in saved.values()) == LEARNED
    assert 4 * LEARNED < file.stat().st_size < 4 * LEARNED + 4096
    assert all(value.any() for name, value in saved.items()), "B is zero: nothing was trained"

    run, vlm = load_run_folder(trained)
    state = vlm.llm.state_dict()
    assert all(torch.equal(state[name], value) for name, value in saved.items())
    plain = {name.removeprefix("model.").replace(".base_layer", ""): value for name, value in state.items()}
    assert all(torch.equal(plain[name], value) for name, value in base.items())
    rows, scores = evaluate_here(trained)
    kept = pd.read_parquet(trained / "questions.parquet")
    assert [row["response"] for row in rows] == list(kept.response)
    assert scores == manifest["scores"]
    plan = plan_run(run)
    assert plan.valid
    vlm.set_trained(run.trained)
    (count,) = (count for count in vlm.counts() if count.part == "llm")
    assert plan.trained["llm"] == count.trained == LEARNED
    assert plan.parameters["llm"] == count.trained + count.frozen == sum(p.numel() for p in vlm.llm.parameters())


def test_a_run_that_was_stopped_between_the_stages_ends_with_the_same_matrices(tmp_path: Path, llama: str) -> None:
    llm = {"name": "causal", "pretrained": llama, "lora": LORA | {"dropout": 0.2}}
    whole, stopped = train(tmp_path / "whole", llm), train(tmp_path / "stopped", llm)
    for name in ("manifest.json", "questions.parquet", "stages/finetune/parts.json"):
        (stopped / name).unlink()
    (stopped / "stages/finetune/llm.safetensors").write_bytes(b"half a file")
    train(stopped, llm)
    for part in ("adapter", "llm"):
        file = f"stages/finetune/{part}.safetensors"
        assert (stopped / file).read_bytes() == (whole / file).read_bytes(), part


def test_random_weights_beside_the_matrices_are_saved_too(tmp_path: Path) -> None:
    shape = {"width": 32, "depth": 1, "heads": 2, "kv_heads": 1, "mlp_width": 32, "context_length": 512}
    folder = train(tmp_path / "run", {"name": "causal", "shape": shape, "lora": {"rank": 2}})
    state = load_run_folder(folder)[1].llm.state_dict()
    saved = load_file(folder / "stages/finetune/llm.safetensors")
    assert set(saved) == set(state)
    assert all(torch.equal(saved[name], value) for name, value in state.items())


def test_matrices_of_another_shape_are_refused(tmp_path: Path, trained: Path) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    settings = json.loads((folder / "run.json").read_text())
    for lora in ({"rank": 1, "targets": LORA["targets"]}, {"rank": 3}, None):
        settings["llm"]["lora"] = lora
        (folder / "run.json").write_text(json.dumps(settings))
        with pytest.raises(CheckpointError, match=r"llm\.safetensors' does not fit the llm of this run"):
            load_run_folder(folder)
    settings["llm"]["lora"] = LORA
    (folder / "run.json").write_text(json.dumps(settings))
    load_run_folder(folder)
    file = folder / "stages/finetune/llm.safetensors"
    # one row would fill three
    save_file({name: value[:1].contiguous() for name, value in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match=r"lora_A.*weight is \(1, \d+\), wanted \(3, \d+\)"):
        load_run_folder(folder)


def test_frozen_weights_are_bfloat16_and_the_matrices_float32(llama: str) -> None:
    values = run_of({"name": "causal", "pretrained": llama, "lora": {"rank": 2}}) | {"precision": "bfloat16"}
    run = RunConfig.model_validate(values)
    vlm = build_vlm(run)
    place(vlm, run, torch.device("cpu"))
    learned = {id(p) for p in vlm.llm.trainable().values()}
    for name, parameter in vlm.llm.named_parameters():
        assert parameter.dtype == (torch.float32 if id(parameter) in learned else torch.bfloat16), name
    assert {p.dtype for p in vlm.encoders.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in vlm.adapter.parameters()} == {torch.float32}
    stage = run.stages[0].model_copy(update={"train": ("adapter",)})
    place(vlm, run.model_copy(update={"stages": (stage,)}), torch.device("cpu"))
    assert {p.dtype for p in vlm.llm.parameters()} == {torch.bfloat16}


def test_exactly_the_matrices_learn(llama: str) -> None:
    vlm = build_vlm(RunConfig.model_validate(run_of({"name": "causal", "pretrained": llama, "lora": LORA})))
    vlm.set_trained(("llm",))
    loss = vlm.llm.logits(vlm.llm(torch.randn(1, 4, 32))).square().sum()
    loss.backward()
    with_gradient = {name for name, parameter in vlm.named_parameters() if parameter.grad is not None}
    assert with_gradient == {f"llm.{name}" for name in vlm.llm.trainable()}
    assert sum(vlm.get_parameter(name).numel() for name in with_gradient) == LEARNED
    vlm.set_trained(("adapter",))
    assert not any(parameter.requires_grad for parameter in vlm.llm.parameters())


@torch.no_grad()
def test_frequencies_of_positions_keep_float32(zoo: Any, tmp_path: Path) -> None:
    """Rounded to bfloat16 they would turn far positions by another angle; weights alone cost a little accuracy."""
    wide = {"hidden_size": 128, "num_attention_heads": 2, "max_position_embeddings": 4096, "initializer_range": 0.1}
    model = zoo.random_model("llama", **wide)
    folder = zoo.save(tmp_path / "long", model)
    values = run_of({"name": "causal", "pretrained": folder}) | {"precision": "bfloat16"}
    values["stages"] = values["stages"][:1]
    run = RunConfig.model_validate(values)
    vlm = build_vlm(run)
    ids_BT = torch.randint(0, 256, (1, 2000), generator=torch.Generator().manual_seed(0))
    embeds_BTE = vlm.llm.embed(ids_BT)
    wanted = vlm.llm.logits(vlm.llm(embeds_BTE))[0, -200:]
    place(vlm, run, torch.device("cpu"))
    found = vlm.llm.logits(vlm.llm(embeds_BTE.bfloat16())).float()[0, -200:]
    assert (found - wanted).norm() < 0.03 * wanted.norm()


def recipe(tmp_path: Path, llm: dict[str, Any]) -> Path:
    """The shipped recipe with a tiny encoder and without its files of data."""
    run = yaml.safe_load(RECIPE.read_text())
    run["vision"]["encoders"] = [{"name": "clip", "shape": CLIP}]
    run["llm"] = llm
    for stage in run["stages"]:
        stage["data"] = {**WORLD, "task": "captions", "size": 4}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def test_a_study_of_the_recipe_with_and_without_lora_is_planned(tmp_path: Path) -> None:
    shape = {"width": 32, "depth": 2, "heads": 4, "kv_heads": 2, "mlp_width": 64, "context_length": 512}
    recipe(tmp_path, {"name": "mistral", "shape": shape | {"vocabulary": 300}})
    study = {"name": "lora", "base": "recipe.yaml", "factors": {"llm.lora": [None, {"rank": 16}]}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    full, low = make_cells(Study(tmp_path / "study.yaml")).cells
    assert [full.plan.problems, low.plan.problems] == [[], []]
    assert full.label != low.label
    added = 2 * 16 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 64) * 3)
    assert full.plan.trained["llm"] == full.plan.parameters["llm"]
    assert low.plan.trained["llm"] == added
    assert low.plan.parameters["llm"] == full.plan.parameters["llm"] + added
    for cell in (full, low):
        vlm = build_vlm(cell.run)
        vlm.set_trained(cell.run.trained)
        assert [cell.plan.trained["llm"]] == [count.trained for count in vlm.counts() if count.part == "llm"]


def test_lora_on_mistral_7b_is_planned_without_weights(tmp_path: Path) -> None:
    run = load_run(recipe(tmp_path, {"name": "mistral", "pretrained": "mistralai/Mistral-7B-v0.1"}))
    with_lora = run.model_copy(update={"llm": ComponentRef.model_validate({**run.llm.model_dump(), "lora": {}})})
    plan = plan_run(with_lora)
    assert plan.problems == []
    # what peft prints for rank 16 on all linear layers of this model
    assert plan.trained["llm"] == 41_943_040
    assert plan_run(run).trained["llm"] == 7_241_732_096
