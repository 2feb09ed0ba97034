"""The training function: every run, on one worker or many, from `chiasm train` or from a study, goes through here."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from chiasm.build import build_vlm
from chiasm.config import RunConfig
from chiasm.errors import ConfigError
from chiasm.prompt import PromptBuilder
from chiasm.vlm import VLM
from chiasm_experiments.data.feed import FeatureMemo, Feed
from chiasm_experiments.data.mixture import Mixture, load_mixture
from chiasm_experiments.data.order import Order
from chiasm_experiments.data.store import FeatureStore
from chiasm_experiments.evaluation import evaluate, load_benchmarks, scores, write_rows
from chiasm_experiments.loggers import Listeners, chosen
from chiasm_experiments.training import environment
from chiasm_experiments.training.cache import WarmParts, content_identity
from chiasm_experiments.training.caching import CacheDecision, decide
from chiasm_experiments.training.choice import choose
from chiasm_experiments.training.compiling import compile_model
from chiasm_experiments.training.execution import Execution
from chiasm_experiments.training.files import (
    MANIFEST,
    QUESTIONS,
    RUN,
    load_parts,
    read_json,
    remove_partial,
    write_json,
)
from chiasm_experiments.training.overview import overview
from chiasm_experiments.training.shared import stage_folder
from chiasm_experiments.training.stage import check_stage
from chiasm_experiments.training.stages import Progress, Stages
from chiasm_experiments.training.workers import Workers


@dataclass(frozen=True, slots=True)
class Job:
    """One run to execute, as it travels to a worker.

    Args:
        run: a `RunConfig` as plain values, paths absolute.
        folder: absolute; where the run's files go.
        labels: what identifies the run in its study: `trial`, `cell`, `study`.
        execution: where its time and memory go.
        shared_stages: how many of its first stages are shared through `execution.stages_folder`; None: all.
        memo_bytes: memory for features of frozen encoders; used where no loader process runs.
        command: what the user ran, which on a worker is another.
    """

    run: dict[str, Any]
    folder: str
    labels: dict[str, Any]
    execution: Execution = field(default_factory=Execution)
    shared_stages: int | None = None
    memo_bytes: int = 2**30
    command: list[str] = field(default_factory=environment.command)


def check_data(run: RunConfig) -> None:
    """Looks at every data set and benchmark of a run, before anything is loaded.

    Raises:
        DataError: one is missing, empty or unreadable.
    """
    for stage in run.stages:
        for dataset in load_mixture(stage.data).datasets:
            dataset.check()
    for benchmark in load_benchmarks(run.evaluate).values():
        benchmark.check()


def execute(job: Job, progress: Progress, warm: WarmParts | None = None) -> dict[str, Any]:
    """Trains the stages of a run, evaluates it, and returns its manifest. Called on every worker.

    What is finished is not done again: a complete run returns its manifest, a finished stage is read from its files.

    Raises:
        ConfigError: the folder holds another run.
        ChiasmError: data or weights cannot be used.
    """
    workers = Workers.current()
    run = RunConfig.model_validate(job.run)
    manifest = _earlier(run, Path(job.folder))
    if manifest is not None:
        return manifest
    loggers = job.execution.loggers
    with Listeners(chosen(loggers) if workers.first else (), asked=loggers != "auto") as listeners:
        return _execute(job, run, workers, progress, warm, listeners)


def _execute(
    job: Job, run: RunConfig, workers: Workers, progress: Progress, warm: WarmParts | None, listeners: Listeners
) -> dict[str, Any]:
    folder = Path(job.folder)
    if workers.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(workers.device)
    started = time.perf_counter()
    warm = warm or WarmParts(FeatureMemo(job.memo_bytes))
    warm.retain(run)
    vlm = build_vlm(run, partial(warm.load, run))
    strategy, why = choose(job.execution, run, vlm, workers)
    strategy.place(run)
    loaders = job.execution.loaders(workers.device)
    mixtures = [load_mixture(stage.data) for stage in run.stages]
    in_study = job.labels.get("study") is not None
    cache = decide(vlm, run, job.execution, mixtures, in_study, workers, partial(make_feed, vlm, run, None))
    feed = make_feed(vlm, run, warm.memo if loaders == 0 and cache.allowed else None, cache.store, cache.share)
    kept = any(features.memo is not None or features.shelf is not None for features in feed.features)
    compiled = compile_model(vlm, job.execution.compile, workers.device, _steps(run, mixtures), live=not kept)
    for stage, mixture in zip(run.stages, mixtures, strict=True):
        check_stage(stage, feed, mixture)
    benchmarks = load_benchmarks(run.evaluate)
    manifest = _begin(job, run, vlm, workers, {"name": strategy.name, "why": why}, cache)
    manifest["compiled"] = compiled
    if workers.first:
        listeners.tell("chiasm_run_started", folder=folder, manifest=manifest)
    loaded = time.perf_counter()
    stages = Stages(
        job, run, vlm, mixtures, feed, workers, strategy, progress, listeners, manifest["environment"]
    ).train()
    trained = time.perf_counter()

    if workers.first:
        progress("evaluate", 0, 1, {})
    with strategy.whole():  # workers answer different numbers of questions, at lengths of their own
        rows = evaluate(vlm, run, feed, benchmarks, workers)
    feed.close()
    ended = time.perf_counter()
    manifest |= {
        "status": "complete",
        "stages": stages,
        "seconds": {
            "load": loaded - started,
            "train": sum(stage["seconds"] for stage in stages),
            "shared": sum(stage["seconds"] for stage in stages if stage["shared"]),
            "evaluate": ended - trained,
            "total": ended - started,
        },
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(workers.device) if workers.device.type == "cuda" else None,
        "scores": scores(rows),
    }
    if workers.first:
        write_rows(folder / QUESTIONS, rows)
        write_json(folder / MANIFEST, manifest)  # last: a folder with a complete manifest has everything
        listeners.tell("chiasm_run_ended", folder=folder, manifest=manifest)
    workers.barrier()
    return manifest


def load_run_folder(folder: Path) -> tuple[RunConfig, VLM]:
    """The configuration and the trained model of a finished run, on the CPU in float32.

    Raises:
        CheckpointError: the folder holds no finished run.
    """
    run = RunConfig.model_validate(read_json(folder / RUN))
    vlm = build_vlm(run)
    load_parts(vlm, stage_folder(folder / "stages" / run.stages[-1].name))
    vlm.set_trained(())
    return run, vlm.eval()


def make_feed(
    vlm: VLM, run: RunConfig, memo: FeatureMemo | None = None, store: FeatureStore | None = None, share: float = 1.0
) -> Feed:
    """What turns samples into batches for a model on its device.

    Args:
        vlm: placed; its encoders stay as they are where features are kept.
        run: the run.
        memo: where this process keeps features; None: nowhere.
        store: where the machine keeps features; None: nowhere.
        share: of the images that the store keeps.
    """
    builder = PromptBuilder(vlm.llm, run.tokens, vlm.visual_tokens, run.system)
    encoders: list[Any] = list(vlm.encoders)
    kept = memo is not None or store is not None
    identities = [content_identity(encoder) for encoder in encoders] if kept else []
    return Feed(vlm, builder, memo, identities, store, share)


def _earlier(run: RunConfig, folder: Path) -> dict[str, Any] | None:
    """The manifest of this run if the folder holds it complete.

    Raises:
        ConfigError: the folder holds another run.
    """
    if not (folder / RUN).is_file():
        return None
    if read_json(folder / RUN) != run.model_dump(mode="json"):
        raise ConfigError(f"{str(folder)!r} holds a run with other settings; choose another folder or empty this one")
    if (folder / MANIFEST).is_file():
        manifest: dict[str, Any] = read_json(folder / MANIFEST)
        if manifest["status"] == "complete":
            return manifest
    return None


def _steps(run: RunConfig, mixtures: list[Mixture]) -> int:
    """Optimiser steps of all stages."""
    pairs = zip(run.stages, mixtures, strict=True)
    return sum(
        stage.steps or Order(len(mixture), stage.batch_size, run.seed, i).steps(stage.epochs)
        for i, (stage, mixture) in enumerate(pairs)
    )


def _begin(
    job: Job, run: RunConfig, vlm: VLM, workers: Workers, strategy: dict[str, str], cache: CacheDecision
) -> dict[str, Any]:
    """The manifest as it stands before training."""
    vlm.set_trained(run.trained)
    counts = vlm.counts()
    manifest: dict[str, Any] = {
        **job.labels,
        "seed": run.seed,
        "status": "running",
        "error": None,
        "run": run.model_dump(mode="json"),
        "workers": workers.size,
        "strategy": strategy,
        "visual_tokens": vlm.views.most_tokens,
        "training": overview(vlm, run, workers.device),
        "cache": cache.told,
        "parameters": {
            "trained": sum(count.trained for count in counts),
            "frozen": sum(count.frozen for count in counts),
            "by_part": {count.part: {"trained": count.trained, "frozen": count.frozen} for count in counts},
        },
        "environment": {"command": job.command} | environment.describe(),
    }
    if workers.first:
        folder = Path(job.folder)
        remove_partial(folder)
        write_json(folder / RUN, run.model_dump(mode="json"))
        write_json(folder / MANIFEST, manifest)
    return manifest
