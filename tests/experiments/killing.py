"""Studies whose processes are killed: a cluster of its own, drivers on it, and what must hold once one has resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

CLIP = {"image_size": 28, "patch_size": 14, "width": 16, "depth": 2, "heads": 2, "mlp_width": 16}
WORLD = {"name": "world", "image_size": 96, "skills": ["colour"], "size": 8}
STAGE = {"train": ["fusion", "adapter", "tokens"], "lr": 1e-3, "batch_size": 4}
BASE = {
    "vision": {"encoders": [{"name": "clip", "shape": CLIP}], "adapter": "mlp"},
    "llm": {
        "name": "causal",
        "shape": {"width": 32, "depth": 1, "heads": 2, "kv_heads": 1, "mlp_width": 32, "context_length": 512},
    },
    "system": "",
    "stages": [
        {"name": "pretrain", "data": {**WORLD, "task": "captions"}, **STAGE, "steps": 12},
        {"name": "finetune", "data": {**WORLD, "task": "dialogues"}, **STAGE, "train": ["adapter", "llm"], "steps": 40},
    ],
    "evaluate": WORLD,
}
RESOURCES = {"cpus_per_worker": 0.5, "concurrent": 2, "loggers": [], "checkpoint_seconds": 0, "cache": "off"}
GRID = {
    "name": "kills",
    "base": BASE,
    "factors": {"vision.adapter": ["mlp", "linear"], "stages.finetune.lr": {"slow": 1e-3, "fast": 1e-2}},
    "seeds": [0, 1],
    "resources": RESOURCES,
}
"""8 trials; two each have stage 1 in common. A checkpoint after every step."""
SEARCH = GRID | {
    "design": "search",
    "factors": {"vision.adapter": ["mlp", "linear"], "stages.finetune.lr": {"low": 1e-4, "high": 1e-1, "log": True}},
    "seeds": [0],
    "search": {"trials": 8, "startup": 3, "pruner": "hyperband", "rungs": [0.25, 0.5], "rung_questions": 4},
}
HEAD = """
import sys, time, ray
head = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=sys.argv[1])
print("address", head.address_info["gcs_address"], flush=True)
time.sleep(100000)
"""
LOOK = """
import json, time, ray
from ray.util.placement_group import placement_group_table
from ray._private.state import actors
ray.init(log_to_driver=False, logging_level="error")
mine = ray.get_runtime_context().get_job_id()
for _ in range(60):
    alive = [a["ActorClassName"] for a in actors().values() if a["State"] != "DEAD" and a["JobID"] != mine]
    groups = [g["state"] for g in placement_group_table().values() if g["state"] != "REMOVED"]
    free = ray.available_resources().get("CPU") == ray.cluster_resources().get("CPU")
    if not alive and not groups and free:
        break
    time.sleep(0.5)
print(json.dumps({"actors": alive, "placement_groups": groups, "all_free": free}))
"""


class Cluster:
    """A Ray cluster of its own, which ends with its process."""

    def __init__(self) -> None:
        # sockets have short names, whatever folder the test has
        self.folder = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
        self.environment = os.environ | {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
        self.environment.pop("RAY_ADDRESS", None)
        command = [sys.executable, "-c", HEAD, self.folder.name]
        self.process = subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("address "):
                self.environment["RAY_ADDRESS"] = line.split()[1]
                break
        else:
            raise RuntimeError("the cluster did not start")

    def raylet(self) -> psutil.Process:
        """The node's own process."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return next(child for child in children if child.name() == "raylet")

    def trainers(self) -> list[psutil.Process]:
        """The processes that execute trials just now."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                words = " ".join(child.cmdline())
            except psutil.NoSuchProcess:
                continue
            if words.startswith("ray::TrialActor.run"):
                found.append(child)
        return found

    def leftovers(self) -> dict[str, Any]:
        """What is alive on it although no driver is, once it has had the time to end."""
        words = [sys.executable, "-c", LOOK]
        out = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=180, check=True)
        found: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
        return found

    def close(self) -> None:
        """Ends it, and every process that it started."""
        processes = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()
        for process in processes:
            if process.is_running():
                process.kill()
        self.folder.cleanup()


@contextmanager
def cluster() -> Iterator[Cluster]:
    """A cluster that is ended again."""
    made = Cluster()
    try:
        yield made
    finally:
        made.close()


@dataclass
class Steps:
    """The log of each trial's steps at one moment: by trial, by stage and step, the line."""

    lines: dict[str, dict[tuple[str, int], str]]

    @classmethod
    def read(cls, out: Path) -> Steps:
        """The logs as far as their lines are whole."""
        found: dict[str, dict[tuple[str, int], str]] = {}
        for file in out.glob("trials/*/metrics.jsonl"):
            own = found.setdefault(file.parent.name, {})
            for line in file.read_text().splitlines():
                try:
                    values = json.loads(line)
                except ValueError:
                    continue
                own[values["stage"], values["step"]] = line
        return cls(found)

    @property
    def count(self) -> int:
        """Of all trials together."""
        return sum(map(len, self.lines.values()))


