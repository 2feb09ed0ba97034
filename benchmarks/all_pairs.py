"""Every encoder set x fusion x adapter x image encoding x language model, tiny: refused by the plan, or it learns.

A combination that the plan takes is trained for two steps on the same samples, must have a falling loss, and answers
questions. None may fail later than the plan.

The product is that of components: what can be chosen by name on each axis, and the sets of encoders that some fusions
need. What a component does otherwise under an option of its own is a level more, and every pair of any two levels of
different axes is tried too; there the plan tells the cost as well.

    python benchmarks/all_pairs.py    the whole product and the pairs; killed, it goes on where it was
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import multiprocessing
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from chiasm.build import build_vlm, load_component
from chiasm.config import ComponentRef, RunConfig
from chiasm.cost import SampleSize
from chiasm.plan import plan_run
from chiasm.registry import registry

AXES = ("encoders", "fusion", "adapter", "image", "llm")
Levels = dict[str, dict[str, Any]]
"""What can be chosen on each axis, by name."""
IMAGES: dict[str, dict[str, Any]] = {
    "whole, padded": {"image": {"resize": "pad"}},
    "whole, cropped": {"image": {"resize": "crop"}},
    "whole, squashed": {"image": {"resize": "squash"}},
    "tiles": {"image": {"views": "tiles", "max_tiles": 4}},
    "tiles pooled and separated": {
        "image": {"views": "tiles", "grids": [[1, 2], [2, 2]], "pool": 2, "resize": "crop"},
        "tokens": {"views": ["SEP"]},
    },
}
SKILLS = ["colour"]
LEARNING = ("fusion", "adapter", "tokens", "llm")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one combination."""

    names: tuple[str, ...]
    status: str
    """`trained`, `refused`, or `failed`: the plan took it and it did not work."""
    reason: str = ""
    first_loss: float = math.nan
    last_loss: float = math.nan


def components() -> Levels:
    """What is chosen by name: every installed component, and the sets of encoders that some fusions need."""
    encoders = {name: [tiny] for name, tiny in installed("encoder")}
    clip, siglip, dinov2 = (encoders[name][0] for name in ("clip", "siglip", "dinov2"))
    finer = clip | {"shape": clip["shape"] | {"image_size": 24}}
    sets = {
        "timm, convolutional": [{"name": "timm", "model": "test_resnet", "image_size": 64, "layers": 3}],
        "clip, all layers": [clip | {"layers": "all"}],
        "clip + dinov2": [clip, dinov2],
        "clip + a finer clip": [clip, finer],
        "clip + efficientnet": [clip, encoders["efficientnet-lite0"][0]],
        "clip, two layers + blind + siglip": [clip | {"layers": [-2, -1]}, encoders["blind"][0], siglip],
    }
    small = {
        # as large as the encoders here
        "project_attention": {"name": "project_attention", "rows": 6},
        "sva": {"name": "sva", "grid": [2, 2], "depth": 1, "width": 8, "heads": 2},
    }
    llms = {name: shallow(tiny_of("llm", name)) for name in ("causal", "mistral", "smollm2-135m")}
    return {
        "encoders": encoders | sets,
        "fusion": {name: {"name": name} for name, _ in installed("fusion")} | small,
        "adapter": dict(installed("adapter")),
        "image": IMAGES,
        "llm": {name: {"llm": llm} for name, llm in llms.items()},
    }


def options(parts: Levels) -> Levels:
    """What the components of each axis do otherwise under an option of theirs."""
    (dinov2,), adapters, llms = parts["encoders"]["dinov2"], parts["adapter"], parts["llm"]
    causal, smollm2 = llms["causal"]["llm"], llms["smollm2-135m"]["llm"]
    return {
        "encoders": {"dinov2 with registers": [dinov2 | {"shape": dinov2["shape"] | {"registers": 2}}]},
        "fusion": {
            "additive, learned": {"name": "additive", "learned": True},
            "concat_channels, resampled": {"name": "concat_channels", "align": "interpolate"},
            "project_attention, features ask": {"name": "project_attention", "query": "features", "rows": 6},
            "project_sum, resampled, no scalars": {
                "name": "project_sum", "align": "interpolate", "layer_scalars": False,
            },
        },
        "adapter": {
            "avg_pool of blocks": {"name": "avg_pool"},
            "resampler, no positions": adapters["resampler"] | {"positions": "none"},
            "transformer, norm first": adapters["transformer"] | {"norm": "pre"},
        },
        "image": {
            "whole, native": {"image": {"resize": "native"}},
            "tiles alone": {"image": {"views": "tiles", "grids": [[2, 1]], "whole": False, "resize": "squash"}},
        },
        "llm": {
            "causal with LoRA": {"llm": causal | {"lora": {"rank": 4}}},
            # faster, or an adapter's dropout changes the loss more than two steps do
            "causal, frozen": {"llm": causal, "stage": {"train": ["fusion", "adapter", "tokens"], "lr": 1e-2}},
            "smollm2-135m, its own turns": {"llm": smollm2, "tokens": {"image": [], "turns": "template"}},
        },
    }  # fmt: skip


