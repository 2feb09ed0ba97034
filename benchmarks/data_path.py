"""What the data path alone gives, beside what the fastest training step takes: JPEGs of 640 x 480 on the disk.

Live: decoded, preprocessed for CLIP-L/14-336, prompts written, collated and sent to the GPU, by different numbers of
loader processes. Stored: the features of the same images, [1, 576, 1024] in bfloat16, read from the store instead. A
rate counts everything from the start of the processes to the last batch. Without a GPU batches stay on the CPU, and
what the GPU would compute, bytes to normalised pixels, is left out.

    python benchmarks/data_path.py            after stage1_135m.py on the same machine, whose results it reads
    python benchmarks/data_path.py --tiny     anywhere, few images; prints only
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write_result
from speed import captions

from chiasm.batch import collate
from chiasm.build import build_vlm
from chiasm.config import RunConfig
from chiasm.vlm import VLM
from chiasm_experiments.data.feed import Example, Feed
from chiasm_experiments.data.joining import join
from chiasm_experiments.data.loader import load_steps
from chiasm_experiments.data.mixture import Mixture, load_mixture
from chiasm_experiments.data.store import FeatureStore
from chiasm_experiments.training.precision import place
from chiasm_experiments.training.run import make_feed

BATCH = 64
BAR = 1.2
ASKED = f"live and stored each at least {BAR} times the samples/s that training takes of it"
# of CLIP-L/14-336 what data see: its pixels and the shape of its features; one block, since none is computed
CLIP = {"image_size": 336, "patch_size": 14, "width": 1024, "depth": 1, "heads": 16, "mlp_width": 16}
LLM = {"width": 64, "depth": 1, "heads": 2, "kv_heads": 1, "mlp_width": 64, "context_length": 2048}


def make_run(data: dict[str, Any]) -> RunConfig:
    stage = {"name": "s", "data": data, "train": ["adapter"], "lr": 1e-3, "batch_size": BATCH}
    return RunConfig.model_validate(
        {
            "vision": {"encoders": [{"name": "clip", "shape": CLIP}], "adapter": "mlp"},
            "llm": {"name": "causal", "shape": LLM, "tokenizer": "bytes"},
            "stages": [stage],
            "precision": "bfloat16",
        }
    )


def to_device(feed: Feed, examples: Sequence[Example], device: torch.device) -> None:
    if device.type == "cuda" or feed.features:
        feed.batch(examples, device)
    else:
        pixels = [views for example in examples for views in example.pixels[0]]
        collate([example.prompt for example in examples], [join(pixels, device)])


def rate(feed: Feed, samples: Mixture, device: torch.device, processes: int, count: int) -> float:
    """Samples a second, from before the processes start until the last batch is on the device."""
    steps = [[place % len(samples) for place in range(first, first + BATCH)] for first in range(0, count, BATCH)]
    started = time.perf_counter()
    for examples in load_steps(steps, samples, feed, device, processes):
        to_device(feed, examples, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return count / (time.perf_counter() - started)


def fill(feed: Feed, samples: Mixture) -> None:
    """Stores features of every image, as a first epoch would have."""
    (features,) = feed.features
    assert features.shelf is not None
    some_VLND = torch.randn(1, 1, 576, 1024).to(features.shelf.dtype)
    for place_ in range(len(samples)):
        (image,) = samples[place_].images
        features.shelf.put(image.key, some_VLND)


def measure(vlm: VLM, run: RunConfig, device: torch.device, counts: Sequence[int], least: int, each: int) -> Any:
    samples = load_mixture(run.stages[0].data)
    live: dict[str, float] = {}
    stored: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        feed = make_feed(vlm, run)
        known = make_feed(vlm, run, None, FeatureStore(Path(folder), 2**36))
        fill(known, samples)
        for processes in counts:
            count = max(least, each * processes) // BATCH * BATCH
            live[str(processes)] = rate(feed, samples, device, processes, count)
            stored[str(processes)] = rate(known, samples, device, processes, 2 * count)
            print(f"{processes} processes: live {live[str(processes)]:.0f}, stored {stored[str(processes)]:.0f}")
        known.close()
    return {"live": live, "stored": stored}


def consumers() -> dict[str, float]:
    """Samples a second that training takes, by its benchmark's result."""
    file = RESULTS / "stage1_135m.json"
    if not file.is_file():
        raise SystemExit(f"{file} is missing; run benchmarks/stage1_135m.py first, or give --tiny")
    figures = json.loads(file.read_text())["figures"]
    names = {"live": "without the cache", "stored": "with the cache"}
    return {ours: figures[theirs]["samples_per_second"] for ours, theirs in names.items()}


def main(tiny: bool) -> None:
    taken = {} if tiny else consumers()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cores = len(os.sched_getaffinity(0))
    counts = [0, 2] if tiny else [n for n in (1, 2, 4, 8, 12, 16, 24, 32) if n <= cores]
    with captions(64 if tiny else 512) as data:
        run = make_run(data)
        vlm = build_vlm(run)
        place(vlm, run, device)
        vlm.set_trained(run.stages[0].train)
        given = measure(vlm, run, device, counts, *((64, 64) if tiny else (384, 256)))
    if tiny:
        return
    best = {name: max(rates.values()) for name, rates in given.items()}
    ratios = {name: best[name] / taken[name] for name in best}
    write_result(
        "data_path",
        figures={"samples_per_second_by_processes": given, "training_takes": taken, "ratios": ratios, "cores": cores},
        ratio=min(ratios.values()),
        asked=ASKED,
        met=min(ratios.values()) >= BAR,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="few images; writes no result")
    main(parser.parse_args().tiny)
