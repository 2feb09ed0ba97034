"""A study on a pool that trains nothing: each trial ends with what a function of its run says, one event at a time."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path

import optuna
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from chiasm.config import RunConfig
from chiasm_experiments.study.executor import Ended, Reported
from chiasm_experiments.study.keys import Key
from chiasm_experiments.study.sweep import Options, sweep
from chiasm_experiments.training.execution import Execution
from chiasm_experiments.training.files import MANIFEST, read_json, write_json


def manifest_of(job, score, status="complete", **more):
    """What a finished trial leaves."""
    about = {
        **job.labels,
        "status": status,
        "error": None,
        "run": job.run,
        "scores": {"world": score},
        "seconds": {"total": 1.0, "evaluate": 2.0, "train": 1.0, "load": 0.0},
        "visual_tokens": 16,
        "parameters": {"trained": 100, "frozen": 10},
        "curve": [],
    }
    return about | more


class FakePool:
    """Runs `size` trials at once; the one that was started first ends first.

    Args:
        score: takes a run; gives an accuracy, a list of one accuracy for each rung and the last, or an exception.
    """

    def __init__(self, score, size=1, say=print):
        self.score = score
        self.size = size
        self.execution = Execution()
        self.queue = deque()
        self.waiting = {}
        self.answers = {}
        self.started: list[str] = []
        self.finished: list[str] = []
        self.told: list = []
        self.stopped = self.closed = False
        self.on_event = lambda pool: None
        self.keys: list[Key] = []
        self.alike: list[int] = []
        self.warm_keys = frozenset()

    @property
    def free(self):
        return self.size - len(self.queue) - len(self.waiting)

    def warm(self):
        return self.warm_keys

    def takes(self, key):
        return 1.0

    def rest(self):
        pass

    def submit(self, job, key):
        self.started.append(job.labels["trial"])
        self.keys.append(key)
        self.alike.append(job.alike)
        self.queue.append((job, 0))

    def events(self, seconds):
        self.on_event(self)
        if self.told:
            told, self.told = self.told, []
            return told
        if not self.queue:
            return []
        job, rung = self.queue.popleft()
        name = job.labels["trial"]
        if self.stopped:
            return [Ended(name, "stopped")]
        result = self.score(RunConfig.model_validate(job.run), job)
        if isinstance(result, Ended):
            return [result]
        if isinstance(result, Exception):
            return [Ended(name, "failed", error=f"Traceback\n{type(result).__name__}: {result}")]
        if isinstance(result, list):
            if rung < len(job.rungs):
                self.waiting[name] = (job, rung)
                value = result[rung]
                scores = tuple(value) if isinstance(value, list) else (value,) * 4
                return [Reported(name, rung, job.rungs[rung], scores)]
            result = result[-1]
        manifest = manifest_of(job, result)
        write_json(Path(job.folder) / MANIFEST, manifest)
        self.finished.append(name)
        return [Ended(name, "complete", manifest)]

    def answer(self, trial, go_on):
        job, rung = self.waiting.pop(trial)
        self.answers.setdefault(trial, []).append(go_on)
        if go_on:
            self.queue.append((job, rung + 1))
            return
        manifest = manifest_of(job, None, "pruned", rung=rung)
        write_json(Path(job.folder) / MANIFEST, manifest)
        self.told.append(Ended(trial, "pruned", manifest))

    def stop(self, trials=None):
        self.stopped = True

    def kill(self, trial, reason):
        self.told.append(Ended(trial, "failed", error=reason))

    def progress(self):
        return {}

    def close(self):
        self.closed = True


def statuses(folder: Path) -> dict[str, str]:
    """Of each trial in a study's folder."""
    return {path.parent.name: read_json(path)["status"] for path in (folder / "trials").glob(f"*/{MANIFEST}")}


RUN = {
    "vision": {"encoders": [{"name": "blind", "grid": [4, 4]}], "adapter": "mlp"},
    "llm": {"name": "causal", "shape": {"width": 32, "depth": 1, "heads": 2, "kv_heads": 1, "mlp_width": 32}},
    "stages": [
        {
            "name": "pretrain",
            "data": {"name": "world", "task": "captions", "size": 4},
            "train": ["adapter"],
            "lr": 1e-3,
            "batch_size": 2,
        }
    ],
    "evaluate": [{"name": "world", "size": 4}],
}
STUDY = {
    "name": "tiny",
    "base": "run.yaml",
    "factors": {"vision.adapter": ["mlp", "linear"], "stages.pretrain.lr": {"slow": 1e-4, "fast": 1e-2}},
    "seeds": [0, 1],
}


def score(run, job):
    """Better for linear and for fast, with a little for each seed."""
    return 0.5 + 0.2 * (run.vision.adapter.name == "linear") + 0.1 * (run.stages[0].lr > 1e-3) + 0.01 * run.seed


PLAIN = Options()


PLAIN = Options()


class Bench:
    """A study's file and folder, and calls of it."""

    def __init__(self, folder):
        self.folder = folder
        self.out = folder / "out"
        self.said: list[str] = []
        self.pool = None
        (folder / "run.yaml").write_text(yaml.safe_dump(RUN, sort_keys=False))

    def write(self, **change):
        self.study = STUDY | change
        self.path = self.folder / "study.yaml"
        self.path.write_text(yaml.safe_dump(self.study, sort_keys=False))
        return self

    def sweep(self, options=PLAIN, *, score=score, size=1, on_event=None, pool=None):
        self.said = []
        self.pool = pool or FakePool(score, size)
        self.pool.on_event = on_event or (lambda pool: None)
        return sweep(self.path, self.out, options, self.said.append, lambda state, say: self.pool)

    def trials(self, name="tiny"):
        storage = JournalStorage(JournalFileBackend(str(self.out / "optuna.journal")))
        return optuna.load_study(study_name=name, storage=storage).trials

    def states(self, name="tiny"):
        return [trial.state.name for trial in self.trials(name)]

    @property
    def plan(self):
        return json.loads((self.out / "study.json").read_text())
