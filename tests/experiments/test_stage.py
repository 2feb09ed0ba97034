"""One stage: the loss is the mean over the step's supervised tokens, and exactly the named parts learn."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from chiasm.batch import collate
from chiasm.config import PARTS, RunConfig, TokensConfig
from chiasm.prompt import IGNORE, PromptBuilder
from chiasm.sample import Sample, Turn
from chiasm_experiments.data.feed import FeatureMemo, Feed
from chiasm_experiments.data.mixture import Mixture
from chiasm_experiments.data.order import Order
from chiasm_experiments.training.stage import DivergedError, train_stage
from chiasm_experiments.training.workers import Workers

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
ALONE = Workers(0, 1, torch.device("cpu"))


class Square:
    """An image of one colour that counts how often it is drawn."""

    drawn = 0

    def __init__(self, colour: str) -> None:
        self.key = colour

    def load(self) -> Image.Image:
        Square.drawn += 1
        return Image.new("RGB", (8, 8), COLOURS[self.key])


class Samples:
    """Image, text and two-image samples with answers of different lengths."""

    def __init__(self, size: int = 12) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        names = list(COLOURS)
        colour = names[index % 3]
        if index % 4 == 3:
            return Sample(f"text{index}", (Turn("say", "ok" * (index % 3 + 1)),))
        images = (Square(colour),) if index % 4 else (Square(colour), Square(names[(index + 1) % 3]))
        return Sample(f"s{index}", (Turn("c?", colour),), images)


def run_config(**stage) -> RunConfig:
    base = {"name": "s", "data": "x", "train": ["adapter", "tokens", "llm"], "lr": 1e-2, "batch_size": 6}
    values = {"vision": {"encoders": ["x"]}, "llm": "x", "stages": [base | stage], "system": ""}
    return RunConfig.model_validate(values)


def train(vlm, run, memo=None, samples=None):
    builder = PromptBuilder(vlm.llm, TokensConfig(), vlm.visual_tokens, "")
    feed = Feed(vlm, builder, memo, ["toy"] * len(vlm.encoders) if memo else ())
    log: list[dict] = []
    mixture = Mixture([samples or Samples()])
    result = train_stage(vlm, run, 0, mixture, feed, ALONE, lambda step, steps, metrics: log.append(metrics))
    return result, log


def weights(vlm):
    return {name: value.clone() for name, value in vlm.state_dict().items()}


@pytest.mark.parametrize("micro", [1, 2, 4, 5])
def test_any_micro_batch_gives_the_same_parameters(make_vlm, micro):
    whole, parts = make_vlm(), make_vlm()
    train(whole, run_config(epochs=2))
    train(parts, run_config(epochs=2, micro_batch_size=micro))
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], value, rtol=0, atol=1e-6)


def test_a_step_follows_the_formula(make_vlm):
    """One AdamW step written out: the gradient of the mean cross-entropy over all supervised tokens of the batch."""
    run = run_config(steps=1, warmup=0.0, schedule="constant", clip_norm=None)
    vlm, reference = make_vlm(), make_vlm()
    result, log = train(vlm, run)
    builder = PromptBuilder(reference.llm, TokensConfig(), reference.visual_tokens, "")
    samples = [Samples()[i] for i in Order(12, 6, 0, 0).step(0)]
    images = [image.load() for sample in samples for image in sample.images]
    pixels = reference.encoders[0].preprocess(images, "squash")
    batch = collate([builder.train(sample) for sample in samples], [pixels])
    logits = reference.logits(batch)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels_BT[:, 1:].flatten(), ignore_index=IGNORE)
    assert log[0]["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert result.supervised_tokens == int((batch.labels_BT != IGNORE).sum())
    loss.backward()
    after = dict(vlm.named_parameters())
    for part in ("adapter", "tokens", "llm"):
        for name, before in reference.part(part).named_parameters():
            gradient = before.grad
            # AdamW's first step: both moments are the gradient itself after bias correction
            wanted = before - 1e-2 * gradient / (gradient.abs() + 1e-8)
            moved = gradient.abs() > 1e-7  # below that, rounding decides the sign
            torch.testing.assert_close(after[f"{part}.{name}"][moved], wanted[moved], rtol=0, atol=2e-4)


def test_frozen_parts_keep_their_bytes_and_their_mode(make_vlm):
    vlm = make_vlm()
    before = weights(vlm)
    train(vlm, run_config(train=["adapter", "tokens"]))
    changed = {name.split(".")[0] for name, value in weights(vlm).items() if not torch.equal(value, before[name])}
    assert changed == {"adapter", "tokens"}
    assert not vlm.llm.training
    assert all(vlm.part(part).training == (part in ("adapter", "tokens")) for part in PARTS)


def test_the_same_seed_gives_the_same_run_and_another_does_not(make_vlm):
    losses = []
    for seed in (0, 0, 1):
        run = run_config(epochs=3).model_copy(update={"seed": seed})
        losses.append([metrics["loss"] for metrics in train(make_vlm(), run)[1]])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
    assert all(math.isfinite(loss) for loss in losses[0])


def test_a_memo_changes_no_bit_and_draws_each_image_once(make_vlm):
    plain, remembered = make_vlm(2), make_vlm(2)
    run = run_config(epochs=4, train=["adapter", "tokens", "llm"])
    train(plain, run)
    Square.drawn = 0
    memo = FeatureMemo(2**20)
    train(remembered, run, memo)
    assert Square.drawn <= 2 * len(COLOURS) + 6  # at most the first batch draws a colour more than once
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(remembered)[name], value, rtol=0, atol=1e-6)


def test_a_full_memo_forgets_the_oldest_and_still_trains(make_vlm):
    memo = FeatureMemo(100)  # two of the toy's features of 48 bytes
    train(make_vlm(), run_config(epochs=2), memo)
    assert 0 < memo.bytes <= 100


def test_divergence_is_told_with_a_remedy(make_vlm):
    with pytest.raises(DivergedError, match=r"stage 's': the loss is (nan|inf) at step \d+ of \d+; lower lr"):
        train(make_vlm(), run_config(lr=1e20, epochs=40, clip_norm=None))


def test_an_error_names_the_sample(make_vlm):
    class Broken(Samples):
        def __getitem__(self, index: int) -> Sample:
            sample = super().__getitem__(index)
            return Sample("culprit", (Turn("q" * 99, "x"),)) if index == 5 else sample

    with pytest.raises(ValueError, match="'culprit' is longer than the context"):
        train(make_vlm(), run_config(epochs=1), samples=Broken())
