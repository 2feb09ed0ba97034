"""Where trials run: Ray actors that are reused for one-worker trials, `TorchTrainer` for several workers.

Both execute the same training function. A one-worker trial runs in Ray Train's local mode inside its actor, so the
next trial starts at once and frozen parts stay loaded.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import ray

from chiasm_experiments.study.settings import Resources
from chiasm_experiments.training.execution import Execution
from chiasm_experiments.training.guide import Unguided
from chiasm_experiments.training.run import Job


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a trial ended: its manifest, or the traceback of its error, or the loss of its worker."""

    trial: str
    manifest: dict[str, Any] | None = None
    error: str | None = None
    lost: bool = False
    """The worker died, so the trial may be tried again."""


@ray.remote(num_cpus=0)
class Board:
    """The newest progress of each trial, posted by workers and read by the driver."""

    def __init__(self) -> None:
        self.lines: dict[str, str] = {}

    def post(self, trial: str, line: str) -> None:
        """Replaces a trial's line."""
        self.lines[trial] = line

    def read(self) -> dict[str, str]:
        """All lines."""
        return self.lines


class Poster(Unguided):
    """Posts progress at most once a second, and never waits for the board."""

    def __init__(self, board: Any, trial: str) -> None:
        self.board = board
        self.trial = trial
        self.posted = 0.0

    def progress(self, what: str, step: int, steps: int, metrics: Mapping[str, float]) -> None:
        """Takes what a `Guide` is told."""
        now = time.monotonic()
        if self.board is not None and now - self.posted > 1:
            self.posted = now
            loss_text = f" loss {metrics['loss']:.3f}" if metrics else ""
            self.board.post.remote(self.trial, f"{what} {step}/{steps}{loss_text}")


