"""Every encoder set x fusion x adapter x image encoding x language model, tiny: refused by the plan, or it learns.

A combination that the plan takes is trained for two steps on the same samples, must have a falling loss, and answers
questions. None may fail later than the plan.

    python benchmarks/all_pairs.py [--processes N] [--shard I/N]    the full product of what is installed
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from chiasm.build import build_vlm
from chiasm.config import RunConfig
from chiasm.plan import plan_run
from chiasm.registry import registry

AXES = ("encoders", "fusion", "adapter", "image", "llm")
IMAGES: dict[str, dict[str, Any]] = {
    "whole, padded": {"image": {"resize": "pad"}},
    "whole, native": {"image": {"resize": "native"}},
    "tiles": {"image": {"views": "tiles", "max_tiles": 4}},
    "tiles pooled and separated": {
        "image": {"views": "tiles", "grids": [[1, 2], [2, 2]], "pool": 2, "resize": "crop"},
        "tokens": {"views": ["SEP"]},
    },
    "tiles alone": {"image": {"views": "tiles", "grids": [[2, 1]], "whole": False, "resize": "squash"}},
}
SKILLS = ["colour"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one combination."""

    names: tuple[str, ...]
    status: str
    """`trained`, `refused`, or `failed`: the plan took it and it did not work."""
    reason: str = ""
    first_loss: float = math.nan
    last_loss: float = math.nan


def levels() -> dict[str, dict[str, Any]]:
    """The levels of each axis, by name, from the components that are installed."""
    encoders = {name: [tiny] for name, tiny in installed("encoder")}
    many = [encoders[name][0] for name in ("clip", "siglip", "dinov2")]
    sets = {
        "clip, all layers": [many[0] | {"layers": "all"}],
        "clip + dinov2": [many[0], many[2]],
        "clip + efficientnet": [many[0], encoders["efficientnet-lite0"][0]],
        "clip, two layers + blind + siglip": [many[0] | {"layers": [-2, -1]}, encoders["blind"][0], many[1]],
    }
    llms = {name: tiny_of("llm", name) for name in ("causal", "mistral", "smollm2-135m")}
    llms["causal with LoRA"] = llms["causal"] | {"lora": {"rank": 4}}
    return {
        "encoders": encoders | sets,
        "fusion": {name: {"name": name} for name, _ in installed("fusion")},
        "adapter": dict(installed("adapter")),
        "image": IMAGES,
        "llm": llms,
    }


