"""A stage that was stopped anywhere goes on from its checkpoint and ends with the same bits."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from PIL import Image
from torch import nn

from chiasm.build import build_vlm
from chiasm.config import RunConfig, TokensConfig
from chiasm.features import Features
from chiasm.prompt import PromptBuilder
from chiasm.sample import Sample, Turn
from chiasm_encoders.clip import ClipEncoder
from chiasm_experiments.data.feed import FeatureMemo, Feed
from chiasm_experiments.data.mixture import Mixture
from chiasm_experiments.data.store import FeatureStore
from chiasm_experiments.training.checkpoint import Checkpoints
from chiasm_experiments.training.files import MetricsLog
from chiasm_experiments.training.run import make_feed
from chiasm_experiments.training.stage import train_stage
from chiasm_experiments.training.workers import Workers

ALONE = Workers(0, 1, torch.device("cpu"))
STEPS = 7


class Texts:
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Sample:
        return Sample(f"s{index}", (Turn("what?", "abcdefghij"[: index + 1]),))


class Noise:
    """An image of noise, which its key tells."""

    def __init__(self, key: str) -> None:
        self.key = key

    def load(self) -> Image.Image:
        return Image.frombytes("RGB", (28, 28), hashlib.shake_256(self.key.encode()).digest(28 * 28 * 3))


class Pictures:
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Sample:
        return Sample(f"s{index}", (Turn("what?", "abc"[: index % 3 + 1]),), (Noise(str(index)),))


NARROW = {
    "vision": {
        "encoders": [
            {
                "name": "clip",
                "shape": {"image_size": 28, "patch_size": 14, "width": 8, "depth": 2, "heads": 2, "mlp_width": 8},
            }
        ]
    },
    "llm": {
        "name": "causal",
        "shape": {"width": 16, "depth": 2, "heads": 2, "kv_heads": 1, "mlp_width": 24, "context_length": 128},
    },
    "stages": [{"name": "s", "data": "x", "train": ["adapter"], "lr": 1e-2, "batch_size": 5}],
    "system": "",
}


class StoppedError(Exception):
    pass


@pytest.fixture
def learner(make_vlm):
    """A toy model whose language model has dropout, so that the random state matters."""

    def make():
        vlm = make_vlm()
        head = vlm.llm.head
        vlm.llm.head = nn.Sequential(nn.Dropout(0.5), head)
        return vlm

    return make


def run_config(**stage) -> RunConfig:
    base = {"name": "s", "data": "x", "train": ["adapter", "tokens", "llm"], "lr": 1e-2, "batch_size": 4}
    base |= {"steps": STEPS, "weight_decay": 0.1, "warmup": 0.3}
    values = {"vision": {"encoders": ["x"]}, "llm": "x", "stages": [base | stage], "system": ""}
    return RunConfig.model_validate(values)


def train(
    vlm,
    folder,
    stop_after: int | None = None,
    log: list | None = None,
    seconds: float = 0,
    feed=None,
    data=None,
    **stage,
):
    feed = feed or Feed(vlm, PromptBuilder(vlm.llm, TokensConfig(), vlm.visual_tokens, ""))
    checkpoints = Checkpoints(folder, ALONE, seconds)

    def on_step(step, steps, metrics):
        if log is not None:
            log.append((step, metrics["loss"], metrics["lr"]))
        if step == stop_after:
            checkpoints.wait()
            raise StoppedError

    try:
        return train_stage(
            vlm, run_config(**stage), 0, Mixture([data or Texts()]), feed, ALONE, on_step, checkpoints=checkpoints
        )
    finally:
        checkpoints.close()


def weights(vlm):
    return {name: value.clone() for name, value in vlm.state_dict().items()}


def assert_equal(found, wanted):
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.fixture
def undisturbed(learner, tmp_path):
    vlm, log = learner(), []
    result = train(vlm, tmp_path / "undisturbed", log=log)
    return weights(vlm), log, result


@pytest.mark.parametrize("stops", [[1], [2], [4], [6], [2, 5], [3, 3, 4, 6]])
def test_a_stage_that_was_stopped_ends_with_the_same_bits(learner, tmp_path, undisturbed, stops):
    wanted, steps, result = undisturbed
    log: list = []
    for stop in stops:
        with pytest.raises(StoppedError):
            train(learner(), tmp_path / "stage", stop_after=stop, log=log)
    last = learner()
    found = train(last, tmp_path / "stage", log=log)
    assert_equal(weights(last), wanted)
    # a step that was stopped before its checkpoint is taken again, with the same loss and rate; none is skipped
    assert sorted(set(log)) == steps
    assert found.last_loss == result.last_loss
    assert found.first_loss == result.first_loss
    assert found.supervised_tokens == result.supervised_tokens
    assert found.steps == STEPS


@pytest.mark.parametrize("kept", ["in memory", "on the disk"])
def test_a_run_that_kept_features_before_it_was_stopped_ends_with_the_same_bits(tmp_path, monkeypatch, kept):
    """It encodes other images together than one that was not stopped, and a batch of another size rounds otherwise."""
    config, forward = RunConfig.model_validate(NARROW), ClipEncoder.forward

    def rounded(self, pixels_B3HW):  # as for a few rows of narrow products, only more
        features = forward(self, pixels_B3HW)
        return Features(features.tokens * (1 + 1e-5 * len(pixels_B3HW)), features.grid)

    monkeypatch.setattr(ClipEncoder, "forward", rounded)

    def part(folder, **how):
        vlm = build_vlm(config)
        memo = FeatureMemo(2**20) if kept == "in memory" else None
        store = FeatureStore(tmp_path / folder / "features", 2**20) if kept == "on the disk" else None
        train(vlm, tmp_path / folder, feed=make_feed(vlm, config, memo, store), data=Pictures(), batch_size=5, **how)
        return weights(vlm)

    wanted = part("undisturbed")
    for stop in (2, 4):
        with pytest.raises(StoppedError):
            part(str(stop), stop_after=stop)
        shutil.rmtree(tmp_path / str(stop) / "features", ignore_errors=True)  # as if others had taken its room
        assert_equal(part(str(stop)), wanted)


def test_adafactor_goes_on_with_the_same_bits(learner, tmp_path):
    """Its state is of other shapes than the parameters, and its steps depend on how many there were."""
    whole, part, last = learner(), learner(), learner()
    train(whole, tmp_path / "whole", optimizer="adafactor")
    with pytest.raises(StoppedError):
        train(part, tmp_path / "stage", stop_after=4, optimizer="adafactor")
    assert any(not torch.equal(weights(part)[name], value) for name, value in weights(whole).items())
    log: list = []
    train(last, tmp_path / "stage", log=log, optimizer="adafactor")
    assert [step for step, *_ in log] == [4, 5, 6, 7]
    assert_equal(weights(last), weights(whole))
    plain = learner()
    train(plain, tmp_path / "plain")
    assert any(not torch.equal(weights(plain)[name], value) for name, value in weights(whole).items())


def test_other_weights_at_the_start_change_nothing_of_what_is_resumed(learner, tmp_path, undisturbed):
    wanted, _, _ = undisturbed
    with pytest.raises(StoppedError):
        train(learner(), tmp_path / "stage", stop_after=5)
    other = learner()
    with torch.no_grad():
        for part in ("adapter", "tokens", "llm"):
            for parameter in other.part(part).parameters():
                parameter.add_(1.0)
    train(other, tmp_path / "stage")
    assert_equal(weights(other), wanted)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "random-0.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(learner, tmp_path, undisturbed, file, damage, capsys):
    wanted, _, _ = undisturbed
    folder = tmp_path / "stage"
    with pytest.raises(StoppedError):
        train(learner(), folder, stop_after=5)
    newest = sorted(folder.glob("checkpoint-*"))[-1] / file
    if damage == "cut":
        newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    else:
        newest.unlink()
    last = learner()
    train(last, folder)
    assert_equal(weights(last), wanted)
    assert "checkpoint-00000004 cannot be read" in capsys.readouterr().out


def test_a_write_that_was_killed_leaves_the_last_good_one(learner, tmp_path, undisturbed):
    wanted, _, _ = undisturbed
    folder = tmp_path / "stage"
    with pytest.raises(StoppedError):
        train(learner(), folder, stop_after=4)
    half = folder / ".checkpoint-00000004"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    last = learner()
    train(last, folder)
    assert_equal(weights(last), wanted)


def test_the_newest_two_are_kept_and_no_step_waits_for_time(learner, tmp_path):
    folder = tmp_path / "stage"
    with pytest.raises(StoppedError):
        train(learner(), folder, stop_after=6)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-00000004", "checkpoint-00000005"]
    with pytest.raises(StoppedError):
        train(learner(), tmp_path / "seldom", stop_after=6, seconds=3600)
    assert not (tmp_path / "seldom").exists()


def test_a_log_holds_each_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in (1, 2, 3):
            log.write("a", step, {"loss": float(step)})
        for step in (1, 2):
            log.write("b", step, {"loss": 10.0 + step})
    with path.open("a") as file:
        file.write('{"stage": "b", "st')  # killed while it wrote
    with MetricsLog(path) as log:
        for step in (2, 3):
            log.write("b", step, {"loss": 20.0 + step})
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["stage"], line["step"], line["loss"]) for line in found] == [
        ("a", 1, 1.0), ("a", 2, 2.0), ("a", 3, 3.0), ("b", 1, 11.0), ("b", 2, 22.0), ("b", 3, 23.0),
    ]  # fmt: skip


def test_a_log_that_takes_two_stages_again_keeps_what_it_wrote_of_the_first(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for stage in "ab":
            for step in (1, 2, 3):
                log.write(stage, step, {"loss": float(step)})
    with MetricsLog(path) as log:
        for stage in "ab":
            for step in (2, 3):
                log.write(stage, step, {"loss": 10.0 + step})
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted((line["stage"], line["step"], line["loss"]) for line in found) == [
        ("a", 1, 1.0), ("a", 2, 12.0), ("a", 3, 13.0), ("b", 1, 1.0), ("b", 2, 12.0), ("b", 3, 13.0),
    ]  # fmt: skip
