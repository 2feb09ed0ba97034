"""What is computed at once: how a size is found, what a step is estimated to take, and what is said when it fails."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from chiasm.build import build_vlm
from chiasm.config import RunConfig
from chiasm.prompt import PromptBuilder
from chiasm.sample import Sample, Turn
from chiasm_experiments.data.feed import Feed
from chiasm_experiments.data.mixture import Mixture, load_mixture
from chiasm_experiments.training import memory
from chiasm_experiments.training.memory import (
    MemoryFit,
    MemoryShortError,
    even,
    explained,
    fit_memory,
    largest,
    longest,
    step_bytes,
)
from chiasm_experiments.training.workers import Workers

CLIP = {"image_size": 28, "patch_size": 14, "width": 16, "depth": 2, "heads": 2, "mlp_width": 16}
SHAPE = {"width": 64, "depth": 6, "heads": 4, "kv_heads": 2, "mlp_width": 128, "context_length": 512}
RUN = {
    "vision": {"encoders": [{"name": "clip", "shape": CLIP}], "adapter": "mlp"},
    "llm": {"name": "causal", "shape": SHAPE},
    "stages": [
        {
            "name": "s",
            "data": {"name": "world", "task": "captions", "size": 8, "image_size": 96},
            "train": ["adapter", "llm"],
            "lr": 1e-3,
            "batch_size": 12,
        }
    ],
}
CPU = Workers(0, 1, torch.device("cpu"))
GPU = Workers(0, 1, torch.device("cuda"))


def run_config(**stage) -> RunConfig:
    return RunConfig.model_validate(RUN | {"stages": [RUN["stages"][0] | stage]})


@pytest.fixture(scope="module")
def built():
    run = run_config()
    vlm = build_vlm(run)
    vlm.set_trained(run.stages[0].train)
    feed = Feed(vlm, PromptBuilder(vlm.llm, run.tokens, vlm.visual_tokens, run.system))
    return vlm, feed, load_mixture(run.stages[0].data)


@pytest.mark.parametrize(("limit", "most", "found"), [(0, 8, 0), (1, 8, 1), (5, 8, 4), (7, 7, 7), (9, 7, 7), (6, 7, 4)])
def test_the_largest_size_is_found_by_doubling(limit, most, found):
    tried = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    assert largest(fits, most) == found
    assert tried == sorted(tried)
    assert max(tried) <= most


@pytest.mark.parametrize(("share", "most", "size"), [(12, 12, 12), (12, 8, 6), (13, 8, 7), (10, 4, 4), (9, 1, 1)])
def test_micro_batches_are_equal_and_no_more_than_needed(share, most, size):
    assert even(share, most) == size
    assert -(-share // size) == -(-share // most)


def test_the_longest_samples_are_found_without_their_images():
    class Samples:
        def __len__(self):
            return 50

        def __getitem__(self, index):
            image = SimpleNamespace(key="x")  # has nothing to load
            return Sample(f"{index}", (Turn("q", "x" * (index * 7 % 50)),), (image,) if index == 3 else ())

    found = longest(Mixture([Samples()]), 3, visual_tokens=100)
    assert [sample.id for sample in found] == ["3", "7", "14"]
    assert len(longest(Mixture([Samples()]), 60, visual_tokens=100)) == 60


@pytest.mark.parametrize(("given", "size"), [(None, 12), ("auto", 12), (5, 5)])
def test_on_the_cpu_a_micro_batch_is_what_is_given_or_all_of_the_share(built, given, size):
    vlm, feed, samples = built
    run = run_config(micro_batch_size=given)
    assert fit_memory(vlm, run, 0, samples, feed, CPU) == MemoryFit(size, checkpointing=False)
    assert fit_memory(vlm, run, 0, samples, feed, CPU, "on") == MemoryFit(size, checkpointing=True)
    assert all(block.recomputed for block in vlm.llm.block_modules())
    fit_memory(vlm, run, 0, samples, feed, CPU)
    assert not any(block.recomputed for block in vlm.llm.block_modules())


def test_the_estimate_grows_with_the_size_and_less_with_checkpointing(built):
    vlm, feed, samples = built
    run = run_config()
    example = feed.train(samples[0])

    def need(size: int, checkpointing: bool = False) -> int:
        found = step_bytes(vlm, run, run.stages[0], example, size, checkpointing=checkpointing)
        assert found is not None
        return found

    learning = sum(p.numel() for part in ("adapter", "llm") for p in vlm.part(part).parameters())
    assert need(1) >= learning * (8 + 2 + 4)  # moments, a bfloat16 copy, gradients
    each = (need(4000) - need(2000)) / 2000
    assert need(6000) - need(4000) == pytest.approx(2000 * each, rel=1e-6)
    kept = type(vlm.llm).activation_bytes(vlm.llm.config, len(example.prompt), trained=True)
    assert each >= kept
    saved = (need(4000) - need(4000, checkpointing=True)) / 4000
    inputs = SHAPE["depth"] * len(example.prompt) * SHAPE["width"] * 2
    assert saved == pytest.approx(kept - kept // SHAPE["depth"] - inputs, rel=1e-3)
    assert saved > 0


class Card:
    """A GPU of so many bytes, on which a pass takes as many as are estimated."""

    def __init__(self, monkeypatch, vlm, bytes_: int) -> None:
        self.passes: list[tuple[int, bool]] = []

        def attempt(vlm, run, stage, feed, examples, device, *, again):
            on = vlm.llm.block_modules()[0].__dict__.get("recomputed", False)
            self.passes.append((len(examples), on))
            return step_bytes(vlm, run, stage, examples[0], len(examples), checkpointing=on) <= bytes_

        monkeypatch.setattr(memory, "free_bytes", lambda device: bytes_)
        monkeypatch.setattr(memory, "_try", attempt)
        monkeypatch.setattr(memory, "HEADROOM", 0.0)


def test_on_a_gpu_the_size_is_measured_and_checkpointing_is_estimated(built, monkeypatch):
    vlm, feed, samples = built
    run, auto = run_config(), run_config(micro_batch_size="auto")
    example = feed.train(longest(samples, 1, vlm.visual_tokens)[0])

    def need(size: int, on: bool) -> int:
        found = step_bytes(vlm, run, run.stages[0], example, size, checkpointing=on)
        assert found is not None
        return found

    card = Card(monkeypatch, vlm, need(12, False))
    assert fit_memory(vlm, run, 0, samples, feed, GPU) == MemoryFit(12, checkpointing=False)
    assert not card.passes
    assert fit_memory(vlm, auto, 0, samples, feed, GPU) == MemoryFit(12, checkpointing=False)
    assert card.passes == [(1, False), (2, False), (4, False), (8, False), (12, False)]
    Card(monkeypatch, vlm, need(12, False) - 1)
    assert fit_memory(vlm, run, 0, samples, feed, GPU) == MemoryFit(12, checkpointing=True)
    assert fit_memory(vlm, run, 0, samples, feed, GPU, "off") == MemoryFit(12, checkpointing=False)
    assert fit_memory(vlm, auto, 0, samples, feed, GPU) == MemoryFit(6, checkpointing=False)
    assert fit_memory(vlm, auto, 0, samples, feed, GPU, shards=True) == MemoryFit(6, checkpointing=False)
    Card(monkeypatch, vlm, 1000)
    with pytest.raises(MemoryShortError, match=r"stage 's': not one of its longest samples fits .*strategy=fsdp"):
        fit_memory(vlm, auto, 0, samples, feed, GPU)
    vlm.llm.checkpoint_activations(False)


def test_a_trial_pass_counts_what_comes_later_and_leaves_nothing(built, monkeypatch):
    vlm, feed, samples = built
    stage = run_config().stages[0]
    learning = sum(p.numel() for part in stage.train for p in vlm.part(part).parameters())
    seen = []

    def peak(device):
        seen.append(all(p.grad is not None for p in vlm.adapter.parameters()))
        return 1000

    for name in ("reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peak)
    monkeypatch.setattr(memory, "HEADROOM", 0.0)
    examples = [feed.train(samples[i]) for i in (0, 1)]

    def fits(room: int, *, again: bool) -> bool:
        monkeypatch.setattr(memory, "free_bytes", lambda device: room)
        found = memory._try(vlm, run_config(), stage, feed, examples, CPU.device, again=again)
        assert all(p.grad is None for p in vlm.parameters())
        return found

    assert fits(1000 + 8 * learning, again=False)
    assert not fits(1000 + 8 * learning - 1, again=False)
    assert not fits(1000 + 8 * learning, again=True)
    assert fits(1000 + 12 * learning, again=True)
    assert seen == [True] * 4

    def exhausted(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(type(vlm), "forward", exhausted)
    assert not fits(10**9, again=False)


def test_a_step_that_runs_out_of_memory_says_what_to_set():
    stage = run_config().stages[0]
    with pytest.raises(MemoryShortError, match=r"'s': .* of 12 samples .* below 12 .*checkpointing=on"):  # noqa: SIM117
        with explained(stage, MemoryFit(12, checkpointing=False)):
            raise torch.OutOfMemoryError("no room")
    with pytest.raises(MemoryShortError, match="strategy=fsdp on more workers"):  # noqa: SIM117
        with explained(stage, MemoryFit(1, checkpointing=True)):
            raise torch.OutOfMemoryError("no room")
    with pytest.raises(RuntimeError, match="another"), explained(stage, MemoryFit(1, checkpointing=True)):
        raise RuntimeError("another")


@pytest.mark.parametrize("wrong", [0, -1, "all", 1.5])
def test_other_sizes_are_refused(wrong):
    with pytest.raises(ValueError, match="micro_batch_size"):
        run_config(micro_batch_size=wrong)
