"""The memory that `chiasm plan` estimates, beside what steps of training take on a GPU.

Random weights at real shapes; a step is what a run does, fused AdamW and bfloat16 included.

    python benchmarks/plan_estimates.py
"""

from __future__ import annotations

import gc
import time
from typing import Any

import torch
from common import write_result

from chiasm.build import build_vlm
from chiasm.config import RunConfig
from chiasm.cost import SampleSize
from chiasm.plan import plan_run
from chiasm_experiments.data.mixture import load_mixture
from chiasm_experiments.training.precision import place
from chiasm_experiments.training.run import make_feed
from chiasm_experiments.training.stage import train_stage
from chiasm_experiments.training.workers import Workers

CLIP = {"name": "clip", "layers": -2}
DINO = {"name": "dinov2", "shape": {"image_size": 336}, "layers": -2}
SMOL = {
    "name": "causal",
    "tokenizer": "bytes",
    "shape": {"width": 576, "depth": 30, "heads": 9, "kv_heads": 3, "mlp_width": 1536, "vocabulary": 49152},
}
MISTRAL = {"name": "mistral", "tokenizer": "bytes", "shape": {"depth": 6}}
ALL = ["fusion", "adapter", "tokens", "llm"]
CASES: dict[str, dict[str, Any]] = {
    "135M frozen, batch 32": {"llm": SMOL, "train": ALL[:3], "batch": 32},
    "135M in full, batch 32": {"llm": SMOL, "train": ALL, "batch": 32},
    "135M LoRA, batch 16": {"llm": SMOL | {"lora": {"rank": 16}}, "train": ALL, "batch": 16},
    "6 blocks of Mistral-7B frozen, batch 16": {"llm": MISTRAL, "train": ALL[:3], "batch": 16},
    "6 blocks of Mistral-7B in full, batch 8": {"llm": MISTRAL, "train": ALL, "batch": 8},
    "6 blocks of Mistral-7B LoRA, batch 8": {"llm": MISTRAL | {"lora": {"rank": 64}}, "train": ALL, "batch": 8},
    "135M frozen, CLIP + DINOv2 by project_sum, batch 16": {
        "llm": SMOL,
        "train": ALL[:3],
        "batch": 16,
        "vision": {
            "encoders": [CLIP | {"layers": "all"}, DINO | {"layers": "all"}],
            "fusion": "project_sum",
            "adapter": "linear",
        },
    },
    "135M frozen, tiles, batch 8": {
        "llm": SMOL,
        "train": ALL[:3],
        "batch": 8,
        "vision": {"encoders": [CLIP], "image": {"views": "tiles", "grids": [[2, 2]], "pool": 2}},
    },
}


def make_run(llm: dict[str, Any], train: list[str], batch: int, vision: dict[str, Any] | None = None) -> RunConfig:
    data = {"name": "world", "task": "captions", "size": 64, "skills": ["colour"], "image_size": 336}
    stage = {"name": "s", "data": data, "train": train, "lr": 1e-4, "batch_size": batch, "steps": 3}
    return RunConfig.model_validate(
        {"vision": {"encoders": [CLIP], "adapter": "mlp"} | (vision or {}), "llm": llm, "stages": [stage], "system": ""}
    )


def measure(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    run = make_run(**case)
    vlm = build_vlm(run)
    place(vlm, run, device)
    feed = make_feed(vlm, run)
    mixture = load_mixture(run.stages[0].data)
    examples = [feed.train(mixture[i]) for i in range(len(mixture))]
    longest = max(len(example.prompt) for example in examples)
    answer = max(example.prompt.supervised for example in examples)
    visual = vlm.views.most_tokens
    sample = SampleSize(longest - visual - len(run.tokens.views) * (vlm.views.counts[1] - 1), answer)
    started = time.monotonic()
    cost = plan_run(run, sample).cost
    assert cost is not None
    planning = time.monotonic() - started
    torch.cuda.reset_peak_memory_stats()
    train_stage(vlm, run, 0, mixture, feed, Workers(0, 1, device), lambda *_: None)
    peak = torch.cuda.max_memory_allocated()
    stage = cost.stages["s"]
    return {
        "positions": cost.positions,
        "planning_s": planning,
        "estimated_gib": (stage.gpu_bytes or 0) / 2**30,
        "measured_gib": peak / 2**30,
        "memory_ratio": (stage.gpu_bytes or 0) / peak,
    }


def main() -> None:
    device = torch.device("cuda")
    figures = {}
    for name, case in CASES.items():
        figures[name] = measure(case, device)
        print(name, {key: round(value, 3) for key, value in figures[name].items()}, flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    worst = max((item["memory_ratio"] for item in figures.values()), key=lambda ratio: abs(ratio - 1))
    write_result(
        "plan_estimates",
        figures=figures,
        ratio=worst,
        asked="estimated memory within 15 % of the measured peak",
        met=abs(worst - 1) <= 0.15,
    )


if __name__ == "__main__":
    main()
