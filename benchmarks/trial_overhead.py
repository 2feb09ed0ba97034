"""Seconds from a free slot to the first step of the next trial: on a warm pool, and where another backbone loads.

A pool of one slot runs trials one after the other: first with the same frozen parts, then with two kinds in turn, so
that each drops what the one before it held. Then `chiasm sweep` runs 100 trials that train for about a second on two
slots, Ray's start and the report among it. Beside it, what a shell loop pays: a fresh `chiasm train` for each trial.

All moments are the trials' own: when a run ended, and when the first step of the next one in its process ended.

    python benchmarks/trial_overhead.py [TRIALS]
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from common import write_result

REPEATS = 20
FRESH = 4
SECONDS = 1.0
"""That a trial of the sweep is to take."""
RUN: dict[str, Any] = {
    "vision": {"encoders": [{"name": "clip", "shape": {"image_size": 32, "patch_size": 8, "width": 64, "depth": 2,
               "heads": 4, "mlp_width": 128}}], "image": {"resize": "squash"}, "adapter": "mlp"},
    "llm": {"name": "causal", "tokenizer": "bytes", "shape": {"width": 128, "depth": 2, "heads": 4, "kv_heads": 4,
            "mlp_width": 256, "context_length": 256}},
    "stages": [{"name": "train", "data": {"name": "world", "task": "dialogues", "size": 64, "skills": ["colour"]},
                "train": ["fusion", "adapter", "tokens"], "lr": 1e-3, "batch_size": 4, "steps": 5}],
    "evaluate": {"name": "world", "size": 8, "skills": ["colour"]},
}  # fmt: skip
RESOURCES: dict[str, Any] = {"cpus_per_worker": 1, "gpus_per_worker": 0}


def changed(lr: float, width: int = 128) -> dict[str, Any]:
    """The run with another learning rate and language model."""
    run = copy.deepcopy(RUN)
    run["stages"][0]["lr"] = lr
    run["llm"]["shape"]["width"] = width
    return run


def first_step(manifest: dict[str, Any]) -> float:
    """When a run's first step ended."""
    moment: float = manifest["started"] + manifest["first_step_seconds"]
    return moment


def end(manifest: dict[str, Any]) -> float:
    """When a run ended."""
    moment: float = manifest["started"] + manifest["seconds"]["total"]
    return moment


def gaps(manifests: list[dict[str, Any]]) -> list[float]:
    """From the end of each trial to the first step of the next one in the same process."""
    processes = defaultdict(list)
    for manifest in sorted(manifests, key=lambda manifest: manifest["started"]):
        processes[manifest["environment"]["process"]].append(manifest)
    return [first_step(after) - end(before) for each in processes.values() for before, after in pairwise(each)]