@dataclass
class Killed:
    """A study after a kill, and what became of it."""

    seconds: float
    finished: int
    """Trials that were."""
    steps: int
    """In the logs when it was killed."""
    lost: int = 0
    """Of these, the ones that were taken again."""
    problems: list[str] = field(default_factory=list)


class Run:
    """A study in a folder of its own.

    Args:
        folder: where its file and results go.
        study: as its file has it.
    """

    def __init__(self, folder: Path, study: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "study.yaml"
        self.file.write_text(yaml.safe_dump(study, sort_keys=False))
        self.study = study
        self.out = folder / "out"

    def drive(self, environment: dict[str, str]) -> subprocess.Popen[str]:
        """`chiasm sweep` as a process in a group of its own."""
        command = [
            sys.executable,
            "-m",
            "chiasm.cli",
            "sweep",
            str(self.file),
            "--out",
            str(self.out),
            "--json",
        ]
        with (self.file.parent / "said.txt").open("a") as said:
            return subprocess.Popen(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=said, text=True, start_new_session=True
            )

    @property
    def said(self) -> str:
        """By all drivers."""
        return (self.file.parent / "said.txt").read_text()

    def finish(self, environment: dict[str, str], seconds: float = 400) -> None:
        """Drives it to its end."""
        code = self.drive(environment).wait(seconds)
        assert code == 0, self.said[-3000:]

    def complete(self) -> dict[str, bytes]:
        """The manifest of each trial that has ended well."""
        files = {file.parent.name: file.read_bytes() for file in self.out.glob("trials/*/manifest.json")}
        return {name: data for name, data in files.items() if json.loads(data)["status"] in ("complete", "pruned")}

    def wait_for(self, condition: Any, process: subprocess.Popen[str], seconds: float = 120) -> bool:
        """Whether a condition came true before the driver ended."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and process.poll() is None:
            if condition():
                return True
            time.sleep(0.02)
        return False

    def after(self, killed: Killed, before: dict[str, bytes], steps: Steps) -> Killed:
        """Judges a study that was driven to its end after a kill.

        Args:
            killed: of the kill.
            before: what was complete then.
            steps: the logs then.
        """
        problems = killed.problems
        for name, data in before.items():
            if (self.out / "trials" / name / "manifest.json").read_bytes() != data:
                problems.append(f"{name} was finished and ran again")
        journal = JournalStorage(JournalFileBackend(str(self.out / "optuna.journal")))
        study = journal.get_all_studies()[0]
        trials = journal.get_all_trials(study._study_id)
        running = [trial.number for trial in trials if trial.state in (TrialState.RUNNING, TrialState.WAITING)]
        if running:
            problems.append(f"trials {running} have not ended")
        named = [trial for trial in trials if "trial" in trial.user_attrs]
        names = Counter(trial.user_attrs["trial"] for trial in named)
        if len(names) != 8 or max(names.values()) > 1:
            problems.append(f"wanted 8 trials, each once: {names}")
        if bad := [t.user_attrs["trial"] for t in named if t.state not in (TrialState.COMPLETE, TrialState.PRUNED)]:
            problems.append(f"these failed: {bad}")
        if set(self.complete()) != set(names):
            problems.append("the record and the folder have different trials")
        problems += self._check_steps()
        now = Steps.read(self.out).lines
        for name, lines in steps.lines.items():
            killed.lost += sum(now.get(name, {}).get(step) != line for step, line in lines.items())
        return killed

    def _check_steps(self) -> list[str]:
        wanted = {stage["name"]: stage["steps"] for stage in self.study["base"]["stages"]}
        problems = []
        for name, data in self.complete().items():
            count = Counter(stage for stage, _ in Steps.read(self.out).lines[name])
            if json.loads(data)["status"] == "complete" and dict(count) != wanted:
                problems.append(f"{name} has the steps {dict(count)}, wanted {wanted}")
        return problems


def kill_driver(run: Run, cluster: Cluster, moment: Callable[[Run], bool]) -> Killed | None:
    """Starts a study, kills its driver at a moment, and drives it to its end.

    Args:
        run: the study.
        cluster: where it runs.
        moment: true once the time has come.

    Returns:
        None where the study ended before.
    """
    process = run.drive(cluster.environment)
    started = time.monotonic()
    if not run.wait_for(lambda: moment(run), process):
        process.wait(60)
        return None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return resume(run, cluster, time.monotonic() - started)


def resume(run: Run, cluster: Cluster, seconds: float) -> Killed:
    """Drives a study to its end after a kill.

    Args:
        run: the study; nobody drives it.
        cluster: where it goes on.
        seconds: after which it was killed.
    """
    before, steps = run.complete(), Steps.read(run.out)
    killed = Killed(round(seconds, 1), len(before), steps.count)
    run.finish(cluster.environment)
    return run.after(killed, before, steps)
