"""What a search saves: searches simulated over the outcomes of a grid that was run whole.

The grid is benchmarks/search_grid.yaml: 48 cells x 3 seeds, each with its learning curve, question by question.

chiasm sweep benchmarks/search_grid.yaml --out runs/search-grid
python benchmarks/search_cost.py --take runs/search-grid    # writes results/search_grid.json, the table of outcomes
python benchmarks/search_cost.py                            # simulates, writes results/search_cost.json and .png

A simulated study is the real driver, sampler and pruner, with a pool that takes a trial's rungs and score from the
table instead of training it. Stages that trials share are counted for each of them, in the grid and in the searches.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from common import RESULTS, ROOT, write_result

GRID = ROOT / "benchmarks" / "search_grid.yaml"
TABLE = RESULTS / "search_grid.json"
STUDIES = 200
SHARE = 1 / 8
METHODS: dict[str, dict[str, Any]] = {
    "random": {"sampler": "random", "pruner": "none"},
    "TPE": {"sampler": "tpe", "pruner": "none"},
    "TPE, Hyperband": {"sampler": "tpe", "pruner": "hyperband"},
}
OURS = "TPE, Hyperband"
"""The defaults of a search."""


def take(folder: Path) -> None:
    """The outcomes of a grid that was run: levels, seed, steps, accuracy, and each question's score at each rung."""
    manifests = [json.loads(file.read_text()) for file in sorted(folder.glob("trials/*/manifest.json"))]
    wanted = json.loads((folder / "study.json").read_text())["planned"]
    complete = [manifest for manifest in manifests if manifest["status"] == "complete"]
    if len(complete) != wanted:
        raise SystemExit(f"{folder} holds {len(complete)} of {wanted} complete trials; finish the grid first")
    rows = []
    for manifest in complete:
        steps = [stage["steps"] for stage in manifest["stages"]]
        curve = [
            {"share": point["share"], "scores": "".join(str(round(score)) for score in point["scores"])}
            for point in manifest["curve"]
        ]
        (score,) = manifest["scores"].values()
        rows.append(
            {"cell": manifest["cell"], "seed": manifest["seed"], "steps": steps, "accuracy": score, "curve": curve}
        )
    about = complete[0]["environment"]
    machine = about["gpu"] or f"{platform.machine()}, {os.cpu_count()} CPU cores, no GPU"
    TABLE.write_text(json.dumps({"machine": machine, "packages": about["packages"], "rows": rows}) + "\n")
    print(f"{len(rows)} trials in {TABLE}")


class Table:
    """The outcomes of the grid."""

    def __init__(self) -> None:
        self.rows = json.loads(TABLE.read_text())["rows"]
        self.by_trial = {(self.key(row["cell"]), row["seed"]): row for row in self.rows}
        accuracies: dict[tuple[str, ...], list[float]] = defaultdict(list)
        for row in self.rows:
            accuracies[self.key(row["cell"])].append(row["accuracy"])
        self.means = {cell: statistics.fmean(found) for cell, found in accuracies.items()}
        self.best = max(self.means.values())
        # over cells, as three seeds of one cell say little of its spread
        spread = statistics.fmean(statistics.variance(found) for found in accuracies.values())
        self.seeds = len(next(iter(accuracies.values())))
        self.noise = 1.96 * (2 * spread / self.seeds) ** 0.5
        """Half of the 95 % interval of the difference of two cells' means over seeds."""
        self.steps = sum(sum(row["steps"]) for row in self.rows)

    @staticmethod
    def key(cell: dict[str, str]) -> tuple[str, ...]:
        return tuple(cell[path] for path in sorted(cell))


@cache
def table() -> Table:
    return Table()


class Replay:
    """A pool that takes what a trial would report and score from the table.

    Args:
        spent: told of the steps of a trial, its cell, and its accuracy if it ended whole.
    """

    size = 1

    def __init__(self, spent: Callable[[int, tuple[str, ...], float | None], None]) -> None:
        from chiasm_experiments.training.execution import Execution

        self.execution = Execution()
        self.spent = spent
        self.name: str | None = None
        self.row: dict[str, Any] = {}
        self.rungs: tuple[float, ...] = ()
        self.rung = 0
        self.pruned = False

    @property
    def free(self) -> int:
        return int(self.name is None)

    def takes(self, key: Any) -> float:
        return 1.0

    def warm(self) -> frozenset[str]:
        return frozenset()

    def submit(self, job: Any, key: Any) -> None:
        self.name, self.rungs, self.rung, self.pruned = job.labels["trial"], tuple(job.rungs), 0, False
        self.row = table().by_trial[Table.key(job.labels["cell"]), job.labels["seed"]]

    def events(self, seconds: float) -> list[Any]:
        from chiasm_experiments.study.executor import Ended, Reported

        if self.name is None:
            return []
        name, curve = self.name, self.row["curve"]
        if not self.pruned and self.rung < len(self.rungs):
            (point,) = [point for point in curve if abs(point["share"] - self.rungs[self.rung]) < 1e-9]
            scores = tuple(float(score) for score in point["scores"])
            return [Reported(name, self.rung, point["share"], scores)]
        self.name = None
        *first, last = self.row["steps"]
        cell = Table.key(self.row["cell"])
        if self.pruned:
            self.spent(sum(first) + round(self.rungs[self.rung] * last), cell, None)
            return [Ended(name, "pruned", {"status": "pruned", "rung": self.rung})]
        self.spent(sum(first) + last, cell, self.row["accuracy"])
        manifest = {"status": "complete", "scores": {"world": self.row["accuracy"]}, "seconds": {"total": 0.0}}
        return [Ended(name, "complete", manifest)]

    def answer(self, trial: str, go_on: bool) -> None:
        self.pruned = not go_on
        self.rung += int(go_on)

    def stop(self, trials: Sequence[str] | None = None) -> None:
        raise StopIteration

    def rest(self) -> None:
        pass

    def progress(self) -> dict[str, str]:
        return {}

    def close(self) -> None:
        pass


