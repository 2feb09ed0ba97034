"""Every shipped recipe plans without network, and the published ones have the published numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from chiasm.config import RunConfig, load_run
from chiasm.cost import SampleSize
from chiasm.plan import plan_run

RECIPES = sorted((Path(__file__).parents[2] / "experiments/recipes").glob("*.yaml"))

# stage 1, stage 2 of OmniFusion: arXiv 2404.06212's hyperparameters, and those of AIRI-Institute/OmniFusion at cd72d8f,
# whose batches are samples x accumulated micro-batches x GPUs
PUBLISHED = {
    "omnifusion-7b": [("adamw", 1e-3, 256, 1.0), ("adamw", 2e-5, 128, 1.0)],
    "omnifusion-7b-code": [("adafactor", 1e-2, 4 * 8 * 8, None), ("adafactor", 1e-4, 1 * 64 * 8, None)],
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """A look at the network would be an error, not a wait."""
    import socket

    def refuse(*_, **__):
        raise AssertionError("a recipe's plan needs the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_plans_without_network(path):
    run = load_run(path)
    plan = plan_run(run)
    assert not plan.problems
    # as a run writes it down, it is the same run
    assert RunConfig.model_validate(run.model_dump(mode="json")) == run


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_numbers(name):
    run = load_run(next(path for path in RECIPES if path.stem == name))
    assert [(s.optimizer, s.lr, s.batch_size, s.clip_norm) for s in run.stages] == PUBLISHED[name]
    for stage in run.stages:
        assert (stage.weight_decay, stage.epochs, stage.steps) == (0, 1, None)
        assert (stage.schedule, stage.warmup) == ("cosine", 0.01)
    first, second = (set(stage.train) for stage in run.stages)
    assert first == {"fusion", "adapter", "tokens"}
    assert second == first | {"llm"}
    assert run.precision == "bfloat16"
    assert run.system == "This is a dialog with AI assistant.\n"
    assert (run.tokens.image, run.tokens.turns) == (("SOI", "EOI"), ("USER", "BOT"))
    plan = plan_run(run)
    assert plan.visual_tokens == 576


def test_the_adapters_of_both():
    paper, code = (load_run(next(p for p in RECIPES if p.stem == name)).vision.adapter for name in PUBLISHED)
    assert (paper.name, paper.options) == ("mlp", {"depth": 2})
    options = {"depth": 1, "heads": 4, "feed_forward": 2048, "activation": "relu", "dropout": 0.1, "norm": "post"}
    assert (code.name, code.options) == ("transformer", options)


def test_adafactor_keeps_no_moments_of_the_parameters_size():
    run = load_run(next(path for path in RECIPES if path.stem == "omnifusion-7b-code"))
    values = run.model_dump(mode="json")
    for stage in values["stages"]:
        stage["optimizer"] = "adamw"
    adafactor, adamw = (plan_run(item, SampleSize()) for item in (run, RunConfig.model_validate(values)))
    learned = adamw.parameters["adapter"] + adamw.parameters["tokens"]
    saved = [adamw.cost.stages[s.name].gpu_bytes - adafactor.cost.stages[s.name].gpu_bytes for s in run.stages]
    assert saved == [8 * learned, 8 * (learned + adamw.parameters["llm"])]
