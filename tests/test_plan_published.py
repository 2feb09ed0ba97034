"""OmniFusion on paper (arXiv 2404.06212): what a plan says of CLIP-L, InternViT-6B and Mistral-7B at their own size.

Expected figures are the published ones, or arithmetic on the published geometry alone.
"""

from __future__ import annotations

import pytest

from chiasm.config import ComponentRef, RunConfig, resolve
from chiasm.cost import SampleSize
from chiasm.plan import plan_run

CLIP_TOKENS, CLIP_WIDTH, CLIP_DEPTH = 24 * 24, 1024, 24
INTERN_TOKENS, INTERN_WIDTH, INTERN_DEPTH = 32 * 32, 3200, 45
MISTRAL = {"width": 4096, "depth": 32, "mlp": 14336, "kv": 1024, "vocabulary": 32000}
MISTRAL_MATRICES = MISTRAL["depth"] * MISTRAL["width"] * (
    2 * MISTRAL["width"] + 2 * MISTRAL["kv"] + 3 * MISTRAL["mlp"]
)  # fmt: skip


@pytest.fixture(autouse=True)
def empty_hub(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def run(encoders, fusion="single", adapter="linear", image=None, train=("fusion", "adapter", "tokens"), llm=None):
    stage = {"name": "s", "data": "world", "train": list(train), "lr": 1e-3, "batch_size": 1}
    vision = {"encoders": encoders, "fusion": fusion, "adapter": adapter, "image": image or {}}
    llm = llm or {"name": "mistral-7b-v0.1"}
    return RunConfig.model_validate({"vision": vision, "llm": llm, "stages": [stage], "system": ""})


def tower(tokens, width, depth, patch_values=14 * 14 * 3):
    """Operations of a ViT on one view: its matrices have 12 D^2 weights for each token and block, CLS among them."""
    rows = tokens + 1
    return 2 * tokens * patch_values * width + depth * (24 * rows * width**2 + 4 * rows**2 * width)


TILES = {"views": "tiles", "grids": [[2, 2]]}
BOTH = [{"name": "clip-l-336", "layers": "all"}, {"name": "internvit-6b-448", "layers": "all"}]


@pytest.mark.parametrize(
    ("image", "views", "tokens"),
    [
        ({}, 1, 576),
        (TILES, 5, 2880),
        ({"views": "tiles", "grids": [[2, 3]]}, 7, 4032),
    ],
)
def test_clip_has_576_tokens_for_each_view(image, views, tokens):
    plan = plan_run(run([{"name": "clip-l-336", "layers": -2}], image=image, adapter="mlp"))
    assert plan.valid
    assert (plan.views[1], plan.visual_tokens) == (views, tokens)


def test_4096_positions_hold_seven_views_and_no_more():
    llm = {"name": "mistral", "pretrained": None, "shape": {"context_length": 4096}}
    encoders = [{"name": "clip-l-336", "layers": -2}]
    seven, eight = (
        plan_run(run(encoders, llm=llm, image={"views": "tiles", "grids": [grid], "whole": whole}))
        for grid, whole in (([2, 3], True), ([2, 4], False))
    )
    assert (seven.valid, seven.context_length - seven.visual_tokens) == (True, 64)
    assert eight.visual_tokens == 8 * 576
    assert "context of 4096 positions is too short for 4608 visual tokens (8 views" in eight.problems[0]


def test_all_layers_of_clip_and_internvit_summed_over_tiles():
    plan = plan_run(run(BOTH, "project_sum", "linear", TILES), SampleSize(text=64, answer=32))
    assert plan.valid
    # zeros are appended to CLIP's tokens: the longer of the two, in each of five views
    assert plan.visual_tokens == 5 * INTERN_TOKENS == 5120
    assert plan.parameters["encoders"] > 5.5e9 + 0.3e9
    width, parts = MISTRAL["width"], ((CLIP_DEPTH, CLIP_WIDTH), (INTERN_DEPTH, INTERN_WIDTH))
    # W_kl, b_kl, a_kl and the affine map of each normalisation
    assert plan.parameters["fusion"] == sum(n * (d * width + width + 1 + 2 * d) for n, d in parts)
    assert plan.parameters["adapter"] == width * width + width
    assert plan.parameters["tokens"] == 4 * width
    assert plan.trained == {part: plan.parameters[part] for part in ("fusion", "adapter", "tokens")}

    encode = tower(CLIP_TOKENS, CLIP_WIDTH, CLIP_DEPTH) + tower(INTERN_TOKENS, INTERN_WIDTH, INTERN_DEPTH)
    assert plan.cost.encode == pytest.approx(5 * encode, rel=1e-3)
    project = 2 * width * (CLIP_TOKENS * CLIP_DEPTH * CLIP_WIDTH + INTERN_TOKENS * INTERN_DEPTH * INTERN_WIDTH)
    assert plan.cost.connect == pytest.approx(5 * (project + 2 * INTERN_TOKENS * width**2), rel=1e-3)
    positions = 5120 + 64
    assert plan.cost.positions == positions
    read = 2 * MISTRAL_MATRICES * positions + 2 * 32 * MISTRAL["vocabulary"] * width
    read += 4 * (positions * (positions + 1) // 2) * width * MISTRAL["depth"]
    assert plan.cost.llm == pytest.approx(read, rel=1e-3)
    assert plan.cost.inference == plan.cost.encode + plan.cost.connect + plan.cost.llm


def test_all_layers_of_clip_are_projected_by_about_100m_parameters():
    plan = plan_run(run([BOTH[0]], "project_sum", "linear"))
    assert plan.parameters["fusion"] == pytest.approx(24 * 1024 * 4096, rel=2e-3)
    assert plan.parameters["fusion"] == pytest.approx(100e6, rel=0.01)
    assert plan.visual_tokens == 576


@pytest.mark.parametrize(
    ("fusion", "tokens"),
    [
        ({"name": "concat_tokens"}, 576 + 1024),
        ({"name": "project_attention", "query": "features"}, 576 + 1024),
        ({"name": "project_attention", "query": "matrix"}, 576),
        ({"name": "concat_channels", "align": "interpolate", "to": "first"}, 576),
        ({"name": "cross_attention"}, 576),
        ({"name": "interleave", "to": "first"}, 2 * 576),
        ({"name": "sva"}, 576),
    ],
    ids=lambda value: value if isinstance(value, int) else "-".join(map(str, value.values())),
)
def test_tokens_of_the_mixers(fusion, tokens):
    encoders = [{"name": "clip-l-336", "layers": -2}, {"name": "internvit-6b-448", "layers": -1}]
    plan = plan_run(run(encoders, fusion))
    assert (plan.valid, plan.visual_tokens) == (True, tokens), plan.problems


@pytest.mark.parametrize(
    ("name", "layers", "megabytes"),
    [
        ("clip-bigg-224", -2, 0.85),
        ("clip-l-336", -2, 1.18),
        ("siglip-b-512", -2, 1.57),
        ("internvit-6b-448", -1, 6.55),
        ("clip-l-336", "all", 28),
    ],
)
def test_features_of_an_image_in_bfloat16(name, layers, megabytes):
    cls, config = resolve("encoder", ComponentRef.model_validate({"name": name, "layers": layers}))
    features = cls.spec(config).features
    assert 2 * features.layers * features.tokens * features.width / 1e6 == pytest.approx(megabytes, rel=0.012)


@pytest.mark.parametrize(
    ("encoders", "positions", "train", "ceiling"),
    [
        (["clip-l-336"], 636, ["adapter"], 1.02),
        (["clip-l-336"], 776, ["adapter", "llm"], 1.01),
        (["clip-l-336", "dinov2-l"], 636, ["adapter"], 1.04),
        (["clip-l-336", "dinov2-l"], 776, ["adapter", "llm"], 1.02),
        (["internvit-6b-448"], 636, ["adapter"], 1.67),
        (["internvit-6b-448"], 776, ["adapter", "llm"], 1.36),
    ],
)
def test_the_most_that_a_cache_of_features_can_save(encoders, positions, train, ceiling):
    """A sample's cost with its encoders over the cost without, for sequences as long as those of LLaVA's two stages."""
    sizes = {"dinov2-l": {"image_size": 336}}  # the grid of CLIP
    refs = [{"name": name, "layers": -1, **sizes.get(name, {})} for name in encoders]
    pool = {"name": "avg_pool", "grid": [8, 8], "depth": 1}  # a connector of no cost worth the name
    plan = plan_run(run(refs, "concat_channels", pool, train=train), SampleSize(positions - 64, positions - 576))
    assert plan.cost.positions == positions
    total = plan.cost.stages["s"].flops
    assert total / (total - plan.cost.encode) == pytest.approx(ceiling, abs=0.0125)
