"""A grid as a shell loop would run it, beside `chiasm sweep`: GPU-seconds for the same cells and steps, on one GPU.

The loop is a process for each trial, one after the other, with the encoder live and nothing shared. It would take too
long as a whole, so a spread sample of its trials is timed, and the whole is that sample's mean times their number, with
its 95 % interval. The sweep runs the whole grid. A search with pruning then runs until the cell that it names is within
the noise of the grid's best and stays so.

    python benchmarks/sweep_vs_loop.py [--sample 12] [--trials 36] [--keep FOLDER] [--seconds 600] [--tiny]

`--keep` names a folder where everything stays: search_cost.py takes its table from FOLDER/swept, and the same command
goes on where it was stopped, as it is after `--seconds`. What a command does again then, such as starting Ray, counts.
`--tiny` runs four trials of the grid with few steps, anywhere, to see that the script works; it writes no result.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
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
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


def _first(levels: Any) -> Any:
    """Two levels of a factor."""
    return dict(list(levels.items())[:2]) if isinstance(levels, dict) else levels[:2] if len(levels) > 3 else levels[:1]


class OutOfTimeError(Exception):
    """The seconds that were given are over."""


class Kept:
    """What was measured so far, in a file.

    Args:
        folder: of the file.
        until: `time.monotonic()` at which commands are stopped; None: never.
    """

    def __init__(self, folder: Path, until: float | None) -> None:
        self.file = folder / "measured.json"
        self.until = until
        known: dict[str, list[list[float]]] = json.loads(self.file.read_text()) if self.file.is_file() else {}
        self.spans = known
        """Of each command that was run, by name: when it began and ended, once or in several goes."""

    def run(self, name: str, *words: object) -> None:
        """Runs a command to its end, or until the time is over."""
        began = time.time()
        process = subprocess.Popen([sys.executable, "-m", "chiasm.cli", *map(str, words)], stdout=subprocess.DEVNULL)
        try:
            code = process.wait(None if self.until is None else max(1.0, self.until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.terminate()  # trials write checkpoints
            process.wait(60)
            code = None
        self.spans.setdefault(name, []).append([began, time.time()])
        self.file.write_text(json.dumps(self.spans))
        if code is None:
            raise OutOfTimeError
        if code:
            raise SystemExit(f"chiasm {words[0]} ended with {code}")

    def seconds(self, name: str, at: float = float("inf")) -> float:
        """Those that a command had taken at a time."""
        return sum(max(0.0, min(at, end) - began) for began, end in self.spans[name])


def loop(study: Path, sample: int, kept: Kept) -> tuple[list[float], int]:
    """Seconds of each sampled trial in a process of its own, and how many trials the whole loop has."""
    from chiasm_experiments.study.cells import make_cells, make_trials
    from chiasm_experiments.study.config import Study

    read = Study(study)
    trials = make_trials(read, make_cells(read))
    for i in range(sample):
        trial = trials[i * len(trials) // sample]
        file, out = study.parent / f"run-{i}.yaml", study.parent / f"loop-{i}"
        file.write_text(json.dumps(trial.run.model_dump(mode="json")))
        if not (out / "manifest.json").is_file() or read_status(out) != "complete":
            shutil.rmtree(out, ignore_errors=True)  # timed whole
            kept.spans.pop(f"loop-{i}", None)
            kept.run(f"loop-{i}", "train", file, "--out", out, "--set", "cache=off", "--json")
    return [kept.seconds(f"loop-{i}") for i in range(sample)], len(trials)


def read_status(folder: Path) -> str:
    """Of a run."""
    status: str = json.loads((folder / "manifest.json").read_text())["status"]
    return status


def means(out: Path) -> dict[str, list[float]]:
    """The accuracies of each cell, over its seeds."""
    found: dict[str, list[float]] = defaultdict(list)
    for file in sorted(out.glob("trials/*/manifest.json")):
        manifest = json.loads(file.read_text())
        if manifest["status"] == "complete":
            (score,) = manifest["scores"].values()
            found[json.dumps(manifest["cell"], sort_keys=True)].append(score)
    return found


def found_after(out: Path, kept: Kept, grid: dict[str, list[float]]) -> float | None:
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
        after = (after or kept.seconds("search", at)) if near else None
    return after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=12, help="trials of the loop that are timed")
    parser.add_argument("--trials", type=int, default=36, help="that the search proposes")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where everything stays")
    parser.add_argument("--seconds", type=float, help="after which it stops; the same command goes on")
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    until = None if asked.seconds is None else time.monotonic() + asked.seconds
    with tempfile.TemporaryDirectory(prefix="chiasm-loop-") as home:
        folder = asked.keep or Path(home)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            measure(folder, Kept(folder, until), asked.sample, asked.trials, asked.tiny)
        except OutOfTimeError:
            print(f"out of time; the same command goes on from {folder}", flush=True)


def measure(folder: Path, kept: Kept, sample: int, trials: int, tiny: bool) -> None:
    """The loop's sample, the sweep, and the search, as far as they are not done."""
    grid = write_study(folder / "grid", tiny)
    seconds, count = loop(grid, min(2, sample) if tiny else sample, kept)
    print(f"the loop's trials took {', '.join(f'{each:.1f}' for each in seconds)} s", flush=True)
    swept, searched = folder / "swept", folder / "searched"
    if not (swept / "report.html").is_file():
        kept.run("sweep", "sweep", grid, "--out", swept, "--json")
    sweep = kept.seconds("sweep")
    print(f"the sweep of {count} trials took {sweep:.1f} s", flush=True)
    record(compare(seconds, count, sweep, None), tiny)
    search = yaml.safe_load(GRID.read_text())["search"] | {"trials": 3 if tiny else trials}
    file = write_study(folder / "search", tiny, design="search", search=search, name="searched")
    if not (searched / "report.html").is_file():
        kept.run("search", "sweep", file, "--out", searched, "--json")
    record(compare(seconds, count, sweep, found_after(searched, kept, means(swept))), tiny)


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
