"""What trials have in common: which of them ask as much of a GPU as another."""

from __future__ import annotations

import pytest

from chiasm.config import RunConfig
from chiasm.plan import plan_run
from chiasm_experiments.study.keys import Load, load_of

LLM = {"width": 64, "depth": 1, "heads": 2, "kv_heads": 1, "mlp_width": 64, "context_length": 256}
CLIP = {"image_size": 56, "patch_size": 14, "width": 8, "depth": 1, "heads": 1, "mlp_width": 8}
STAGE = {"name": "s", "data": {"name": "world", "task": "captions"}, "train": ["adapter"], "lr": 1e-3, "batch_size": 2}


def load(adapter="mlp", **llm) -> Load:
    run = RunConfig.model_validate(
        {
            "vision": {"encoders": [{"name": "clip", "shape": CLIP}], "adapter": adapter},
            "llm": {"name": "causal", **({"shape": LLM} | llm)},
            "stages": [STAGE],
        }
    )
    plan = plan_run(run)
    assert plan.valid, plan.problems
    return load_of(run, plan)


def test_an_adapter_that_leaves_fewer_tokens_to_the_language_model_is_another_load():
    pooled, whole = load({"name": "avg_pool"}), load()
    assert pooled != whole
    assert not pooled.covers(whole)


def test_a_load_covers_those_that_are_nowhere_larger():
    shape = LLM | {"depth": 2}
    assert load().covers(load())
    assert load(shape=shape).covers(load())
    assert not load().covers(load(shape=shape))
    # fewer tokens behind a larger language model: either has something that the other has not
    pooled = load({"name": "avg_pool"}, shape=shape)
    assert not pooled.covers(load())
    assert not load().covers(pooled)
    assert not Load("one", (1, 2)).covers(Load("other", (1, 2)))


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_quantised_language_model_is_another_load(bits):
    preset = "mistralai/Mistral-7B-v0.1"
    quantised, whole = load(shape=None, pretrained=preset, quantize=bits), load(shape=None, pretrained=preset)
    assert not quantised.covers(whole)
    assert not whole.covers(quantised)
