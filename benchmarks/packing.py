"""Packed training beside padded training at realistic lengths, in supervised tokens a second.

Captions of 10 to 300 tokens and dialogues of 50 to 1500, each half of the samples, one in ten without an image; images
have 576 tokens, whose features are given. Both are compiled and train on the same batches of 32 with a language model
of 135M.

    python benchmarks/packing.py
    python benchmarks/packing.py --tiny    anywhere, small models; prints only
"""

from __future__ import annotations

import itertools
import random

import torch
from common import write_result
from speed import DEVICE, Scale, asked_scale, free, make_model, make_run, our_step, prompt, rate, some_features

from chiasm.batch import Batch, Padding, collate
from chiasm.prompt import Prompt
from chiasm.vlm import VLM
from chiasm_experiments.training.compiling import compile_model


def batch_of_prompts(vlm: VLM, scale: Scale, size: int, seed: int) -> list[Prompt]:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    prompts = []
    for _ in range(size):
        text = rng.randint(10, 300) if rng.random() < 0.5 else rng.randint(50, 1500)
        visual = 0 if rng.random() < 0.1 else scale.visual
        # about half of a dialogue is the answers
        prompts.append(prompt(vlm, visual, generator, text, max(4, text // 2)))
    return prompts


def make_batches(every: list[list[Prompt]], scale: Scale, pad: Padding) -> list[Batch]:
    batches = []
    for prompts in every:
        features = some_features(sum(len(item.views) for item in prompts), scale)
        batches.append(collate(prompts, [features], pad=pad).to(DEVICE))
    return batches


def main(scale: Scale) -> None:
    size, count = (4, 2) if scale.tiny else (32, 12)
    choice = "off" if scale.tiny else "on"
    run = make_run("135m", size, scale)
    vlm = make_model(run)
    compile_model(vlm, choice, DEVICE, live=False)
    every = [batch_of_prompts(vlm, scale, size, seed) for seed in range(count)]
    supervised = sum(item.supervised for prompts in every for item in prompts) / count
    positions = sum(len(item) for prompts in every for item in prompts) / count
    figures: dict[str, dict[str, float]] = {}
    pads: tuple[Padding, ...] = ("right", "packed")
    for pad in pads:
        batches = make_batches(every, scale, pad)
        step = our_step(vlm, run, itertools.cycle(batches).__next__)
        found = rate(step, size, warm=2 * count, least=8 * scale.seconds)
        figures["packed" if pad == "packed" else "padded"] = found | {
            "supervised_tokens_per_second": supervised / found["step_ms"] * 1000,
            "padding": 1 - positions / (sum(batch.ids_BT.numel() for batch in batches) / count),
        }
        del batches
        free()
        compile_model(vlm, choice, DEVICE, live=False)
    ratio = figures["packed"]["supervised_tokens_per_second"] / figures["padded"]["supervised_tokens_per_second"]
    write_result(
        "packing",
        figures=figures,
        ratio=ratio,
        asked="packed at least 1.5 of padded training's supervised tokens/s",
        met=ratio >= 1.5,
        write=not scale.tiny,
    )


if __name__ == "__main__":
    main(asked_scale(__doc__))
