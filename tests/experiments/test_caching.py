"""Whether features are kept: what is measured, what is decided, and what is said."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from chiasm.config import RunConfig, TokensConfig
from chiasm.cost import train_flops
from chiasm.errors import ConfigError
from chiasm.prompt import PromptBuilder
from chiasm.sample import Sample, Turn
from chiasm_experiments.data.feed import Feed
from chiasm_experiments.data.mixture import Mixture
from chiasm_experiments.training import caching
from chiasm_experiments.training.caching import count_uses, decide
from chiasm_experiments.training.execution import Execution
from chiasm_experiments.training.local import run_here
from chiasm_experiments.training.run import Job
from chiasm_experiments.training.speeds import DiskSpeed, disk_speed, encoder_seconds
from chiasm_experiments.training.workers import Workers

ALONE = Workers(0, 1, torch.device("cpu"))
VIEW_BYTES = 1 * 4 * 3 * 4  # the toy encoder's features of one view, float32


class Named:
    """An image that is never loaded."""

    def __init__(self, key: str) -> None:
        self.key = key


class Numbered:
    """Samples with an image each but for the last quarter."""

    def __init__(self, size: int, prefix: str = "") -> None:
        self.size, self.prefix = size, prefix

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        images = (Named(f"{self.prefix}{index}"),) if index < self.size * 3 / 4 else ()
        return Sample(str(index), (Turn("q", "a"),), images)


def run_of(*stages: dict, train=("adapter", "llm")) -> RunConfig:
    base = {"data": "x", "train": list(train), "lr": 1e-2, "batch_size": 8}
    named = [{"name": f"s{i}", **base, **stage} for i, stage in enumerate(stages)]
    return RunConfig.model_validate({"vision": {"encoders": ["x"]}, "llm": "x", "stages": named})


def feed_of(vlm):
    def make(store) -> Feed:
        return Feed(vlm, PromptBuilder(vlm.llm, TokensConfig(), vlm.visual_tokens, ""), None, ["toy"], store)

    return make


@pytest.fixture
def decided(make_vlm, tmp_path, monkeypatch):
    """The decision about a run of 64,000 samples on a machine of given speed."""

    def make(run, encode=1e-2, disk=(1e9, 1e9, 1e9), size=64_000, runs=1, mixtures=None, **execution):
        monkeypatch.setattr(caching, "encoder_seconds", lambda vlm, k, device, views: encode)
        monkeypatch.setattr(caching, "disk_speed", lambda folder, size: DiskSpeed(*disk))
        vlm = make_vlm()
        mixtures = mixtures or [Mixture([Numbered(size)])] * len(run.stages)
        settings = Execution(cache_folder=tmp_path / "cache", **execution)
        return decide(vlm, run, settings, mixtures, runs, ALONE, feed_of(vlm))

    return make


def test_uses_are_images_in_all_samples_of_all_epochs():
    run = run_of({"epochs": 2}, {"epochs": 3}, {"steps": 4})
    wanted = count_uses(run, [Mixture([Numbered(64)]), Mixture([Numbered(64)]), Mixture([Numbered(64, "other")])])
    assert wanted.uses == 48 * 2 + 48 * 3 + 32 * 48 / 64
    assert wanted.images == 48 + 32 * 48 / 64
    assert wanted.samples == 64 * 5 + 32
    assert len(wanted.keys) == 96


def test_one_pass_is_not_stored_and_several_or_a_study_are(decided, monkeypatch):
    monkeypatch.setattr(caching, "train_flops", lambda *_, **__: 0)
    once = decided(run_of({"epochs": 1}))
    assert not once.used
    assert once.store is None
    assert "each image is wanted 1 times by this run, and storing" in once.why
    twice = decided(run_of({"epochs": 2}))
    assert twice.used
    assert "each image is wanted 2 times by this run" in twice.why
    assert twice.told["used"] is True
    assert decided(run_of({"epochs": 1}, {"epochs": 1})).used, "two stages over the same images are two uses"
    shared = decided(run_of({"epochs": 1}), runs=2)
    assert shared.used
    assert "2 times by the 2 runs of the study that see it" in shared.why


def test_the_figures_follow_the_formula(decided, make_vlm):
    run = run_of({"epochs": 3})
    found = decided(run, encode=1e-2, disk=(1e3, 1e6, 1e9))
    images = 48_000.0
    vlm = make_vlm()
    operations = train_flops(run.stages[0], vlm.llm.geometry, vlm.views.most_tokens + 64, 32, 0, 0) * 64 / 48
    step = operations * 1e-2  # the toy encoder needs one operation, so it is one operation in 1e-2 s
    live = 3 * images * (1e-2 + step)
    first = images * max(1e-2 + step, VIEW_BYTES / 1e3)
    cached = first + 2 * images * max(step, VIEW_BYTES / 1e9)
    assert found.figures["live_seconds"] == pytest.approx(live)
    assert found.figures["saved_seconds"] == pytest.approx(live - cached)
    assert found.figures["bytes"] == images * VIEW_BYTES
    assert not found.used, "the step is so much slower than the encoder that nothing is gained"
    assert "wanted at least 20 s and 5%" in found.why


def test_a_slow_disk_and_a_small_gain_are_not_worth_it(decided, monkeypatch):
    monkeypatch.setattr(caching, "train_flops", lambda *_, **__: 0)
    run = run_of({"epochs": 2})
    assert decided(run).used
    assert not decided(run, disk=(1e9, 1e9, VIEW_BYTES / 1.2e-2)).used, "reading takes longer than encoding"
    assert not decided(run, disk=(VIEW_BYTES / 2.1e-2, 1e9, 1e9)).used, "writing takes longer than is saved"
    assert not decided(run, size=640).used, "half a dozen seconds"


def test_reading_counts_from_the_disk_where_the_memory_does_not_hold_all(decided, monkeypatch):
    monkeypatch.setattr(caching, "train_flops", lambda *_, **__: 0)
    slow_disk = (1e9, VIEW_BYTES / 1.2e-2, 1e9)
    assert decided(run_of({"epochs": 2}), disk=slow_disk).used
    monkeypatch.setattr(caching, "memory_for_files", lambda: 1000)
    assert not decided(run_of({"epochs": 2}), disk=slow_disk).used


def test_features_that_are_stored_already_are_read_even_once(decided, make_vlm, tmp_path, monkeypatch):
    monkeypatch.setattr(caching, "train_flops", lambda *_, **__: 0)
    run = run_of({"epochs": 1})
    first = decided(run, cache="on")
    (features,) = feed_of(make_vlm())(first.store).features
    for key in count_uses(run, [Mixture([Numbered(64_000)])]).keys:
        features.shelf.put(key, torch.zeros(1, 1, 4, 3))
    found = decided(run)
    assert found.used
    assert "100% of the images are stored already" in found.why


def test_where_not_all_fit_a_share_is_kept(decided, monkeypatch):
    monkeypatch.setattr(caching, "train_flops", lambda *_, **__: 0)
    size = 48_000 * VIEW_BYTES
    found = decided(run_of({"epochs": 8}), cache_gib=size / 2**30 / 3)
    assert found.used
    assert found.share == pytest.approx(0.3, rel=1e-3)
    assert "room for 30% of the images" in found.why


def test_settings_and_trained_encoders_come_first(decided):
    run = run_of({"epochs": 9})
    assert decided(run, cache="off").why == "turned off"
    assert not decided(run, cache="off").allowed
    on = decided(run_of({"epochs": 1}), cache="on")
    assert (on.used, on.why, on.share) == (True, "turned on", 1.0)
    trained = decided(run_of({"epochs": 9}, train=["encoders"]), cache="on")
    assert not trained.used
    assert not trained.allowed
    text = Mixture([[Sample("t", (Turn("q", "a"),))] * 8])
    assert decided(run, mixtures=[text]).why == "the data have no image"


def test_speeds_are_measured_and_leave_nothing_behind(make_vlm, tmp_path):
    speed = disk_speed(tmp_path, 2**20)
    assert min(speed.write, speed.read, speed.read_again) > 1e5
    assert not list(tmp_path.iterdir())
    assert 0 < encoder_seconds(make_vlm(), 0, torch.device("cpu"), 8) < 1


def test_a_folder_that_cannot_be_made_is_told(make_vlm, tmp_path):
    (tmp_path / "file").write_text("")
    vlm = make_vlm()

    def ask(choice):
        settings = Execution(cache=choice, cache_folder=tmp_path / "file" / "cache")
        return decide(vlm, run_of({"epochs": 9}), settings, [Mixture([Numbered(64)])], 1, ALONE, feed_of(vlm))

    assert "cannot be made" in ask("auto").why
    with pytest.raises(ConfigError, match="cache=on, and the folder .* cannot be made: .*; set cache_folder"):
        ask("on")


def test_a_second_run_reads_what_the_first_one_stored_and_its_manifest_says_so(tmp_path):
    shape = {"width": 32, "depth": 1, "heads": 2, "kv_heads": 1, "mlp_width": 32, "context_length": 512}
    clip = {"image_size": 28, "patch_size": 14, "width": 16, "depth": 2, "heads": 2, "mlp_width": 16}
    world = {"name": "world", "image_size": 96, "skills": ["colour"], "size": 8}
    stage = {"name": "s", "data": world, "train": ["adapter"], "lr": 1e-3, "batch_size": 4}
    run = RunConfig.model_validate(
        {
            "vision": {"encoders": [{"name": "clip", "shape": clip}], "adapter": "mlp"},
            "llm": {"name": "causal", "shape": shape},
            "system": "",
            "stages": [stage],
            "evaluate": {**world, "size": 2},
        }
    )
    cache = tmp_path / "cache"

    def execute(name, **execution):
        (tmp_path / name).mkdir()
        settings = Execution.model_validate({"cache_folder": cache, "loader_workers": 0, **execution})
        job = Job(run.model_dump(mode="json"), str(tmp_path / name), {"trial": name, "study": None}, settings)
        manifest = run_here(job, quiet=True)
        assert json.loads((tmp_path / name / "manifest.json").read_text())["cache"] == manifest["cache"]
        return manifest["cache"], load_file(tmp_path / name / "stages" / "s" / "adapter.safetensors")

    decision, wanted = execute("live", cache="off")
    assert decision == {"used": False, "why": "turned off"}
    assert not cache.exists()
    decision, first = execute("first", cache="on")
    assert decision["used"]
    assert (decision["images"], decision["uses"]) == (8, 8)
    (index,) = cache.glob("*/*.index")
    assert index.stat().st_size == 64 * 10, "eight images to train on, and two that are asked about"
    decision, second = execute("second", cache="on")
    assert index.stat().st_size == 64 * 10
    for name, value in wanted.items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-6)
        torch.testing.assert_close(second[name], value, rtol=0, atol=1e-6)