def in_turn(pool: Any, folder: Path, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The manifests of runs that a pool of one slot executes one after the other."""
    from chiasm.config import RunConfig
    from chiasm.plan import plan_run
    from chiasm_experiments.study.keys import make_key
    from chiasm_experiments.training.run import Job

    manifests = []
    for place, values in enumerate(runs):
        run = RunConfig.model_validate(values)
        own = folder / str(place)
        own.mkdir(parents=True)
        labels = {"trial": own.name, "study": "overhead", "cell": {}}
        pool.submit(Job(run.model_dump(mode="json"), str(own), labels, pool.execution), make_key(run, plan_run(run)))
        while not (events := pool.events(10)):
            pass
        (ended,) = events
        if ended.status != "complete":
            raise SystemExit(ended.error)
        manifests.append(ended.manifest)
    return manifests


def pooled(folder: Path) -> dict[str, list[float]]:
    """The gaps of a pool of one slot, with one kind of frozen parts and with two in turn."""
    import ray

    from chiasm_experiments.study.executor import Pool
    from chiasm_experiments.study.settings import Resources

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="warning")
    pool = Pool(Resources.model_validate(RESOURCES | {"concurrent": 1}), lambda line: None, "overhead")
    same = in_turn(pool, folder / "same", [changed(1e-3 * (1 + i)) for i in range(REPEATS + 1)])
    # the first of each kind draws random weights and compiles nothing that a later one would not
    other = in_turn(pool, folder / "other", [changed(1e-3 * (1 + i), 128 + 32 * (i % 2)) for i in range(REPEATS + 1)])
    pool.close()
    ray.shutdown()
    return {"same": gaps(same), "other": gaps(other)}


def finish(command: list[str], folder: Path) -> None:
    """Runs a command to its end; shows its errors if it fails."""
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(ended.stderr[-4000:])


def swept(folder: Path, trials: int, steps: int) -> tuple[float, float, list[dict[str, Any]]]:
    """When the process of a `chiasm sweep` began and ended, and the manifests of its trials."""
    run = copy.deepcopy(RUN)
    run["stages"][0]["steps"] = steps
    study = {
        "name": "overhead",
        "base": run,
        "factors": {"stages.train.lr": {f"lr{i}": 1e-3 * (1 + i / trials) for i in range(trials)}},
        "seeds": [0],
        "resources": RESOURCES | {"concurrent": 2},
    }
    folder.mkdir()
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    command = [sys.executable, "-m", "chiasm.cli", "sweep", "study.yaml", "--out", "out", "--json"]
    started = time.time()
    finish(command, folder)
    ended = time.time()
    return started, ended, [json.loads(file.read_text()) for file in (folder / "out").glob("trials/*/manifest.json")]


def fresh(folder: Path, steps: int) -> list[dict[str, float]]:
    """From the start of a process for each trial to its first step and to its end."""
    found = []
    for place in range(FRESH):
        run = changed(1e-3 * (1 + place))
        run["stages"][0]["steps"] = steps
        own = folder / str(place)
        own.mkdir(parents=True)
        (own / "run.yaml").write_text(yaml.safe_dump(run))
        command = [sys.executable, "-m", "chiasm.cli", "train", "run.yaml", "--out", "out", "--json"]
        started = time.time()
        finish(command, own)
        ended = time.time()
        manifest = json.loads((own / "out" / "manifest.json").read_text())
        found.append({"first step": first_step(manifest) - started, "whole": ended - started})
    return found


def steps_of_a_second(folder: Path) -> int:
    """Steps that a trial takes in about a second where two run at once, as in the sweep."""
    *_, manifests = swept(folder, 8, 40)
    warm = sorted(manifests, key=lambda manifest: manifest["started"])[2:]
    step = statistics.median(manifest["seconds"]["train"] / 40 for manifest in warm)
    beside = statistics.median(manifest["seconds"]["total"] - manifest["seconds"]["train"] for manifest in warm)
    return max(1, round((SECONDS - beside) / step))


def main() -> None:
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    busy = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory(prefix="chiasm-overhead-") as name:
        folder = Path(name)
        # features of earlier runs would save this one's first steps
        os.environ["CHIASM_CACHE"] = str(folder / "cache")
        pool = pooled(folder)
        steps = steps_of_a_second(folder / "second")
        began, ended, manifests = swept(folder / "sweep", trials, steps)
        alone = fresh(folder / "fresh", steps)
    busy.append(os.getloadavg()[0])
    totals = [manifest["seconds"]["total"] for manifest in manifests]
    same, other = statistics.median(pool["same"]), statistics.median(pool["other"])
    process = statistics.median(each["first step"] for each in alone)
    figures = {
        "warm_pool_seconds": {"median": same, "worst": max(pool["same"]), "trials": len(pool["same"])},
        "another_backbone_seconds": {"median": other, "worst": max(pool["other"]), "trials": len(pool["other"])},
        "sweep": {
            "trials": len(manifests),
            "complete": sum(manifest["status"] == "complete" for manifest in manifests),
            "seconds": ended - began,
            "before_the_first_trial": min(manifest["started"] for manifest in manifests) - began,
            "after_the_last_trial": ended - max(map(end, manifests)),
            "trial_seconds_median": statistics.median(totals),
            "trial_seconds_over_two_slots": sum(totals) / 2,
            "slot_to_first_step_median": statistics.median(gaps(manifests)),
        },
        "peer_fresh_process": {
            "trials": FRESH,
            "start_to_first_step_median": process,
            "whole_median": statistics.median(each["whole"] for each in alone),
        },
        "load_average_before_and_after": busy,
    }
    write_result(
        "trial_overhead",
        figures=figures,
        asked="from a free slot to the first step of the next one-worker trial, tiny models, medians: under 0.5 s on a "
        "warm pool, under 4 s where another backbone loads; 100 trials of 1 s on 2 slots in under 80 s, Ray's "
        "start among it",
        met=same < 0.5
        and other < 4
        and figures["sweep"]["complete"] == trials == 100
        and ended - began < 80
        and statistics.median(totals) >= 0.9 * SECONDS,
        ratio=same / process,
    )


if __name__ == "__main__":
    main()