def levels() -> Levels:
    """Components, and after them what they do otherwise."""
    parts = components()
    more = options(parts)
    return {axis: parts[axis] | more[axis] for axis in AXES}


def shallow(llm: dict[str, Any]) -> dict[str, Any]:
    """A tiny language model of one block."""
    return llm | {"shape": llm["shape"] | {"depth": 1}}


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
    """One combination as a run of two steps, each on the same two samples."""
    data = {"name": "world", "task": "dialogues", "size": 2, "skills": SKILLS, "image_size": 96}
    stage = {
        "name": "s", "data": data, "train": LEARNING, "lr": 1e-3, "batch_size": 2, "steps": 2, "schedule": "constant",
        "warmup": 0, **choice["llm"].get("stage", {}),
    }  # fmt: skip
    vision = {name: choice[name] for name in ("encoders", "fusion", "adapter")} | {"image": choice["image"]["image"]}
    tokens = choice["image"].get("tokens", {}) | choice["llm"].get("tokens", {})
    evaluate = {"name": "world", "size": 2, "skills": SKILLS, "image_size": 96}
    values = {"vision": vision, "llm": choice["llm"]["llm"], "tokens": tokens, "stages": [stage], "system": ""}
    return RunConfig.model_validate(values | {"evaluate": evaluate})


def load(kind: str, ref: ComponentRef, stream: str) -> Any:
    """A part as `build_vlm` wants it: each is drawn once, and what learns is a copy of it."""
    key = f"{kind} {stream} {ref.model_dump_json()}"
    if key not in _PARTS:
        _PARTS[key] = load_component(kind, ref, stream)
    return _PARTS[key] if kind == "encoder" else copy.deepcopy(_PARTS[key])


_PARTS: dict[str, Any] = {}


def attempt(names: Sequence[str], every: Levels, cost: bool = False) -> Outcome:
    """Plans one combination, its cost too where that is asked for, and trains and evaluates it if the plan takes it."""
    from chiasm_experiments.data.mixture import load_mixture
    from chiasm_experiments.evaluation import evaluate, load_benchmarks
    from chiasm_experiments.training.run import make_feed
    from chiasm_experiments.training.stage import train_stage
    from chiasm_experiments.training.workers import Workers

    names = tuple(names)
    try:
        run = make_run({axis: every[axis][name] for axis, name in zip(AXES, names, strict=True)})
        plan = plan_run(run, SampleSize() if cost else None)
        if not plan.valid:
            return Outcome(names, "refused", "; ".join(plan.problems))
        alone = Workers(0, 1, torch.device("cpu"))
        vlm = build_vlm(run, load)
        feed = make_feed(vlm, run)
        losses: list[float] = []
        mixture = load_mixture(run.stages[0].data)
        train_stage(vlm, run, 0, mixture, feed, alone, lambda step, steps, metrics: losses.append(metrics["loss"]))
        benchmarks = load_benchmarks(run.evaluate)
        for benchmark in benchmarks.values():
            benchmark.max_new_tokens = 3  # random weights have nothing to say
        rows = evaluate(vlm, run, feed, benchmarks, alone)
        found = {count.part: count.trained for count in vlm.counts()}
        planned = {part: plan.trained.get(part, 0) for part in found}
        counted = found == planned
        if losses[1] < losses[0] and len(rows) == 2 and counted and (plan.cost is not None) == cost:
            return Outcome(names, "trained", "", *losses)
        reason = f"loss {losses}, {len(rows)} answers, trained {found}, planned {planned}, cost {plan.cost}"
        return Outcome(names, "failed", reason, *losses)
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


