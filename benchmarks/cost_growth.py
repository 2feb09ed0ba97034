"""How the cost of a sample grows with its length, its images and the number of encoders; stage 1, 135M, compiled.

Each point is a training step on a batch that lies on the GPU. The line beside the points is what the operations of the
same step would take at the rate of the series' first point: points below it say that the chip is used better as the
work grows, points above it that something grows which is no work.

    python benchmarks/cost_growth.py
    python benchmarks/cost_growth.py --tiny    anywhere, small models; prints only
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write_result
from speed import (
    ANSWER,
    DEVICE,
    TEXT,
    Scale,
    asked_scale,
    free,
    make_model,
    make_run,
    our_step,
    prompt,
    rate,
    some_features,
    some_pixels,
)

from chiasm.batch import collate
from chiasm.config import RunConfig
from chiasm.cost import connector_cost, train_flops
from chiasm.vlm import VLM
from chiasm_experiments.training.compiling import compile_model

WITHIN = 1.25
"""A point may take so much of what its operations foretell."""
ENCODERS = ("clip", "dinov2", "siglip")
Point = dict[str, float]


def model(run: RunConfig, scale: Scale) -> VLM:
    vlm = make_model(run)
    compile_model(vlm, "off" if scale.tiny else "on", DEVICE, live=True)
    return vlm


def measure(
    vlm: VLM, run: RunConfig, scale: Scale, batch: int, *, text: int = TEXT, images: int = 1, live: bool = True
) -> Point:
    """Milliseconds of one sample, and its operations."""
    generator = torch.Generator().manual_seed(0)
    prompts = [prompt(vlm, scale.visual, generator, text, ANSWER, images) for _ in range(batch)]
    make = some_pixels if live else some_features
    given = collate(prompts, [make(batch * images, scale) for _ in vlm.encoders]).to(DEVICE)
    found = rate(our_step(vlm, run, lambda: given), batch, warm=4, least=2.5 * scale.seconds)
    encoders: list[Any] = list(vlm.encoders)
    encode = images * sum(encoder.geometry.flops for encoder in encoders) * live
    features = [encoder.geometry.features for encoder in encoders]
    connect = images * connector_cost(run, features, vlm.llm.geometry.width).flops
    positions = len(prompts[0])
    flops = train_flops(run.stages[0], vlm.llm.geometry, positions, ANSWER, encode, connect)
    return {
        "sample_ms": found["step_ms"] / batch,
        "samples_per_second": found["samples_per_second"],
        "positions": positions,
        "flops": float(flops),
    }


def series(scale: Scale) -> dict[str, dict[str, Point]]:
    """The points of each series by what grows."""
    batch = 2 if scale.tiny else 64  # of fewer samples the host would be the limit, not the GPU
    run = make_run("135m", batch, scale)
    vlm = model(run, scale)
    lengths = [64, 96] if scale.tiny else [64, 192, 448, 960, 1472]
    found = {
        "positions": {
            str(text + scale.visual): measure(vlm, run, scale, batch, text=text, live=False) for text in lengths
        },
        "images": {
            str(images): measure(vlm, run, scale, batch, images=images)
            for images in ((1, 2) if scale.tiny else (1, 2, 3))
        },
        "encoders": {},
    }
    found["encoders"]["1"] = found["images"]["1"]
    del vlm
    for count in (2, 3):
        free()
        run = make_run("135m", batch, scale, ENCODERS[:count], fusion="concat_channels")
        found["encoders"][str(count)] = measure(model(run, scale), run, scale, batch)
    return found


def expected(points: dict[str, Point]) -> list[float]:
    """Milliseconds of each point, if the chip did operations as fast as at the first one."""
    first, *_ = points.values()
    return [first["sample_ms"] * point["flops"] / first["flops"] for point in points.values()]


def draw(found: dict[str, dict[str, Point]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    titles = {"positions": "positions, features given", "images": "images of a sample", "encoders": "encoders"}
    figure, axes = plt.subplots(1, len(found), figsize=(12, 3.6), constrained_layout=True)
    for axis, (name, points) in zip(axes, found.items(), strict=True):
        x = [int(value) for value in points]
        axis.plot(x, expected(points), "--", color="0.6", label="by operations, from the first point")
        axis.plot(x, [point["sample_ms"] for point in points.values()], "o-", label="measured")
        axis.set(title=titles[name], xlabel=name, ylabel="ms of a sample", ylim=(0, None))
        if len(x) <= 3:
            axis.set_xticks(x)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def ratios(found: dict[str, dict[str, Point]]) -> dict[str, Sequence[float]]:
    """What each point takes to what its operations foretell."""
    return {
        name: [point["sample_ms"] / wanted for point, wanted in zip(points.values(), expected(points), strict=True)]
        for name, points in found.items()
    }


def main(scale: Scale) -> None:
    found = series(scale)
    measured = ratios(found)
    worst = max(max(values) for values in measured.values())
    explained = {
        name: f"from {first} to {last} {name} a sample takes "
        f"{points[last]['sample_ms'] / points[first]['sample_ms']:.2f} times as long and needs "
        f"{points[last]['flops'] / points[first]['flops']:.2f} times the operations"
        for name, points in found.items()
        for first, last in [(next(iter(points)), list(points)[-1])]
    }
    with tempfile.TemporaryDirectory() as folder:
        draw(found, Path(folder) / "cost_growth.png" if scale.tiny else RESULTS / "cost_growth.png")
    write_result(
        "cost_growth",
        figures={"series": found, "measured_to_foretold": measured, "explained": explained},
        ratio=worst,
        asked=f"no point takes more than {WITHIN} of what its operations foretell from its series' first point",
        met=worst <= WITHIN,
        write=not scale.tiny,
    )


if __name__ == "__main__":
    main(asked_scale(__doc__))