class EnoughError(Exception):
    """A simulated study has spent what the curves show."""


def simulate(method: str, seed: int) -> list[tuple[float, float]]:
    """One study: after each trial the share of the grid's steps that is spent, and the true mean of what it would name.

    What a study names is the cell of the best mean over the seeds that it ran to the end.
    """
    from chiasm_experiments.study.sweep import sweep

    found: dict[tuple[str, ...], list[float]] = defaultdict(list)
    steps, curve = 0, []

    def spent(more: int, cell: tuple[str, ...], accuracy: float | None) -> None:
        nonlocal steps
        steps += more
        if accuracy is not None:
            found[cell].append(accuracy)
        if found:
            named = max(found, key=lambda cell: statistics.fmean(found[cell]))
            curve.append((steps / table().steps, table().means[named]))
        if steps > 2 * SHARE * table().steps:
            raise EnoughError

    study = yaml.safe_load(GRID.read_text())
    study |= {"name": "simulated", "base": str((GRID.parent / study["base"]).resolve()), "design": "search"}
    rungs = {key: study["search"][key] for key in ("rungs", "rung_questions")}
    study["search"] = rungs | METHODS[method] | {"seed": 1000 * seed, "trials": len(table().rows)}
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        file = Path(folder) / "study.yaml"
        file.write_text(yaml.safe_dump(study, sort_keys=False))
        with contextlib.suppress(EnoughError):
            sweep(file, Path(folder) / "out", say=lambda line: None, open_pool=lambda state, say: Replay(spent))
    return curve


def at(curve: list[tuple[float, float]], share: float) -> float:
    """The true mean of what a study names once it has spent a share of the grid's steps; the worst cell's before."""
    named = [mean for spent, mean in curve if spent <= share]
    return named[-1] if named else min(table().means.values())


def found_after(curve: list[tuple[float, float]]) -> float:
    """The share of the grid's steps from which on what a study names stays within the noise of the best; inf: never."""
    after = float("inf")
    for spent, mean in reversed(curve):
        if table().best - mean > table().noise:
            break
        after = spent
    return after


def draw(curves: dict[str, list[list[tuple[float, float]]]], path: Path) -> None:
    """Regret against spent steps: median and quartiles of each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shares = np.linspace(0.005, 2 * SHARE, 80)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for method, own in curves.items():
        regret = 100 * np.array([[table().best - at(curve, share) for share in shares] for curve in own])
        low, middle, high = np.quantile(regret, [0.25, 0.5, 0.75], axis=0)
        (line,) = left.plot(100 * shares, middle, label=method)
        left.fill_between(100 * shares, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
        after = np.sort([found_after(curve) for curve in own])
        right.plot(100 * after, np.arange(1, len(after) + 1) / len(after), label=method, color=line.get_color())
    left.axhline(100 * table().noise, color="grey", linestyle=":", label="noise of two cells")
    for axis in (left, right):
        axis.axvline(100 * SHARE, color="grey", linewidth=0.8)
        axis.set_xlabel("training steps, % of the whole grid's")
        axis.set_xlim(0, 200 * SHARE)
    left.set_ylabel("regret of the named cell, points of accuracy\n(median and quartiles)")
    right.set_ylabel("share of studies that name a cell\nwithin the noise of the best from then on")
    left.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--take", type=Path, metavar="FOLDER", help="the folder of the finished grid")
    parser.add_argument("--studies", type=int, default=STUDIES, help="simulated for each method")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.take:
        take(arguments.take)
        return
    jobs = [(method, seed) for method in METHODS for seed in range(arguments.studies)]
    with ProcessPoolExecutor(arguments.processes) as pool:
        results = pool.map(simulate, *zip(*jobs, strict=True), chunksize=5)
        curves: dict[str, list[list[tuple[float, float]]]] = defaultdict(list)
        for (method, _), curve in zip(jobs, results, strict=True):
            curves[method].append(curve)
    draw(curves, RESULTS / "search_cost.png")
    figures: dict[str, Any] = {
        "cells": len(table().means),
        "seeds": table().seeds,
        "grid_steps": table().steps,
        "grid_trained_on": json.loads(TABLE.read_text())["machine"],
        "best_accuracy": table().best,
        "cells_within_noise_of_it": sum(table().best - mean <= table().noise for mean in table().means.values()),
        "noise_points": 100 * table().noise,
        "studies_of_each_method": arguments.studies,
        "methods": {
            method: {
                "found_after_share_of_grid_median": float(np.median([found_after(curve) for curve in own])),
                "found_within_an_eighth": sum(found_after(curve) <= SHARE for curve in own) / len(own),
                "regret_points_at_an_eighth_median": 100 * statistics.median(table().best - at(c, SHARE) for c in own),
                "regret_points_at_an_eighth_mean": 100 * statistics.fmean(table().best - at(c, SHARE) for c in own),
            }
            for method, own in curves.items()
        },
    }
    ours = figures["methods"][OURS]["found_after_share_of_grid_median"]
    write_result(
        "search_cost",
        figures=figures,
        ratio=ours,
        asked="search with pruning finds a cell within the noise of the true best in at most 1/8 of the grid's "
        "training steps, median of 200 simulated studies over a grid of at least 48 cells x 3 seeds trained on a GPU",
        met=ours <= SHARE and arguments.studies >= STUDIES and "no GPU" not in figures["grid_trained_on"],
    )


if __name__ == "__main__":
    main()
