"""A study whose driver is killed with SIGKILL at random moments, then a worker, then the node's raylet.

    python benchmarks/kill_study.py [KILLS]

Grids and searches with pruning of 8 trials, two at a time, which write a checkpoint after every step. After each kill
the same command is given again and must end the study: no finished trial lost or repeated, none left running, no cell
twice, nothing left in the cluster, and every other trial goes on from its checkpoint. That is told by the logs of
steps: each line holds what the step took, so that a step that is taken again has another line.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import ROOT, write_result

sys.path.insert(0, str(ROOT / "tests" / "experiments"))

from killing import GRID, SEARCH, Cluster, Killed, Run, Steps, cluster, kill_driver, resume

DRAW = random.Random(0)
STEPS = sum(stage["steps"] for stage in GRID["base"]["stages"])  # type: ignore[attr-defined]
CLEAN = {"actors": [], "placement_groups": [], "all_free": True}
LOSS = 2
"""Steps that a running trial may take again: one whose checkpoint was being written, and one behind it in the log."""


def drivers(folder: Path, here: Cluster, kills: int) -> list[dict[str, Any]]:
    """Driver after driver, killed once so many steps are done and a moment later, or while it starts."""
    results: list[dict[str, Any]] = []
    while len(results) < kills:
        number = len(results)
        study = (GRID, SEARCH)[number % 2]
        # of five kills one falls into the start, before any step
        steps = DRAW.randrange(8 * STEPS) if number % 5 else 0
        wait, begun = DRAW.uniform(0, 0.3 if steps else 6), time.monotonic()
        killed = kill_driver(Run(folder / f"driver-{number}", study), here, moment(steps, wait, begun))
        if killed is None:
            print(f"driver {number}: the study ended before {steps} steps were seen; drawn again", flush=True)
            (folder / f"driver-{number}").rename(folder / f"driver-{number}-ended-{time.monotonic_ns()}")
            continue
        results.append({"design": study.get("design", "grid")} | told(killed, here))
        print(f"driver {number}: {results[-1]}", flush=True)
    return results


def moment(steps: int, wait: float, begun: float) -> Callable[[Run], bool]:
    """True a while after so many steps stand in the logs; without any, a while after the start."""
    since: list[float] = [] if steps else [begun]

    def come(run: Run) -> bool:
        if not since and Steps.read(run.out).count >= steps:
            since.append(time.monotonic())
        return bool(since) and time.monotonic() - since[0] >= wait

    return come


def told(killed: Killed, here: Cluster) -> dict[str, Any]:
    """What became of a study, with what is left in the cluster."""
    left = here.leftovers()
    problems = killed.problems + ([f"left in the cluster: {left}"] if left != CLEAN else [])
    if killed.lost > 2 * LOSS:
        problems.append(f"{killed.lost} steps were taken again")
    return asdict(killed) | {"problems": problems}


def worker(folder: Path, here: Cluster) -> dict[str, Any]:
    """A worker is killed; the driver starts its trial again by itself."""
    run = Run(folder / "worker", GRID)
    process, started = run.drive(here.environment), time.monotonic()
    assert run.wait_for(lambda: Steps.read(run.out).count >= STEPS and bool(here.trainers()), process)
    before, steps = run.complete(), Steps.read(run.out)
    DRAW.choice(here.trainers()).kill()
    killed = Killed(round(time.monotonic() - started, 1), len(before), steps.count)
    if process.wait(600) != 0:
        killed.problems.append(run.said[-1000:])
    if "starting it again (1 of 2)" not in run.said:
        killed.problems.append("the loss was not told")
    return told(run.after(killed, before, steps), here)


def raylet(folder: Path) -> dict[str, Any]:
    """The node dies under the driver, which ends by itself; the study goes on in another cluster."""
    run = Run(folder / "raylet", GRID)
    with cluster() as first:
        process, started = run.drive(first.environment), time.monotonic()
        assert run.wait_for(lambda: Steps.read(run.out).count >= STEPS, process)
        first.raylet().kill()
        died = time.monotonic()
        try:
            code = process.wait(180)
        except Exception:
            code = None
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        ended = time.monotonic() - died
    with cluster() as second:
        result = told(resume(run, second, died - started), second)
    return result | {"driver_exit": code, "driver_ended_after_seconds": round(ended, 1)}


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with cluster() as here:
            by_driver = drivers(folder, here, kills)
            by_worker = worker(folder, here)
            print(f"worker: {by_worker}", flush=True)
        by_raylet = raylet(folder)
        print(f"raylet: {by_raylet}", flush=True)
    every = [*by_driver, by_worker, by_raylet]
    write_result(
        "kill_study",
        figures={
            "kills_of_the_driver": len(by_driver),
            "with_problems": sum(bool(item["problems"]) for item in every),
            "steps_in_the_logs_when_killed": sum(item["steps"] for item in every),
            "of_these_taken_again": sum(item["lost"] for item in every),
            "finished_trials_when_killed": sum(item["finished"] for item in every),
            "driver": by_driver,
            "worker": by_worker,
            "raylet": by_raylet,
        },
        asked="SIGKILL of the driver at 20 random moments, of a worker, of the raylet; after each, resuming finishes "
        "the study: no finished trial lost or repeated, none running, no duplicate cell, no placement group or actor "
        "left, and trials continue from their checkpoints",
        met=kills >= 20 and not any(item["problems"] for item in every),
    )


if __name__ == "__main__":
    main()