def train_loop(config: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train runs on each worker."""
    import torch

    from chiasm_experiments.training.run import execute

    job, warm = Job(**config["job"]), config.get("warm")
    if config.get("threads"):
        torch.set_num_threads(config["threads"])
    return execute(job, Poster(config["board"], job.labels["trial"]), warm)


@ray.remote
class TrialActor:
    """Executes one-worker trials one after the other, keeping frozen parts loaded."""

    def __init__(self, threads: int, memo_bytes: int) -> None:
        from chiasm_experiments.data.feed import FeatureMemo
        from chiasm_experiments.training.cache import WarmParts

        self.threads = threads
        self.warm = WarmParts(FeatureMemo(memo_bytes))

    def run(self, job: Job, board: Any) -> tuple[dict[str, Any] | None, str | None]:
        """The manifest, or the traceback of the trial's own error."""
        from ray.train import ScalingConfig
        from ray.train.torch import TorchTrainer

        config = {"job": asdict(job), "board": board, "warm": self.warm, "threads": self.threads}
        try:
            use_gpu = bool(ray.get_gpu_ids())
            scaling = ScalingConfig(num_workers=0, use_gpu=use_gpu)
            result = TorchTrainer(train_loop, train_loop_config=config, scaling_config=scaling).fit()
        except Exception:
            return None, traceback.format_exc()
        return result.return_value, None


@ray.remote(num_cpus=0)
class TrainerActor:
    """Drives trials on several workers; holds no resource itself, so that it cannot starve its own workers."""

    def run(self, job: Job, board: Any, resources: Resources, gpus: float) -> tuple[dict[str, Any] | None, str | None]:
        """The manifest, or the traceback of the trial's own error."""
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        per_worker = {"CPU": resources.cpus_per_worker} | ({"GPU": gpus} if gpus else {})
        scaling = ScalingConfig(num_workers=resources.workers, use_gpu=bool(gpus), resources_per_worker=per_worker)
        # whole GPUs speak NCCL; workers on the CPU or that share a device must not
        backend = TorchConfig(backend="nccl" if gpus >= 1 else "gloo")
        failure = FailureConfig(max_failures=resources.retries, controller_failure_limit=1)
        # the trial's own folder, so that no run of another trial can be taken for this one
        run_config = RunConfig(name="ray", storage_path=job.folder, failure_config=failure)
        config = {"job": asdict(job), "board": board, "threads": max(1, int(resources.cpus_per_worker))}
        try:
            trainer = TorchTrainer(
                train_loop,
                train_loop_config=config,
                scaling_config=scaling,
                run_config=run_config,
                torch_config=backend,
            )
            result = trainer.fit()
        except Exception:
            return None, traceback.format_exc()
        return result.return_value, None


class Pool:
    """As many trials at once as the cluster holds.

    Args:
        resources: what a trial takes.
        memo_bytes: memory of each actor for features of frozen encoders.
    """

    def __init__(self, resources: Resources, memo_bytes: int = 2**30) -> None:
        self.resources = resources
        self.memo_bytes = memo_bytes
        total = ray.cluster_resources()
        self.gpus = _gpus(resources, total)
        self.size = _slots(resources, self.gpus, total)
        self.board = Board.remote()  # type: ignore[attr-defined]
        self.idle: list[Any] = []
        self.running: dict[Any, tuple[str, Any]] = {}

    @property
    def free(self) -> int:
        """Trials that could start now."""
        return self.size - len(self.running)

    @property
    def execution(self) -> Execution:
        """How each trial is executed, with loader processes as its share of the machine allows."""
        execution = self.resources.execution
        if execution.loader_workers != "auto":
            return execution
        loaders = max(1, min(8, int(self.resources.cpus_per_worker) - 1)) if self.gpus else 0
        return execution.model_copy(update={"loader_workers": loaders})

    def submit(self, job: Job) -> None:
        """Starts a trial on an idle actor, or on a new one."""
        actor = self.idle.pop() if self.idle else self._new()
        if self.resources.workers == 1:
            reference = actor.run.remote(job, self.board)
        else:
            reference = actor.run.remote(job, self.board, self.resources, self.gpus)
        self.running[reference] = (job.labels["trial"], actor)

    def wait(self, seconds: float) -> Iterator[Outcome]:
        """The trials that end within a time."""
        done, _ = ray.wait(list(self.running), num_returns=1, timeout=seconds)
        for reference in done:
            trial, actor = self.running.pop(reference)
            try:
                manifest, error = ray.get(reference)
            except ray.exceptions.RayTaskError as own:  # raised by our own code around the trial
                self.idle.append(actor)
                yield Outcome(trial, error=str(own))
            except ray.exceptions.RayError as lost:
                ray.kill(actor)
                yield Outcome(trial, error=f"its worker died: {lost}", lost=True)
            else:
                self.idle.append(actor)
                yield Outcome(trial, manifest, error)

    def progress(self) -> dict[str, str]:
        """The newest line of each running trial."""
        lines = ray.get(self.board.read.remote())
        names = [trial for trial, _ in self.running.values()]
        return {name: lines.get(name, "starting") for name in names}

    def close(self) -> None:
        """Ends all actors."""
        for actor in [*self.idle, *(actor for _, actor in self.running.values()), self.board]:
            ray.kill(actor)
        self.idle.clear()
        self.running.clear()

    def _new(self) -> Any:
        if self.resources.workers > 1:
            return TrainerActor.remote()  # type: ignore[attr-defined]
        cpus = self.resources.cpus_per_worker
        options = TrialActor.options(num_cpus=cpus, num_gpus=self.gpus)  # type: ignore[attr-defined]
        return options.remote(max(1, int(cpus)), self.memo_bytes)


def _gpus(resources: Resources, total: dict[str, float]) -> float:
    if resources.gpus_per_worker == "auto":
        return 1 if total.get("GPU") else 0
    return resources.gpus_per_worker


def _slots(resources: Resources, gpus: float, total: dict[str, float]) -> int:
    """How many trials fit at once.

    Raises:
        ConfigError: not even one does, which would wait for ever.
    """
    from chiasm.errors import ConfigError

    needed = {"CPU": resources.cpus_per_worker * resources.workers, "GPU": gpus * resources.workers}
    fits = [int(total.get(name, 0) / amount + 1e-9) for name, amount in needed.items() if amount]
    if min(fits) < 1:
        have = {name: total.get(name, 0) for name in needed}
        raise ConfigError(
            f"resources: a trial takes {needed}, the cluster has {have}; lower workers or what each takes"
        )
    return min(fits) if resources.concurrent == "auto" else min(*fits, resources.concurrent)
