"""Stage 1 with CLIP-L/14-336, an MLP and Mistral-7B on one GPU, beside transformers' LLaVA.

Both train on the same shapes, with images encoded in every step: batch 16, 576 + 64 positions, 48 supervised. Ours is
what a run does on a GPU: blocks compiled, logits at supervised positions alone.

    python benchmarks/stage1_mistral7b.py
    python benchmarks/stage1_mistral7b.py --tiny    anywhere, small models; prints only
"""

from __future__ import annotations

import torch
from common import write_result
from speed import (
    ANSWER,
    DEVICE,
    TEXT,
    Scale,
    asked_scale,
    free,
    make_model,
    make_peer,
    make_run,
    matrix_rate,
    our_step,
    peer_step,
    prompt,
    rate,
    some_features,
    some_pixels,
)

from chiasm.batch import collate
from chiasm.config import RunConfig
from chiasm.cost import SampleSize
from chiasm.plan import plan_run
from chiasm_experiments.training.compiling import compile_model


def measure_ours(run: RunConfig, batch: int, scale: Scale) -> tuple[dict[str, float], dict[str, float]]:
    """With images encoded in every step, and with their features given."""
    vlm = make_model(run)
    compile_model(vlm, "off" if scale.tiny else "on", DEVICE, live=True)
    generator = torch.Generator().manual_seed(0)
    prompts = [prompt(vlm, scale.visual, generator) for _ in range(batch)]
    live, known = (
        collate(prompts, [vision]).to(DEVICE) for vision in (some_pixels(batch, scale), some_features(batch, scale))
    )
    return (
        rate(our_step(vlm, run, lambda: live), batch, warm=5, least=8 * scale.seconds),
        rate(our_step(vlm, run, lambda: known), batch, least=6 * scale.seconds),
    )


def main(scale: Scale) -> None:
    batch, size = (2, 64) if scale.tiny else (16, 8192)
    chip = matrix_rate(size)
    run = make_run("mistral-7b", batch, scale)
    cost = plan_run(run, SampleSize(TEXT, ANSWER)).cost
    assert cost is not None
    ours, with_features = measure_ours(run, batch, scale)
    free()
    peer = rate(peer_step(make_peer("mistral-7b", scale), batch, scale), batch, least=8 * scale.seconds)
    again = matrix_rate(size)
    flops = cost.stages["pretrain"].flops
    # of the better measurement of the chip, so that a slow moment of it does not flatter ours
    utilisation = flops * ours["samples_per_second"] / max(chip, again)
    ratio = ours["samples_per_second"] / peer["samples_per_second"]
    memory = 0.0 if scale.tiny else ours["peak_gib"] / peer["peak_gib"]
    write_result(
        "stage1_mistral7b",
        figures={
            "ours": ours,
            "ours with features given": with_features,
            "peer": peer,
            "flops_per_sample": flops,
            "matrix_rate": [chip, again],
            "utilisation": utilisation,
            "memory_ratio": memory,
        },
        ratio=ratio,
        asked="1.25 of the peer's samples/s (aim 1.35), utilisation 0.70 of the measured rate, 0.75 of its memory",
        met=ratio >= 1.25 and utilisation >= 0.70 and memory <= 0.75,
        write=not scale.tiny,
    )


if __name__ == "__main__":
    main(asked_scale(__doc__))
