"""The stages of a run in order: each is trained, taken up, or found finished."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chiasm.config import Part, RunConfig, resolve
from chiasm.vlm import VLM
from chiasm_experiments.data.feed import Feed
from chiasm_experiments.data.mixture import Mixture
from chiasm_experiments.loggers import Listeners
from chiasm_experiments.training.checkpoint import Checkpoints
from chiasm_experiments.training.files import (
    METRICS,
    MetricsLog,
    has_parts,
    load_parts,
    read_json,
    remove_partial,
    save_parts,
    write_json,
)
from chiasm_experiments.training.guide import Guide
from chiasm_experiments.training.identity import stage_key
from chiasm_experiments.training.meter import Metrics
from chiasm_experiments.training.operations import ModelOperations, device_peak
from chiasm_experiments.training.packing import Packing
from chiasm_experiments.training.precision import compute_dtype
from chiasm_experiments.training.rungs import PrunedError, Rungs
from chiasm_experiments.training.shared import Claim, claim, refer, stage_folder
from chiasm_experiments.training.sight import Sight
from chiasm_experiments.training.stage import train_stage
from chiasm_experiments.training.strategy import Strategy
from chiasm_experiments.training.workers import Workers

if TYPE_CHECKING:
    from chiasm_experiments.training.run import Job

RESULT = "result.json"


@dataclass(frozen=True, slots=True)
class Stages:
    """All that training a run's stages takes.

    Args:
        job: the run as it was asked for.
        run: its configuration.
        vlm: its model, on the device.
        mixtures: the data of each stage.
        feed: makes batches.
        workers: this worker among all.
        strategy: how they share the work.
        guide: told of every step, and asked whether to stop.
        rungs: of the last stage; None: it has none.
        listeners: told of every step, too.
        environment: versions, which a shared result's key holds.
    """

    job: Job
    run: RunConfig
    vlm: VLM
    mixtures: Sequence[Mixture]
    feed: Feed
    workers: Workers
    strategy: Strategy
    guide: Guide
    rungs: Rungs | None
    listeners: Listeners
    environment: dict[str, Any]

    def train(self) -> Iterator[dict[str, Any]]:
        """What each stage cost, once it is finished; leaves the model as the last one leaves it.

        Raises:
            PrunedError: the guide ended the run at a rung of the last stage, which leaves nothing.
            StoppedError: the guide stopped the run.
        """
        with contextlib.ExitStack() as files:
            log = files.enter_context(MetricsLog(Path(self.job.folder) / METRICS)) if self.workers.first else None
            for index in range(len(self.run.stages)):
                yield self._stage(index, log)

    def _stage(self, index: int, log: MetricsLog | None) -> dict[str, Any]:
        own = Path(self.job.folder) / "stages" / self.run.stages[index].name
        job, store = self.job, self.job.execution.stages_folder
        if has_parts(stage_folder(own)):
            result = self._read(stage_folder(own))
        elif store is None or (job.shared_stages is not None and index >= job.shared_stages):
            result = self._train(index, own, log)
        else:
            result = self._shared(index, own, store, log)
        # told by the result, not by what this process did: a run that was killed later has trained it all the same
        result |= {"shared": result.get("trained_by", job.folder) != job.folder}
        if self.workers.first:
            folder = Path(job.folder)
            self.listeners.tell("chiasm_stage_ended", folder=folder, stage=result["name"], result=result)
        return result

    def _shared(self, index: int, own: Path, store: Path, log: MetricsLog | None) -> dict[str, Any]:
        """A stage that other runs have too: trained by one of them, and found by all others."""
        name, parts = self.run.stages[index].name, sorted(random_parts(self.run))
        dtype = compute_dtype(self.run, self.workers.device)
        key = stage_key(self.run, index, self.mixtures, dtype, self.environment, parts)
        waiting = partial(self.guide.progress, f"{name} (another run trains it)", 0, 1, {})
        with claim(store, key, self.workers, waiting, self.guide.stopping) as stage:
            trained = not stage.finished
            if trained:
                self._train(index, stage.folder, log, stage)
            kept = stage.publish()
        if log is not None:
            if not trained:
                log.take(name, stage.result / METRICS)
            refer(own, key, stage.result)
        # another's result may have been there first, and all runs go on from the same
        return read_json(stage.result / RESULT) if trained and kept else self._read(stage.result)

    def _train(self, index: int, folder: Path, log: MetricsLog | None, shared: Claim | None = None) -> dict[str, Any]:
        """Trains a stage into a folder, from its newest checkpoint there."""
        stage, workers, job = self.run.stages[index], self.workers, self.job
        with contextlib.ExitStack() as files:
            logs = [log] if log is not None else []
            if log is not None and shared is not None:
                log.take(stage.name, folder / METRICS)  # the steps of a run that died
                logs.append(files.enter_context(MetricsLog(folder / METRICS)))

            def on_step(step: int, steps: int, metrics: Metrics) -> None:
                for file in logs:
                    file.write(stage.name, step, metrics)
                if shared is not None:
                    shared.alive()
                self.guide.progress(stage.name, step, steps, metrics)
                values = {"folder": Path(job.folder), "stage": stage.name, "step": step, "metrics": metrics}
                self.listeners.tell("chiasm_metrics", **values)

            if workers.first:
                remove_partial(folder)
            checkpoints = Checkpoints(folder, workers, job.execution.checkpoint_seconds)
            files.callback(checkpoints.close)
            loaders = job.execution.loaders(workers.device)
            try:
                ended = train_stage(
                    self.vlm,
                    self.run,
                    index,
                    self.mixtures[index],
                    self.feed,
                    workers,
                    on_step,
                    loaders,
                    checkpoints,
                    sight=self._sight(index),
                    activation_checkpointing=job.execution.activation_checkpointing,
                    strategy=self.strategy,
                    packing=Packing.choose(job.execution.pack, self.vlm.llm, workers.device),
                    guide=self.guide,
                    rungs=self.rungs if index == len(self.run.stages) - 1 else None,
                )
            except PrunedError:
                checkpoints.clear()
                if workers.first and shared is not None:
                    shutil.rmtree(folder)
                raise
            result = {"name": stage.name, "train": list(stage.train), **asdict(ended)}
            result["trained_by"] = job.folder
            if workers.first:
                write_json(folder / RESULT, result)
            parts = _parts_to_save(self.run, index)
            save_parts(self.vlm, folder, parts, random_parts(self.run), write=workers.first)
            checkpoints.clear()
            workers.barrier()
        return result

    def _sight(self, index: int) -> Sight:
        """What is measured of a stage; the profile is of the first stage on the first worker."""
        peak = device_peak(self.workers.device, compute_dtype(self.run, self.workers.device))
        needed = ModelOperations(self.vlm, self.run, self.run.stages[index]) if peak else None
        traced = self.job.execution.profile if index == 0 and self.workers.first else 0
        return Sight(needed, peak, traced, Path(self.job.folder) / "profile")

    def _read(self, folder: Path) -> dict[str, Any]:
        """Reads a finished stage into the model."""
        load_parts(self.vlm, folder)
        result: dict[str, Any] = read_json(folder / RESULT)
        return result


def random_parts(run: RunConfig) -> set[Part]:
    """The encoders and the language model where they start from no checkpoint."""
    parts: set[Part] = set()
    if any(resolve("encoder", ref)[1].pretrained is None for ref in run.vision.encoders):
        parts.add("encoders")
    if resolve("llm", run.llm)[1].pretrained is None:
        parts.add("llm")
    return parts


def _parts_to_save(run: RunConfig, index: int) -> list[Part]:
    """Every part whose weights stand nowhere else: trained so far, new, or random."""
    parts = random_parts(run)
    parts |= {"fusion", "adapter", "tokens"}
    for stage in run.stages[: index + 1]:
        parts |= set(stage.train)
    return sorted(parts)
