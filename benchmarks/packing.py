"""Packed training beside padded training at realistic lengths, in supervised tokens a second.

Captions of 10 to 300 tokens and dialogues of 50 to 1500, each half of the samples, one in ten without an image; images
have 576 tokens, whose features are given. Both are compiled and train on the same batches of 32 with a language model
of 135M.

    python benchmarks/packing.py
"""

from __future__ import annotations

import itertools
import random

import torch
from common import write_result
from speed import free, make_model, make_run, our_step, prompt, rate

from chiasm.batch import Batch, Padding, collate
from chiasm.features import Features
from chiasm.prompt import Prompt
from chiasm.vlm import VLM
from chiasm_experiments.training.compiling import compile_model

BATCH, BATCHES = 32, 12


def batch_of_prompts(vlm: VLM, seed: int) -> list[Prompt]:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    prompts = []
    for _ in range(BATCH):
        text = rng.randint(10, 300) if rng.random() < 0.5 else rng.randint(50, 1500)
        visual = 0 if rng.random() < 0.1 else 576
        # about half of a dialogue is the answers
        prompts.append(prompt(vlm, visual, generator, text, max(4, text // 2)))
    return prompts


def make_batches(every: list[list[Prompt]], pad: Padding) -> list[Batch]:
    batches = []
    for prompts in every:
        images = sum(len(item.views) for item in prompts)
        features = torch.randn(images, 1, 576, 1024, device="cuda", dtype=torch.bfloat16)
        batches.append(collate(prompts, [Features(features, (24, 24))], pad=pad).to("cuda"))
    return batches


def main() -> None:
    run = make_run("135m", BATCH)
    vlm = make_model(run)
    compile_model(vlm, "on", torch.device("cuda"), 1, live=False)
    every = [batch_of_prompts(vlm, seed) for seed in range(BATCHES)]
    supervised = sum(item.supervised for prompts in every for item in prompts) / BATCHES
    positions = sum(len(item) for prompts in every for item in prompts) / BATCHES
    figures: dict[str, dict[str, float]] = {}
    pads: tuple[Padding, ...] = ("right", "packed")
    for pad in pads:
        batches = make_batches(every, pad)
        found = rate(our_step(vlm, run, itertools.cycle(batches).__next__), BATCH, warm=2 * BATCHES, least=8)
        figures["packed" if pad == "packed" else "padded"] = found | {
            "supervised_tokens_per_second": supervised / found["step_ms"] * 1000,
            "padding": 1 - positions / (sum(batch.ids_BT.numel() for batch in batches) / BATCHES),
        }
        del batches
        free()
        compile_model(vlm, "on", torch.device("cuda"), 1, live=False)
    ratio = figures["packed"]["supervised_tokens_per_second"] / figures["padded"]["supervised_tokens_per_second"]
    write_result(
        "packing",
        figures=figures,
        ratio=ratio,
        asked="packed at least 1.5 of padded training's supervised tokens/s",
        met=ratio >= 1.5,
    )


if __name__ == "__main__":
    main()
