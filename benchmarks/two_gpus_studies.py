"""Studies on two GPUs beside one: trials at half a GPU, on both with a worker killed, and a mixture. See two_gpus.py.

Shape letters: none.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
import yaml
from two_gpus_plan import Plan, cluster

from chiasm_experiments.study.cells import make_cells, refuse_invalid
from chiasm_experiments.study.config import Study
from chiasm_experiments.study.folder import TRIALS
from chiasm_experiments.study.storage import open_storage
from chiasm_experiments.training.files import METRICS

ON_ONE, ON_TWO, BOTH, MIXTURE = "halves on one GPU", "halves on two GPUs", "both GPUs", "mixture"
BUSY = 0.9
"""Of the looks at a GPU while trials wait: a trial that takes another's place has a moment without work."""


def write_study(folder: Path, name: str, plan: Plan, trials: int, steps: int, **resources: Any) -> Path:
    """A study of so many equal trials that differ in their learning rate."""
    world = {"name": "world", "image_size": 96, "skills": ["colour"]}
    shape = plan.scale.llms["135m"] | {"context_length": 1024}
    run = {
        "vision": {"encoders": [plan.scale.encoders["clip"]], "adapter": "mlp"},
        "llm": {"name": "causal", "shape": shape, "tokenizer": "bytes"},
        "system": "",
        "stages": [
            {"name": "s", "data": {**world, "task": "captions", "size": 64}, "train": ["adapter", "tokens"]}
            | {"batch_size": 8, "steps": steps}
        ],
        "evaluate": {**world, "size": 8},
    }
    study = {
        "name": name,
        "base": run,
        "factors": {"stages.s.lr": {f"lr{i}": 1e-4 * (1 + i) for i in range(trials)}},
        "seeds": [0],
        "resources": {"compile": "off", "loggers": [], "cache": "off"} | resources,
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(study))
    return file


class Sweep:
    """`chiasm sweep` as a process on a running cluster."""

    def __init__(self, study: Path, runs: Path, address: str) -> None:
        self.folder = runs / study.stem
        self.file = (runs / f"{study.stem}.log").open("w")
        env = {**os.environ, "CHIASM_RUNS": str(runs), "RAY_ADDRESS": address}
        self.waited = (0.0, 0.0)
        """From when the first trials were through until the last one was placed: trials waited for a place."""
        words = [sys.executable, "-m", "chiasm.cli", "sweep", str(study), "--json"]
        self.process = subprocess.Popen(words, env=env, stdout=self.file, stderr=subprocess.STDOUT)

    def end(self) -> dict[str, Any]:
        """What became of it: trials, trials at once, and trials an hour once the first ones are through."""
        try:
            code = self.process.wait(300)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise RuntimeError(f"no end in sight: {Path(self.file.name).read_text()[-2000:]}") from None
        self.file.close()
        if code:
            raise RuntimeError(f"the sweep ended with {code}: {Path(self.file.name).read_text()[-2000:]}")
        storage = open_storage(None, self.folder)
        trials = [t for s in storage.get_all_studies() for t in storage.get_all_trials(s._study_id)]
        times = [(t.datetime_start.timestamp(), t.datetime_complete.timestamp()) for t in trials if t.datetime_complete]
        edges = sorted([(start, 1) for start, _ in times] + [(end, -1) for _, end in times])
        running, most = 0, 0
        for _, change in edges:
            running += change
            most = max(most, running)
        # from when the first ones are through, which had processes to start and models to load
        ends = sorted(end for _, end in times)
        counted = len(ends) - most
        self.waited = (ends[most - 1], max(start for start, _ in times))
        return {
            "states": sorted(t.state.name for t in trials),
            "at_once": most,
            "seconds": ends[-1] - min(start for start, _ in times),
            "trials_per_hour": 3600 * counted / (ends[-1] - ends[most - 1]) if counted > 0 else None,
        }


class Watch:
    """Looks at how busy each GPU is, twice a second, from when it is made until it is ended."""

    def __init__(self, plan: Plan) -> None:
        self.looks: list[tuple[float, list[float]]] = []
        self.ended = threading.Event()
        if plan.gpus:
            threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
        while not self.ended.wait(0.5):
            said = subprocess.run(command, capture_output=True, text=True).stdout.split()
            self.looks.append((time.time(), [float(word) for word in said]))

    def end(self, *waited: tuple[float, float]) -> list[float] | None:
        """The share of looks at which each GPU was busy, of those in any of the times; None: there were none."""
        self.ended.set()
        seen = [looks for at, looks in self.looks if any(since <= at <= until for since, until in waited)]
        return [sum(used > 0 for used in gpu) / len(gpu) for gpu in zip(*seen, strict=True)] if seen else None


def kill_a_worker(sweep: Sweep, after: int) -> int:
    """Kills the second worker of the first trial once that has logged some steps; the step that it had reached."""
    until = time.monotonic() + 300
    while time.monotonic() < until:
        logs = list(sweep.folder.glob(f"{TRIALS}/*/{METRICS}"))
        lines = logs[0].read_text().splitlines() if logs else []
        found = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended since it was listed
                found += [process] if process.name().startswith("ray::RayTrainWorker") else []
        if len(lines) >= after and len(found) >= 2:
            found[-1].send_signal(signal.SIGKILL)
            return len(lines)
        if sweep.process.poll() is not None:
            break
        time.sleep(0.05)
    raise RuntimeError("no worker to kill: " + Path(sweep.file.name).read_text()[-3000:])