def product() -> list[tuple[str, ...]]:
    """The names of each combination of components."""
    parts = components()
    return list(itertools.product(*[parts[axis] for axis in AXES]))


def pairs() -> list[tuple[str, ...]]:
    """The names of combinations that hold every pair of levels, options among them."""
    names = [list(axis) for axis in levels().values()]
    rows = pairwise([len(axis) for axis in names])
    return [tuple(axis[level] for axis, level in zip(names, row, strict=True)) for row in rows]


def _worker(task: tuple[tuple[str, ...], bool]) -> Outcome:
    return attempt(task[0], _LEVELS, cost=task[1])


_LEVELS: Levels = {}


def _start() -> None:
    torch.set_num_threads(1)
    _LEVELS.update(levels())


class Journal:
    """The outcomes so far, a line each as they come; one of other levels is begun anew.

    Args:
        path: of the file.
        every: the levels.
    """

    def __init__(self, path: Path, every: Levels) -> None:
        self.path = path
        self.outcomes: dict[tuple[str, ...], Outcome] = {}
        head = json.dumps(every, sort_keys=True)
        lines = path.read_text().splitlines() if path.exists() else []
        whole = [json.loads(line) for line in lines[1:] if line.endswith("}")] if lines[:1] == [head] else []
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([head, *map(json.dumps, whole)]) + "\n")  # the last one may have been cut off
        for item in whole:
            outcome = Outcome(tuple(item.pop("names")), **item)
            self.outcomes[outcome.names] = outcome

    def add(self, outcome: Outcome) -> None:
        self.outcomes[outcome.names] = outcome
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")

    def count(self, names: Iterable[tuple[str, ...]]) -> dict[str, int]:
        """How many of some combinations there are, and what became of them."""
        names = list(names)
        found = Counter(self.outcomes[item].status for item in names if item in self.outcomes)
        statuses = {status: found[status] for status in ("trained", "refused", "failed")}
        return {"combinations": len(names), "tried": found.total(), **statuses}


def main() -> None:
    from common import ROOT, write_result

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=1, help="combinations at once")
    parser.add_argument("--seconds", type=float, help="stop after so long and record how many were tried")
    parser.add_argument("--journal", type=Path, default=ROOT / "runs" / "all_pairs.jsonl", help="what is done so far")
    arguments = parser.parse_args()
    started = time.monotonic()
    every = levels()
    paired, whole = pairs(), product()
    journal = Journal(arguments.journal, every)
    random.Random(0).shuffle(whole)  # so that a part of the product is a fair sample of it
    names = dict.fromkeys(paired, True) | {item: item in paired for item in whole}
    tasks = [(item, cost) for item, cost in names.items() if item not in journal.outcomes]
    with (
        multiprocessing.get_context("spawn").Pool(arguments.processes, _start) as pool,
        tqdm(total=len(names), initial=len(names) - len(tasks), mininterval=30, unit="combination") as bar,
    ):
        for outcome in pool.imap_unordered(_worker, tasks, chunksize=8):
            journal.add(outcome)
            bar.update()
            if arguments.seconds is not None and time.monotonic() - started > arguments.seconds:
                break
    outcomes = [journal.outcomes[item] for item in names if item in journal.outcomes]
    refused = Counter(item.reason.partition(";")[0][:200] for item in outcomes if item.status == "refused")
    failed = [{"names": item.names, "reason": item.reason} for item in outcomes if item.status == "failed"]
    more = options(components())
    write_result(
        "all_pairs",
        figures={
            "product": journal.count(whole),
            "pairs": journal.count(paired),
            "seconds_of_this_start": round(time.monotonic() - started),
            "tried_in_this_start": len(tasks) - sum(task[0] not in journal.outcomes for task in tasks),
            "components": {axis: [name for name in every[axis] if name not in more[axis]] for axis in AXES},
            "options": {axis: list(more[axis]) for axis in AXES},
            "reasons_of_the_most_refused": dict(refused.most_common(20)),
            "failed_combinations": failed[:50],
        },
        asked="every combination is refused by the plan with a reason, or trained for two steps with a falling loss "
        "and evaluated; none fails later than the plan: the whole product of components, and every pair of levels "
        "with their options",
        met=not failed and len(outcomes) == len(names),
    )
    print(json.dumps(failed[:10], indent=1))


if __name__ == "__main__":
    main()