def installed(kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each component of a kind with its tiny configuration; one that only presets another is left out."""
    items = [item for item in registry().all() if item.component.kind == kind]
    classes = {item.component.name: registry().load(kind, item.component.name) for item in items}
    for name, cls in classes.items():
        if not any(other is not cls and issubclass(cls, other) for other in classes.values()):
            yield name, tiny_of(kind, name)


def tiny_of(kind: str, name: str) -> dict[str, Any]:
    """The configuration of a component's tiny instance."""
    config = registry().load(kind, name).tiny().config
    return {"name": name, **config.model_dump(mode="json", exclude_unset=True)}


def make_run(choice: dict[str, Any]) -> RunConfig:
    """One combination as a run of two steps, each on the same four samples."""
    data = {"name": "world", "task": "dialogues", "size": 4, "skills": SKILLS, "image_size": 96}
    stage = {
        "name": "s", "data": data, "train": ["fusion", "adapter", "tokens", "llm"], "lr": 1e-3, "batch_size": 4,
        "steps": 2, "schedule": "constant", "warmup": 0,
    }  # fmt: skip
    vision = {name: choice[name] for name in ("encoders", "fusion", "adapter")} | {"image": choice["image"]["image"]}
    tokens = choice["image"].get("tokens", {})
    evaluate = {"name": "world", "size": 2, "skills": SKILLS, "image_size": 96}
    values = {"vision": vision, "llm": choice["llm"], "tokens": tokens, "stages": [stage], "system": ""}
    return RunConfig.model_validate(values | {"evaluate": evaluate})


def attempt(names: Sequence[str], choice: dict[str, Any]) -> Outcome:
    """Plans one combination and, where the plan takes it, trains and evaluates it."""
    from chiasm_experiments.data.mixture import load_mixture
    from chiasm_experiments.evaluation import evaluate, load_benchmarks
    from chiasm_experiments.training.run import make_feed
    from chiasm_experiments.training.stage import train_stage
    from chiasm_experiments.training.workers import Workers

    names = tuple(names)
    try:
        run = make_run(choice)
        plan = plan_run(run)
        if not plan.valid:
            return Outcome(names, "refused", "; ".join(plan.problems))
        alone = Workers(0, 1, torch.device("cpu"))
        vlm = build_vlm(run)
        feed = make_feed(vlm, run)
        losses: list[float] = []
        mixture = load_mixture(run.stages[0].data)
        train_stage(vlm, run, 0, mixture, feed, alone, lambda step, steps, metrics: losses.append(metrics["loss"]))
        rows = evaluate(vlm, run, feed, load_benchmarks(run.evaluate), alone)
        found = {count.part: count.trained for count in vlm.counts()}
        planned = {part: plan.trained.get(part, 0) for part in found}
        counted = found == planned
        status = "trained" if losses[1] < losses[0] and len(rows) == 2 and counted else "failed"
        reason = (
            "" if status == "trained" else f"loss {losses}, {len(rows)} answers, trained {found}, planned {planned}"
        )
        return Outcome(names, status, reason, losses[0], losses[1])
    except Exception as error:
        return Outcome(names, "failed", f"{type(error).__name__}: {error}")


def pairwise(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Rows of levels that hold every pair of levels of every two axes at least once; greedy, always the same.

    Each row starts from a pair that is still missing and fills its other axes with the levels that cover most.
    """
    missing = {
        ((a, i), (b, k))
        for a, b in itertools.combinations(range(len(sizes)), 2)
        for i in range(sizes[a])
        for k in range(sizes[b])
    }
    rows = []
    while missing:
        row = dict(min(missing))
        for axis in range(len(sizes)):
            if axis not in row:
                row[axis] = max(
                    range(sizes[axis]),
                    key=lambda level, axis=axis, row=row: (
                        sum(tuple(sorted([(axis, level), item])) in missing for item in row.items()),
                        # levels take turns where they cover as much
                        -((level - len(rows)) % sizes[axis]),
                    ),
                )
        rows.append(tuple(row[axis] for axis in range(len(sizes))))
        missing -= set(itertools.combinations(sorted(row.items()), 2))
    return rows


def combinations(every: dict[str, dict[str, Any]], pairs: bool) -> list[tuple[str, ...]]:
    """The names of each combination: all of them, or enough to hold every pair."""
    names = [list(every[axis]) for axis in AXES]
    if not pairs:
        return list(itertools.product(*names))
    return [
        tuple(names[axis][level] for axis, level in enumerate(row)) for row in pairwise([len(axis) for axis in names])
    ]


def _worker(names: tuple[str, ...]) -> Outcome:
    return attempt(names, {axis: _LEVELS[axis][name] for axis, name in zip(AXES, names, strict=True)})


_LEVELS: dict[str, dict[str, Any]] = {}


def _start() -> None:
    torch.set_num_threads(1)
    _LEVELS.update(levels())


def main() -> None:
    from common import write_result

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--limit", type=int, help="only so many combinations, evenly over the product")
    parser.add_argument("--seconds", type=float, help="stop after so long and record how many were tried")
    options = parser.parse_args()
    started = time.monotonic()
    every = levels()
    names = combinations(every, pairs=False)
    # a stride that shares no factor with the product walks evenly through it, so that a part of it is fair
    stride = next(step for step in range(int(len(names) * 0.618), len(names)) if math.gcd(step, len(names)) == 1)
    order = [names[i * stride % len(names)] for i in range(options.limit or len(names))]
    outcomes = []
    with multiprocessing.get_context("spawn").Pool(options.processes, _start) as pool:
        for outcome in pool.imap_unordered(_worker, order, chunksize=8):
            outcomes.append(outcome)
            if len(outcomes) % 500 == 0:
                print(
                    len(outcomes),
                    Counter(item.status for item in outcomes),
                    round(time.monotonic() - started),
                    flush=True,
                )
            if options.seconds and time.monotonic() - started > options.seconds:
                break
    counts = Counter(item.status for item in outcomes)
    reasons = Counter(item.reason.partition(";")[0][:200] for item in outcomes if item.status == "refused")
    failed = [{"names": item.names, "reason": item.reason} for item in outcomes if item.status == "failed"]
    write_result(
        "all_pairs",
        figures={
            "product": len(names),
            "tried": len(outcomes),
            **{status: counts[status] for status in ("trained", "refused", "failed")},
            "levels": {axis: list(every[axis]) for axis in AXES},
            "reasons_of_the_most_refused": dict(reasons.most_common(20)),
            "failed_combinations": failed[:50],
            "seconds": time.monotonic() - started,
        },
        asked="every combination is refused by the plan with a reason, or trained for two steps with a falling loss "
        "and evaluated; none fails later than the plan",
        met=not failed and len(outcomes) == len(names),
    )
    print(json.dumps(failed[:10], indent=1))


if __name__ == "__main__":
    main()
