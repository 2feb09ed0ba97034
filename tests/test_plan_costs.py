"""What a plan says of cost: operations as torch counts them in a real step, bytes as autograd keeps them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from chiasm.batch import collate
from chiasm.build import build_vlm
from chiasm.config import RunConfig, resolve
from chiasm.cost import SampleSize, connector_cost, saved_bytes
from chiasm.llm import LanguageModel
from chiasm.plan import plan_run
from chiasm.prompt import PromptBuilder
from chiasm.sample import Sample, Turn
from chiasm_experiments.study.plans import plans_as_text

CLIP = {
    "name": "clip",
    "shape": {"image_size": 32, "patch_size": 8, "width": 64, "depth": 3, "heads": 4, "mlp_width": 128},
}
LLM = {
    "name": "causal",
    "shape": {"width": 96, "depth": 3, "heads": 4, "kv_heads": 2, "mlp_width": 160, "context_length": 512},
}


def run_config(train: list[str], llm: dict | None = None, **vision) -> RunConfig:
    stage = {"name": "s", "data": "world", "train": train, "lr": 1e-3, "batch_size": 4}
    return RunConfig.model_validate(
        {"vision": {"encoders": [CLIP], "adapter": "mlp", **vision}, "llm": llm or LLM, "stages": [stage], "system": ""}
    )


class Blank:
    key = "blank"


def counted(run: RunConfig, text: str, answer: str, *, everywhere: bool = True) -> tuple[int, int, int, int]:
    """Operations of one training step of one sample, positions, supervised ones, and views.

    `everywhere` has the last block's feed-forward part computed at every position, as a plan counts it.
    """
    vlm = build_vlm(run)
    if everywhere:
        vlm.llm.forward_at = partial(LanguageModel.forward_at, vlm.llm)
    vlm.set_trained(run.stages[0].train)
    vlm.train()
    builder = PromptBuilder(vlm.llm, run.tokens, vlm.visual_tokens, "")
    prompt = builder.train(Sample("s", (Turn(text, answer),), (Blank(),)), [vlm.views.tokens(vlm.views.counts[1])])
    views = vlm.views.counts[1]
    pixels = [torch.randn(views, 3, e.geometry.image.height, e.geometry.image.width) for e in vlm.encoders]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss, supervised = vlm(collate([prompt], pixels))
        loss.backward()
    square = 4 * len(prompt) ** 2 * LLM["shape"]["width"] * LLM["shape"]["depth"]
    causal = 4 * (len(prompt) * (len(prompt) + 1) // 2) * LLM["shape"]["width"] * LLM["shape"]["depth"]
    # a plan counts the half of attention's square that a causal kernel computes; the kernel of this test computes all
    return counter.get_total_flops() - 3 * (square - causal), len(prompt), int(supervised), views


@pytest.mark.parametrize(
    "train",
    [["adapter", "tokens"], ["adapter", "tokens", "llm"], ["encoders", "adapter", "llm"], ["tokens", "llm"]],
    ids="+".join,
)
def test_operations_of_a_training_step_are_those_that_torch_counts(train):
    run = run_config(train)
    found, positions, answer, _ = counted(run, "what is it? " * 8, "a word " * 4)
    plan = plan_run(run, SampleSize(text=positions - 16, answer=answer))
    assert plan.cost.positions == positions
    # the first layers of all need no gradient of their input, which a plan leaves in
    assert plan.cost.stages["s"].flops == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize(("train", "passes"), [(["adapter"], 2), (["adapter", "llm"], 3)])
def test_a_step_takes_less_by_the_last_feed_forward_part_where_nothing_is_supervised(train, passes):
    run = run_config(train)
    whole, positions, answer, _ = counted(run, "what? ", "a word")
    found, *_ = counted(run, "what? ", "a word", everywhere=False)
    assert whole - found == passes * 2 * 3 * 96 * 160 * (positions - answer)


@pytest.mark.parametrize("train", [["encoders", "adapter"], ["adapter"], ["encoders"]], ids="+".join)
def test_operations_of_a_large_vision_part_that_learns_are_those_that_torch_counts(train):
    """Beside a language model so small that what the encoder and the adapter cost is most of the whole."""
    encoder = CLIP | {"shape": CLIP["shape"] | {"image_size": 64, "width": 256, "depth": 4, "mlp_width": 1024}}
    run = run_config(train, encoders=[encoder], adapter={"name": "mlp", "depth": 3, "hidden": 2048})
    found, positions, answer, _ = counted(run, "what? ", "a word")
    plan = plan_run(run, SampleSize(text=positions - 64, answer=answer))
    assert plan.cost.encode + plan.cost.connect > 4 * plan.cost.llm
    assert plan.cost.stages["s"].flops == pytest.approx(found, rel=0.03)


def test_what_learns_costs_two_passes_more():
    trains = (["tokens"], ["adapter"], ["encoders"], ["encoders", "adapter"])
    costs = [plan_run(run_config(train), SampleSize()).cost for train in trains]
    tokens, adapter, encoders, both = (cost.stages["s"].flops for cost in costs)
    assert adapter - tokens == 2 * costs[0].connect
    assert both - adapter == 2 * costs[0].encode
    # through a frozen adapter gradients pass, and none of its weights is made
    assert encoders - tokens == 2 * costs[0].encode + costs[0].connect


@pytest.mark.parametrize("rank", [4, 192])
def test_lora_and_tiles_are_counted(rank):
    """A rank of twice the width costs more than the weights beside it."""
    llm = LLM | {"lora": {"rank": rank}}
    image = {"views": "tiles", "grids": [[1, 2]]}
    run = run_config(["adapter", "tokens", "llm"], llm, image=image)
    found, positions, answer, views = counted(run, "what? ", "a word")
    assert views == 3
    plan = plan_run(run, SampleSize(text=positions - 3 * 16, answer=answer))
    assert plan.views == (3, 3)
    assert plan.visual_tokens == 48
    assert plan.cost.stages["s"].flops == pytest.approx(found, rel=0.05)


def test_a_forward_pass_and_an_answer_by_formula():
    run = run_config(["adapter"])
    plan = plan_run(run, SampleSize(text=20, answer=5))
    positions, width, mlp, depth = 36, 96, 160, 3
    matrices = depth * (width * width * 2 + width * width // 2 * 2 + 3 * width * mlp)
    vocabulary = plan_vocabulary(run)
    llm = 2 * matrices * positions + 4 * (positions * (positions + 1) // 2) * width * depth + 2 * 5 * width * vocabulary
    assert plan.cost.llm == llm
    assert plan.cost.connect == 16 * 2 * (64 * width + width * width)
    patches, tokens, blocks = 16, 17, 3 * (4 * 64 * 64 + 2 * 64 * 128)
    assert plan.cost.encode == 2 * (patches * 8 * 8 * 3 * 64 + tokens * blocks + 3 * 2 * tokens**2 * 64)
    assert plan.cost.inference == plan.cost.encode + plan.cost.connect + plan.cost.llm


def plan_vocabulary(run: RunConfig) -> int:
    cls, config = resolve("llm", run.llm)
    return cls.spec(config).vocabulary


def test_what_autograd_keeps_is_counted_once():
    first, second = nn.Linear(5, 7), nn.Linear(7, 3)
    module = nn.Sequential(first, nn.GELU(), second)
    x = torch.randn(11, 5)
    # the input for the first weight, what GELU was given, and what it gave
    assert saved_bytes(lambda: module(x), module) == 4 * 11 * (5 + 7 + 7)
    first.requires_grad_(False)
    second.requires_grad_(False)
    x.requires_grad_()
    assert saved_bytes(lambda: F.gelu(module(x)), module) == 4 * 11 * (7 + 3)


def test_what_a_connector_keeps_grows_with_views_and_leaves_out_the_weights():
    run = run_config(["adapter"])
    features = [encoder.geometry.features for encoder in build_vlm(run).encoders]
    cost = connector_cost(run, features, 96)
    # bfloat16: the tokens in, what GELU was given and what it gave
    assert cost.saved_bytes == 2 * 16 * (64 + 96 + 96)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_what_a_language_model_keeps_is_what_autograd_keeps(trained, lora):
    """The real model in bfloat16 at another length and its full depth, against one block measured on fake tensors."""
    cls, config = resolve("llm", run_config(["llm"], LLM | {"lora": lora}).llm)
    llm = cls.build(config).train()
    learned = {id(parameter) for parameter in llm.trainable().values()} if trained else set()
    for parameter in llm.parameters():
        parameter.requires_grad_(id(parameter) in learned)
        if id(parameter) not in learned:
            parameter.data = parameter.data.bfloat16()
    # the weights, whose copies autocast keeps once, are many times what so short a sequence keeps: they cancel here
    kept = []
    for positions in (100, 300):
        embeds = torch.randn(1, positions, 96, dtype=torch.bfloat16, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            kept.append(saved_bytes(lambda embeds=embeds: llm(embeds), llm))
    wanted = (kept[1] - kept[0]) / 200
    assert cls.activation_bytes(config, 1000, trained=trained) / 1000 == pytest.approx(wanted, rel=0.02)


def test_memory_counts_weights_moments_and_what_is_kept():
    frozen, full = (plan_run(run_config(train), SampleSize()) for train in (["adapter"], ["adapter", "llm"]))
    cls, config = resolve("llm", run_config(["adapter"]).llm)
    vocabulary, sizes = plan_vocabulary(run_config(["adapter"])), frozen.parameters
    connector = 2 * 16 * (64 + 96 + 96)
    kept = 4 * (connector + cls.activation_bytes(config, 80, trained=False) + 16 * 32 * vocabulary)
    adapter = sizes["adapter"]
    wanted = 2 * (sizes["encoders"] + sizes["llm"] + sizes["tokens"]) + 6 * adapter + 8 * adapter + kept
    assert frozen.cost.stages["s"].gpu_bytes == wanted
    more = full.cost.stages["s"].gpu_bytes - frozen.cost.stages["s"].gpu_bytes
    wider = cls.activation_bytes(config, 80, trained=True) - cls.activation_bytes(config, 80, trained=False)
    assert more == (6 + 8 - 2) * sizes["llm"] + 4 * wider


def test_workers_divide_the_weights_the_moments_and_the_gradients_of_the_language_model():
    """Under FSDP2 a worker holds its share of each, all of the rest, and what it gathers at once."""
    plan = plan_run(run_config(["adapter", "llm"]), SampleSize())
    size, (stage,) = plan.parameters["llm"], plan.cost.stages.values()
    # queries and output, keys and values of half the heads, the three matrices of the gated MLP
    block = 96 * (2 * 96 + 2 * 48 + 3 * 160)
    outside = size - 3 * block
    assert 0 < outside < block
    gathered = 2 * (2 * block + outside) + (2 + 4) * block
    memory = stage.memory
    assert memory.kept > memory.gradients + memory.llm_gradients
    # of the four samples of a step each of four workers has one
    saved = (4 + 2 + 8) * size - (4 + 8) * size // 4 - gathered + 3 * memory.kept
    assert stage.worker_bytes(1) - stage.worker_bytes(4) == saved
    # where gradients are more than what is kept for them, they count, and each worker has its share of them
    full = replace(memory, kept=0)
    assert full.peak(1) - memory.peak(1) == memory.gradients + 4 * size - 4 * memory.kept
    assert full.peak(4) - memory.peak(4) == memory.gradients + size - memory.kept
    text = plans_as_text([("cell", plan)], SampleSize(), workers=4)
    assert "each of 4 GPUs" in text
    assert plan.summary(4)["gpu_bytes"] == {"s": stage.worker_bytes(4)}


def test_the_table_names_what_works_what_does_not_and_what_is_too_large():
    good = plan_run(run_config(["adapter"]), SampleSize())
    bad = plan_run(run_config(["adapter"], LLM | {"shape": LLM["shape"] | {"context_length": 16}}), SampleSize())
    assert bad.cost is None
    text = plans_as_text([("good cell", good), ("bad cell", bad)], SampleSize(), gpu_memory=1e-4)
    (row,) = [line for line in text.splitlines() if line.startswith("  good cell  ")]
    assert row.split()[2] == "16"
    assert "bad cell: CANNOT WORK: llm: the context of 16 positions is too short for 16 visual tokens" in text
    assert "good cell: stage s is estimated to take 0.0 GiB with micro-batches of 4, the GPU has 0.0001" in text
