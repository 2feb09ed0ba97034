"""A grid as a shell loop would run it, beside `chiasm sweep`: GPU-seconds for the same cells and steps, on one GPU.

The loop is a process for each trial, one after the other, with the encoder live and nothing shared. It would take too
long as a whole, so a spread sample of its trials is timed, and the whole is that sample's mean times their number, with
its 95 % interval. The sweep runs the whole grid. A search with pruning then runs until the cell that it names is within
the noise of the grid's best and stays so.

    python benchmarks/sweep_vs_loop.py [--sample 12] [--trials 36] [--keep FOLDER] [--tiny]

`--keep` names a folder for the grid's results, of which search_cost.py takes its table. `--tiny` runs four trials of
the grid with few steps, anywhere, to see that the script works; it writes no result.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import yaml
from common import ROOT, write_result
from scipy import stats

GRID = ROOT / "benchmarks" / "search_grid.yaml"
TINY = {"stages.pretrain.steps": {"few": 2}, "stages.finetune.steps": {"few": 4}, "evaluate.world.size": {"few": 20}}


def write_study(folder: Path, tiny: bool, **changes: Any) -> Path:
    """The grid's file in a folder of its own, changed."""
    study = yaml.safe_load(GRID.read_text()) | changes
    study["base"] = str((GRID.parent / study["base"]).resolve())
    study["resources"]["cache_folder"] = str(folder / "cache")  # what another study has kept does not count
    if tiny:
        study["factors"] = {path: _first(levels) for path, levels in study["factors"].items()} | TINY
        study["seeds"] = study["seeds"][:1]
    folder.mkdir(parents=True)
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


def _first(levels: Any) -> Any:
    """Two levels of a factor."""
    return dict(list(levels.items())[:2]) if isinstance(levels, dict) else levels[:2] if len(levels) > 3 else levels[:1]


def chiasm(*words: object) -> float:
    """Seconds of a command."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "chiasm.cli", *map(str, words)], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def loop(study: Path, sample: int) -> tuple[list[float], int]:
    """Seconds of each sampled trial in a process of its own, and how many trials the whole loop has."""
    from chiasm_experiments.study.cells import make_cells, make_trials
    from chiasm_experiments.study.config import Study

    read = Study(study)
    trials = make_trials(read, make_cells(read))
    seconds = []
    for i in range(sample):
        trial = trials[i * len(trials) // sample]
        file = study.parent / f"run-{i}.yaml"
        file.write_text(json.dumps(trial.run.model_dump(mode="json")))
        seconds.append(chiasm("train", file, "--out", study.parent / f"loop-{i}", "--set", "cache=off", "--json"))
    return seconds, len(trials)


def means(out: Path) -> dict[str, list[float]]:
    """The accuracies of each cell, over its seeds."""
    found: dict[str, list[float]] = defaultdict(list)
    for file in sorted(out.glob("trials/*/manifest.json")):
        manifest = json.loads(file.read_text())
        if manifest["status"] == "complete":
            (score,) = manifest["scores"].values()
            found[json.dumps(manifest["cell"], sort_keys=True)].append(score)
    return found


def found_after(out: Path, began: float, grid: dict[str, list[float]]) -> float | None:
    """Seconds after which the cell that a search names stays within the noise of the grid's best; None: never."""
    spread = statistics.fmean(statistics.variance(own) if len(own) > 1 else 0.0 for own in grid.values())
    true = {cell: statistics.fmean(own) for cell, own in grid.items()}
    noise = 1.96 * (2 * spread / min(map(len, grid.values()))) ** 0.5
    ended = [(file.stat().st_mtime, json.loads(file.read_text())) for file in out.glob("trials/*/manifest.json")]
    found: dict[str, list[float]] = defaultdict(list)
    after = None
    for at, manifest in sorted(ended, key=lambda item: item[0]):
        if manifest["status"] != "complete":
            continue
        (score,) = manifest["scores"].values()
        found[json.dumps(manifest["cell"], sort_keys=True)].append(score)
        named = max(found, key=lambda cell: statistics.fmean(found[cell]))
        near = max(true.values()) - true[named] <= noise
        after = (after or at - began) if near else None
    return after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=12, help="trials of the loop that are timed")
    parser.add_argument("--trials", type=int, default=36, help="that the search proposes")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where the sweep's results stay")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    with tempfile.TemporaryDirectory(prefix="chiasm-loop-") as home:
        folder = Path(home)
        grid = write_study(folder / "grid", arguments.tiny)
        seconds, count = loop(grid, min(2, arguments.sample) if arguments.tiny else arguments.sample)
        print(f"the loop's trials took {', '.join(f'{each:.1f}' for each in seconds)} s", flush=True)
        swept = arguments.keep or folder / "swept"
        sweep = chiasm("sweep", grid, "--out", swept, "--json")
        print(f"the sweep of {count} trials took {sweep:.1f} s", flush=True)
        search = yaml.safe_load(GRID.read_text())["search"] | {"trials": 3 if arguments.tiny else arguments.trials}
        record(compare(seconds, count, sweep, None), arguments.tiny)
        began = time.time()
        file = write_study(folder / "search", arguments.tiny, design="search", search=search, name="searched")
        chiasm("sweep", file, "--out", folder / "searched", "--json")
        after = found_after(folder / "searched", began, means(swept))
        record(compare(seconds, count, sweep, after), arguments.tiny)


def compare(seconds: list[float], count: int, sweep: float, after: float | None) -> dict[str, Any]:
    """The figures: seconds of a loop's sampled trials, of the whole sweep, and of a search until it has found."""
    mean = statistics.fmean(seconds)
    half = float(stats.t.ppf(0.975, len(seconds) - 1)) * statistics.stdev(seconds) / len(seconds) ** 0.5
    return {
        "trials": count,
        "loop": {"sampled": len(seconds), "seconds_a_trial": mean, "half_of_its_interval": half, "whole": mean * count},
        "sweep_seconds": sweep,
        "ratio_of_the_sweep": mean * count / sweep,
        "search_seconds_until_found": after,
        "ratio_of_the_search": None if after is None else mean * count / after,
    }


def record(figures: dict[str, Any], tiny: bool) -> None:
    """Writes what was found so far: a search that does not end leaves the sweep's figures."""
    sweep, search = figures["ratio_of_the_sweep"], figures["ratio_of_the_search"]
    write_result(
        "sweep_vs_loop",
        figures=figures,
        ratio=sweep,
        asked="GPU-seconds of the loop for the same cells and steps: at least 5 times the sweep's, and at least 20 "
        "times those of a search with pruning until it has found the same winner, within noise",
        met=sweep >= 5 and search is not None and search >= 20,
        write=not tiny and torch.cuda.is_available(),
    )


if __name__ == "__main__":
    main()
