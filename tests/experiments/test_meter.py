"""Metrics that are read late are complete, in order, and those of their own step."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image

from chiasm.build import build_vlm
from chiasm.config import RunConfig, TokensConfig
from chiasm.cost import SampleSize
from chiasm.plan import plan_run
from chiasm.prompt import PromptBuilder
from chiasm.sample import Sample, Turn
from chiasm_experiments.data.feed import Feed
from chiasm_experiments.data.mixture import Mixture
from chiasm_experiments.training import meter as meters
from chiasm_experiments.training.checkpoint import Checkpoints
from chiasm_experiments.training.meter import Meter
from chiasm_experiments.training.operations import ModelOperations, peak_operations
from chiasm_experiments.training.sight import NOTHING, Sight
from chiasm_experiments.training.stage import train_stage
from chiasm_experiments.training.workers import Workers

CPU = torch.device("cpu")


class LateMark:
    """A mark of a device whose work is two marks behind."""

    made: list[LateMark] = []

    def __init__(self) -> None:
        self.at = float(len(self.made))
        self.waited = False
        self.made.append(self)

    def reached(self) -> bool:
        return self.waited or len(self.made) - self.at > 5

    def wait(self) -> None:
        self.waited = True

    def since(self, earlier: LateMark) -> float:
        return self.at - earlier.at


@pytest.fixture
def late(monkeypatch):
    LateMark.made = []

    class Clock:
        mark = staticmethod(LateMark)

    monkeypatch.setattr(meters, "_HostClock", Clock)


def give(meter: Meter, step: int, **values) -> None:
    meter.begin()
    given = {"loss": 0.5 * step, "gradient_norm": 2.0, "lr": 1e-3, "tokens": 8 * step, "samples": 4, "positions": 40}
    meter.end(step, **(given | values))


def test_rates_follow_from_the_time_between_two_ends(late):
    meter = Meter(CPU, peak=100.0)
    give(meter, 1, flops=50.0)
    give(meter, 2, flops=None)
    found = dict(meter.flush())
    # the clock ticks once a mark: a step is its begin and its end
    assert found[1]["step_seconds"] == 2
    assert found[1]["tokens_per_second"] == 4
    assert found[2]["tokens_per_second"] == 8
    assert found[1]["samples_per_second"] == 2
    assert found[1]["positions_per_second"] == 20
    assert found[1]["model_flop_utilisation"] == 50 / 2 / 100
    assert found[1]["data_wait"] == 0.5
    assert "model_flop_utilisation" not in found[2]


def test_steps_come_late_in_order_and_each_once(late):
    meter, seen = Meter(CPU), []
    for step in range(1, 8):
        give(meter, step, loss=torch.tensor(float(step)))
        seen += meter.ready()
    assert 0 < len(seen) < 7
    seen += meter.flush()
    assert [(step, metrics["loss"]) for step, metrics in seen] == [(i, float(i)) for i in range(1, 8)]
    assert not list(meter.flush())


def test_waiting_for_data_is_told():
    meter = Meter(CPU)
    time.sleep(0.03)
    meter.begin()
    time.sleep(0.01)
    meter.end(1, loss=1.0, gradient_norm=1.0, lr=1.0, tokens=1, samples=1, positions=1)
    ((_, metrics),) = meter.ready()
    assert 0.03 / metrics["step_seconds"] == pytest.approx(metrics["data_wait"], rel=0.3)
    assert metrics["peak_memory_bytes"] > 2**26


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("Tesla T4", None),
        ("NVIDIA H2000", None),
    ],
)
def test_peaks_are_found_by_whole_words(name, tera):
    assert peak_operations(name) == (None if tera is None else pytest.approx(tera * 1e12))


@pytest.mark.parametrize("train", [["adapter", "tokens"], ["encoders", "adapter", "llm"]], ids="+".join)
def test_operations_of_a_sample_are_those_of_its_plan(train):
    clip = {"image_size": 28, "patch_size": 14, "width": 16, "depth": 2, "heads": 2, "mlp_width": 16}
    shape = {"width": 32, "depth": 1, "heads": 2, "kv_heads": 1, "mlp_width": 32, "context_length": 512}
    stage = {"name": "s", "data": "world", "train": train, "lr": 1e-3, "batch_size": 4}
    vision = {"encoders": [{"name": "clip", "shape": clip}], "adapter": "mlp"}
    given = {"vision": vision, "llm": {"name": "causal", "shape": shape}, "stages": [stage], "system": ""}
    run = RunConfig.model_validate(given)
    vlm = build_vlm(run)
    needed = ModelOperations(vlm, run, run.stages[0])
    feed = Feed(vlm, PromptBuilder(vlm.llm, TokensConfig(), vlm.visual_tokens, ""))

    class Grey:
        key = "grey"

        def load(self):
            return Image.new("RGB", (30, 40))

    example = feed.train(Sample("s", (Turn("what?", "a thing"),), (Grey(),)))
    positions, answer = len(example.prompt), example.prompt.supervised
    cost = plan_run(run, SampleSize(positions - vlm.visual_tokens, answer)).cost
    assert needed([example]) == cost.stages["s"].flops
    assert needed([example, example]) == 2 * needed([example])
    if "encoders" not in train:  # whose features a cache may hold
        stored = replace(example, pixels=())
        assert needed([example]) - needed([stored]) == cost.encode


class Texts:
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Sample:
        return Sample(f"s{index}", (Turn("what?", "abcdefgh"[: index + 1]),))


def stage(**change) -> RunConfig:
    base = {"name": "s", "data": "x", "train": ["adapter", "tokens", "llm"], "lr": 1e-2, "batch_size": 4, "steps": 6}
    values = {"vision": {"encoders": ["x"]}, "llm": "x", "stages": [base | change], "system": ""}
    return RunConfig.model_validate(values)


def train(vlm, on_step, checkpoints=None, sight=NOTHING):
    feed = Feed(vlm, PromptBuilder(vlm.llm, TokensConfig(), vlm.visual_tokens, ""))
    alone = Workers(0, 1, CPU)
    return train_stage(vlm, stage(), 0, Mixture([Texts()]), feed, alone, on_step, checkpoints=checkpoints, sight=sight)


def test_a_checkpoint_claims_no_step_that_was_not_told(make_vlm, tmp_path, late):
    """With a device that is behind: at each checkpoint on the disk, every step up to it has been told."""
    told: list[int] = []
    checkpoints = Checkpoints(tmp_path, Workers(0, 1, CPU), seconds=0)
    write = checkpoints.write
    claimed = []

    def watched(learner, position):
        claimed.append((position.step, len(position.losses), list(told)))
        write(learner, position)

    checkpoints.write = watched
    result = train(make_vlm(), lambda step, steps, metrics: told.append(step), checkpoints)
    checkpoints.wait()
    checkpoints.close()
    assert [(step, losses) for step, losses, _ in claimed] == [(i, i) for i in range(1, 6)]
    assert all(steps == list(range(1, step + 1)) for step, _, steps in claimed)
    newest = sorted(tmp_path.glob("checkpoint-*"))[-1]
    assert len(json.loads((newest / "state.json").read_text())["losses"]) == 5
    assert told == list(range(1, 7))
    assert result.steps == 6


def test_losses_are_the_same_however_late_they_are_read(make_vlm, request):
    soon: list[tuple[int, float]] = []
    first = train(make_vlm(), lambda step, steps, metrics: soon.append((step, metrics["loss"])))
    request.getfixturevalue("late")
    later: list[tuple[int, float]] = []
    second = train(make_vlm(), lambda step, steps, metrics: later.append((step, metrics["loss"])))
    assert soon == later
    assert (first.first_loss, first.last_loss) == (second.first_loss, second.last_loss)


@pytest.mark.parametrize(("traced", "found"), [(2, 2), (9, 5)])
def test_the_steps_that_are_asked_for_are_traced(make_vlm, tmp_path, traced, found):
    folder = tmp_path / "profile"
    train(make_vlm(), lambda *_: None, sight=Sight(trace=traced, folder=folder))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if str(event.get("name", "")).startswith("ProfilerStep#")}
    assert len(steps) == found
    assert any("aten::mm" in str(event.get("name")) for event in events)
    assert "Self CPU" in (folder / "operations.txt").read_text()
