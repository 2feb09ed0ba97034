"""The actors that execute trials: one worker's, reused, and the one that drives several through Ray Train."""

from __future__ import annotations

import gc
import os
import traceback
from dataclasses import asdict, dataclass
from typing import Any, Literal

import ray
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer

from chiasm.errors import ChiasmError
from chiasm_experiments.data.feed import FeatureMemo
from chiasm_experiments.study.hub import HubGuide
from chiasm_experiments.study.settings import Resources
from chiasm_experiments.study.slots import memory_fraction
from chiasm_experiments.training.cache import WarmParts
from chiasm_experiments.training.guide import StoppedError
from chiasm_experiments.training.run import Job, execute
from chiasm_experiments.training.workers import Workers

MEMO_BYTES = 2**30
"""Memory of an actor for features of frozen encoders."""
RAY_TRAIN = {
    # how soon the end of a run on several workers is noticed: the default costs up to some seconds a trial
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # a process more for each run, which imports torch and tells the run of nodes about to go: nothing here listens
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
"""Ray Train's own knobs, as a trial on several workers wants them; what the user has set holds."""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a trial where it ran."""

    status: Literal["complete", "pruned", "stopped", "failed", "lost"]
    manifest: dict[str, Any] | None = None
    error: str | None = None
    reusable: bool = True
    """Whether its process can be trusted with another trial."""
    gpu_bytes: int | None = None
    """Memory of its GPU."""


@ray.remote
class TrialActor:
    """Executes one-worker trials one after the other, keeping frozen parts loaded.

    Args:
        threads: of torch.
        share: of a GPU that other trials use too; None: there is no other.
    """

    def __init__(self, threads: int, share: float | None) -> None:
        torch.set_num_threads(threads)
        self.device = torch.device("cuda", 0) if ray.get_gpu_ids() else torch.device("cpu")
        self.warm = WarmParts(FeatureMemo(MEMO_BYTES))
        self.gpu_bytes = None
        if self.device.type == "cuda":
            self.gpu_bytes = torch.cuda.get_device_properties(self.device).total_memory
            if share is not None:
                torch.cuda.set_per_process_memory_fraction(memory_fraction(share, self.gpu_bytes), self.device)
        gc.collect()
        gc.freeze()  # what was imported stays, and later collections need not look at it

    def run(self, job: Job, hub: Any, ticket: str) -> Result:
        """Executes a trial through Ray Train's local mode, in this process."""
        hub.enter.remote(ticket, 0, os.getpid())
        config = {"job": job, "guide": HubGuide(hub, ticket), "warm": self.warm}
        scaling = ScalingConfig(num_workers=0, use_gpu=self.device.type == "cuda")
        try:
            trainer = TorchTrainer(_train_alone, train_loop_config=config, scaling_config=scaling)
            manifest: dict[str, Any] = trainer.fit().return_value
            return Result(manifest["status"], manifest, gpu_bytes=self.gpu_bytes)
        except StoppedError:
            return Result("stopped")
        except Exception as error:
            # after an error that is not ours, or for want of memory, nobody knows what the process still holds
            clean = isinstance(error, ChiasmError) and not isinstance(error.__cause__, torch.OutOfMemoryError)
            return Result("failed", error=traceback.format_exc(), reusable=clean)
        finally:
            if self.device.type == "cuda":
                gc.collect()  # a model may be in cycles
                torch.cuda.empty_cache()


@ray.remote(num_cpus=0)
class TrainerActor:
    """Drives trials on several workers; holds no resource itself, so that it cannot starve its own workers.

    Args:
        resources: of a trial.
        gpus: of each worker.
    """

    def __init__(self, resources: Resources, gpus: float) -> None:
        for name, value in RAY_TRAIN.items():
            # Ray Train hands what is set in this process on, whatever node of which cluster it is on
            os.environ.setdefault(name, value)
        self.resources = resources
        self.gpus = gpus

    def run(self, job: Job, hub: Any, ticket: str) -> Result:
        """Executes a trial."""
        cpus = self.resources.cpus_per_worker
        per_worker = {"CPU": cpus} | ({"GPU": self.gpus} if self.gpus else {})
        scaling = ScalingConfig(
            num_workers=self.resources.workers, use_gpu=bool(self.gpus), resources_per_worker=per_worker
        )
        # whole GPUs speak NCCL; workers on the CPU or that share a device must not
        backend = TorchConfig(backend="nccl" if self.gpus >= 1 else "gloo")
        # the driver starts a trial again that lost a worker; an error of the trial itself is never tried again
        failure = FailureConfig(max_failures=0, controller_failure_limit=1)
        # the trial's own folder and the ticket, so that no other run's end can be taken for this one's
        run_config = RunConfig(name=f"ray-{ticket.rpartition('#')[2]}", storage_path=job.folder, failure_config=failure)
        config = {"job": asdict(job), "hub": hub, "ticket": ticket, "threads": max(1, int(cpus))}
        try:
            trainer = TorchTrainer(
                train_loop,
                train_loop_config=config,
                scaling_config=scaling,
                run_config=run_config,
                torch_config=backend,
            )
            manifest: dict[str, Any] | None = trainer.fit().return_value
        except TrainingFailedError as error:
            raised: dict[int, str] = ray.get(hub.errors.remote(ticket))
            # a worker that Ray saw fail and that raised nothing died; what others then raised is that they miss it
            died = set(error.worker_failures) - set(raised) if isinstance(error, WorkerGroupError) else set()
            if raised and not died:
                return Result("failed", error=next(iter(raised.values())))
            why = f"its worker {', '.join(map(str, sorted(died))) or 'group'} died: {error}"
            # where its controller fails Ray Train leaves workers behind, GPUs in hand, that end with this process only
            return Result("lost", error=why, reusable=False)
        return Result(manifest["status"], manifest) if manifest is not None else Result("stopped")


def _train_alone(config: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train runs in the actor of a one-worker trial."""
    return execute(config["job"], config["guide"], config["warm"])


def train_loop(config: dict[str, Any]) -> dict[str, Any] | None:
    """What Ray Train runs on each of several workers: the manifest, or None where the trial was stopped."""
    hub, ticket, workers = config["hub"], config["ticket"], Workers.current()
    torch.set_num_threads(config["threads"])
    hub.enter.remote(ticket, workers.rank, os.getpid(), ray.get_runtime_context().current_actor)
    try:
        return execute(Job(**config["job"]), HubGuide(hub, ticket))
    except StoppedError:
        return None
    except Exception:
        ray.get(hub.fail.remote(ticket, workers.rank, traceback.format_exc()))
        raise