def steps_once(folder: Path, steps: int) -> bool:
    """Whether the log of every trial has each step once."""
    files = folder.glob(f"{TRIALS}/*/{METRICS}")
    logs = [[json.loads(line)["step"] for line in file.read_text().splitlines()] for file in files]
    return bool(logs) and all(log == list(range(1, steps + 1)) for log in logs)


def shares(plan: Plan) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a worker asks for that is to have half a GPU, and a whole one; where there is none a CPU stands for it."""
    half, whole = (
        {"gpus_per_worker": share if plan.gpus else 0, "cpus_per_worker": 2 if plan.gpus else share}
        for share in (0.5, 1)
    )
    return half, whole


def write_studies(plan: Plan, folder: Path, part: str) -> list[Path]:
    """The studies of a part."""
    half, whole = shares(plan)
    several = whole | {"workers": 2, "checkpoint_seconds": 0, "concurrent": 1}
    wanted: dict[str, list[tuple[str, int, int, dict[str, Any]]]] = {
        ON_ONE: [("halves-on-1", plan.trials, plan.steps, half)],
        ON_TWO: [("halves-on-2", plan.trials, plan.steps, half)],
        BOTH: [("both-with-a-kill", 2, plan.steps // 2, several)],
        MIXTURE: [
            ("mixture-halves", 6, plan.steps, half | {"concurrent": 2}),
            ("mixture-whole", 3, plan.steps, whole | {"concurrent": 1}),
        ],
    }
    return [write_study(folder, name, plan, *size, **resources) for name, *size, resources in wanted[part]]


def check_studies(plan: Plan, parts: Iterable[str]) -> None:
    """Plans the studies of parts, before any of them has taken a GPU's time.

    Raises:
        ConfigError: a trial of one cannot work.
    """
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            for file in write_studies(plan, Path(folder), part):
                study = Study(file)
                refuse_invalid(make_cells(study), study)


def halves(plan: Plan, folder: Path, gpus: int) -> dict[str, Any]:
    """Trials at half a GPU each."""
    (study,) = write_studies(plan, folder, ON_ONE if gpus == 1 else ON_TWO)
    with cluster(plan, gpus) as address:
        watch, sweep = Watch(plan), Sweep(study, folder, address)
        found = sweep.end()
        busy = watch.end(sweep.waited)
    return {study.stem: found | ({"busy_while_trials_wait": busy} if gpus == 2 else {})}


def both(plan: Plan, folder: Path) -> dict[str, Any]:
    """Trials on both GPUs, one of whose workers is killed."""
    (study,) = write_studies(plan, folder, BOTH)
    with cluster(plan, 2) as address:
        sweep = Sweep(study, folder, address)
        killed = kill_a_worker(sweep, 5)
        ended, once = sweep.end(), steps_once(sweep.folder, plan.steps // 2)
    return {study.stem: ended | {"killed_at_step": killed, "steps_once": once}}


def mixture(plan: Plan, folder: Path) -> dict[str, Any]:
    """A study of trials at half a GPU beside one of trials on a whole one."""
    files = write_studies(plan, folder, MIXTURE)
    with cluster(plan, 2) as address:
        watch, sweeps = Watch(plan), [Sweep(file, folder, address) for file in files]
        found = {file.stem: sweep.end() for file, sweep in zip(files, sweeps, strict=True)}
        # while both have trials that wait
        busy = watch.end((max(s.waited[0] for s in sweeps), min(s.waited[1] for s in sweeps)))
    found["mixture-halves"]["busy_while_trials_wait"] = busy
    return found


STUDIES: dict[str, Callable[[Plan, Path], dict[str, Any]]] = {
    ON_ONE: lambda plan, folder: halves(plan, folder, 1),
    ON_TWO: lambda plan, folder: halves(plan, folder, 2),
    BOTH: both,
    MIXTURE: mixture,
}


def studies(plan: Plan, name: str) -> dict[str, Any]:
    """What became of the trials of one of `STUDIES`, or its error: the others are run all the same."""
    with tempfile.TemporaryDirectory(prefix="two-gpus-", dir="/tmp") as folder:
        try:
            return STUDIES[name](plan, Path(folder))
        except Exception as error:
            return {"error": repr(error)[-2000:]}


def judge_studies(parts: dict[str, Any]) -> dict[str, Any]:
    """Whether each study ended as asked, and the throughput of two GPUs to one."""
    if any("error" in parts.get(name, {"error": "not run"}) for name in STUDIES):
        return {}
    found = {study: value for name in STUDIES for study, value in parts[name].items()}
    ended = list(found.values())
    busy = [share for study in ended for share in study.get("busy_while_trials_wait") or []]
    return {
        "throughput": found["halves-on-2"]["trials_per_hour"] / found["halves-on-1"]["trials_per_hour"],
        "at_once_as_asked": (found["halves-on-1"]["at_once"], found["halves-on-2"]["at_once"]) == (2, 4)
        and found["mixture-halves"]["at_once"] == 2
        and found["mixture-whole"]["at_once"] == 1,
        "all_complete": all(set(item["states"]) == {"COMPLETE"} for item in ended),
        "none_idle_while_trials_wait": bool(busy) and min(busy) >= BUSY,
        "killed_run_takes_each_step_once": found["both-with-a-kill"]["steps_once"],
    }
