"""What a plan refuses: each problem names its field and what to do, all are told at once, and no weight is read."""

from __future__ import annotations

import builtins
import json

import pytest
import torch
import transformers as tf

from chiasm.config import RunConfig
from chiasm.cost import SampleSize
from chiasm.plan import plan_run

SHAPE = {"image_size": 16, "patch_size": 4, "width": 32, "depth": 3, "heads": 2, "mlp_width": 64}
CLIP = {"name": "clip", "shape": SHAPE}
FINER = {"name": "clip", "shape": SHAPE | {"image_size": 24}}
LLM = {"name": "causal", "shape": {"width": 32, "depth": 1, "context_length": 512}}


def run_config(train=("adapter", "tokens"), tokens=None, llm=LLM, **vision) -> RunConfig:
    stage = {"name": "s", "data": "world", "train": list(train), "lr": 1e-3, "batch_size": 1}
    values = {"vision": {"encoders": [CLIP], "adapter": "mlp", **vision}, "llm": llm, "stages": [stage]}
    return RunConfig.model_validate(values | {"tokens": tokens or {}})


@pytest.mark.parametrize(
    ("changed", "field", "words"),
    [
        ({"encoders": [CLIP | {"layers": -4}]}, "vision.encoders.0", "3 blocks"),
        ({"encoders": [CLIP, CLIP | {"layers": [-1, 3]}]}, "vision.encoders.1", "twice"),
        ({"encoders": [CLIP | {"image_size": 17}]}, "vision.encoders.0", "try 16 or 20"),
        ({"encoders": [CLIP | {"patch": 4}]}, "vision.encoders.0.patch", "unknown field"),
        ({"encoders": [CLIP, FINER]}, "vision.fusion", "choose a fusion that takes several"),
        ({"encoders": [FINER, CLIP], "fusion": "concat_channels"}, "vision.fusion", "set `align: interpolate`"),
        ({"encoders": [FINER, CLIP], "fusion": "cross_attention"}, "vision.fusion", "choose the other order"),
        ({"fusion": {"name": "additive", "weights": [0.5]}}, "vision.fusion.weights", "sum to 0.5, wanted 1"),
        ({"fusion": {"name": "project_attention", "heads": 3}}, "vision.fusion", "set `heads` to a divisor"),
        ({"adapter": "mpl"}, "vision.adapter", "Did you mean 'mlp'"),
        ({"adapter": {"name": "mlp", "depht": 2}}, "vision.adapter.depht", "Did you mean 'depth'"),
        ({"adapter": {"name": "mlp", "depth": 0}}, "vision.adapter.depth", "given 0"),
        ({"adapter": {"name": "avg_pool", "factor": 3}}, "vision.adapter", "set `grid: [2, 2]`"),
        ({"image": {"views": "tiles", "pool": 3}}, "vision.image", "choose another pool"),
        ({"image": {"views": "tiles", "max_tiles": 40}}, "llm", "(41 views of an image)"),
        ({"llm": {"name": "causal", "pretrained": "nowhere/at/all"}}, "llm", "nowhere/at/all"),
        ({"llm": LLM | {"lora": {"targets": ["no_proj"]}}}, "llm", "no_proj"),
        ({"train": ["fusion"]}, "stages.s.train", "nothing would learn"),
    ],
)  # fmt: skip
def test_a_problem_names_its_field_and_what_to_do(changed, field, words):
    plan = plan_run(run_config(**changed), SampleSize())
    assert not plan.valid
    (problem,) = plan.problems
    assert problem.startswith(f"{field}: ")
    assert words in problem


def test_problems_of_parts_that_do_not_wait_for_each_other_are_told_together():
    plan = plan_run(run_config(encoders=[CLIP | {"layers": 9}, CLIP | {"layers": 8}], llm=LLM | {"rank": 2}))
    assert [problem.partition(":")[0] for problem in plan.problems] == [
        "vision.encoders.0",
        "vision.encoders.1",
        "llm.rank",
    ]


@pytest.mark.parametrize(
    ("tokens", "needed"),
    [
        ({}, 5 * 16 + 2),
        ({"image": []}, 5 * 16),
        ({"views": ["SEP"]}, 5 * 16 + 2 + 4),
        ({"views": ["SEP"], "image": []}, 5 * 16 + 4),
    ],
    ids=str,
)
def test_the_context_holds_the_visual_tokens_the_learned_vectors_and_some_text(tokens, needed):
    """Four tiles and the whole image of 16 tokens each; a question and its answer take a position each at least."""
    image = {"views": "tiles", "grids": [[2, 2]]}
    short, enough = (
        plan_run(
            run_config(
                image=image, tokens=tokens, llm={"name": "causal", "shape": LLM["shape"] | {"context_length": context}}
            ),
            SampleSize(text=10, answer=3),
        )
        for context in (needed + 2, needed + 3)
    )
    assert [problem.partition(":")[0] for problem in short.problems] == ["llm"]
    assert f"context of {needed + 2} positions is too short for 80 visual tokens (5 views" in short.problems[0]
    assert enough.problems == []
    assert enough.cost.positions == 80 + 4 * len(tokens.get("views", [])) + 10


def test_a_plan_reads_no_weight_and_draws_none(tmp_path, monkeypatch):
    """From folders that hold weights: none is opened, and one that is broken changes nothing."""
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    clip, llama = tmp_path / "clip", tmp_path / "llama"
    tf.CLIPVisionConfig(**vision, image_size=16, patch_size=4).save_pretrained(clip)
    tf.LlamaConfig(**vision, vocab_size=300, max_position_embeddings=256).save_pretrained(llama)
    (llama / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    for folder in (clip, llama):
        (folder / "model.safetensors").write_bytes(b"no weights")
    opened = []
    real = builtins.open
    monkeypatch.setattr(
        builtins, "open", lambda file, *rest, **more: opened.append(str(file)) or real(file, *rest, **more)
    )
    run = run_config(
        encoders=[{"name": "clip", "pretrained": str(clip)}], llm={"name": "causal", "pretrained": str(llama)}
    )
    state = torch.get_rng_state()
    plan = plan_run(run, SampleSize())
    assert plan.problems == []
    assert plan.cost.encode > 0
    assert torch.equal(state, torch.get_rng_state())
    assert not [name for name in opened if name.endswith(".safetensors")]
