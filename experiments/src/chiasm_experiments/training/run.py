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
from chiasm_experiments.evaluation import Row, evaluate, load_benchmarks, scores, write_rows
from chiasm_experiments.interfaces import Benchmark
from chiasm_experiments.loggers import Listeners, chosen
from chiasm_experiments.training import environment
from chiasm_experiments.training.cache import WarmParts, content_identity
from chiasm_experiments.training.caching import CacheDecision, decide
from chiasm_experiments.training.choice import choose
from chiasm_experiments.training.compiling import (
    ENOUGH_IN_A_STUDY,
    ENOUGH_SECONDS,
    choose_attention,
    compile_model,
    uncompiled_seconds,
)
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
from chiasm_experiments.training.guide import Guide, Measured, StoppedError
from chiasm_experiments.training.overview import overview
from chiasm_experiments.training.rungs import PrunedError, Rungs
from chiasm_experiments.training.shared import stage_folder
from chiasm_experiments.training.stage import check_stage
from chiasm_experiments.training.stages import Stages
from chiasm_experiments.training.strategy import Strategy
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
        alike: runs that want the same features of the same images, this one among them.
        rungs: shares of the last stage's steps, in (0, 1) and rising, at which the run is judged.
        rung_questions: of each benchmark that are asked there.
        memo_bytes: memory for features of frozen encoders; used where no loader process runs.
        command: what the user ran, which on a worker is another.
    """

    run: dict[str, Any]
    folder: str
    labels: dict[str, Any]
    execution: Execution = field(default_factory=Execution)
    shared_stages: int | None = None
    alike: int = 1
    rungs: tuple[float, ...] = ()
    rung_questions: int = 100
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


def execute(job: Job, guide: Guide, warm: WarmParts | None = None, workers: Workers | None = None) -> dict[str, Any]:
    """Trains the stages of a run, evaluates it, and returns its manifest. Called on every worker.

    What is finished is not done again: a complete run returns its manifest, a finished stage is read from its files.
    A run that its guide prunes at a rung has a manifest with the status `pruned` and its learning curve, and stays so
    as long as it is to be judged at rungs.

    Args:
        job: the run.
        guide: is told how far it is, stops and prunes it; on the first worker.
        warm: frozen parts that this process has loaded.
        workers: that train together; None: as Ray Train says.

    Raises:
        StoppedError: the guide stopped the run; called again it goes on.
        ConfigError: the folder holds another run.
        ChiasmError: data or weights cannot be used.
    """
    workers = workers or Workers.current()
    run = RunConfig.model_validate(job.run)
    manifest = _earlier(run, Path(job.folder), pruned=bool(job.rungs))
    if manifest is not None:
        return manifest
    loggers = job.execution.loggers
    with Listeners(chosen(loggers) if workers.first else (), asked=loggers != "auto") as listeners:
        return _execute(job, run, workers, Measured(guide, workers.device), warm, listeners)


def _execute(
    job: Job, run: RunConfig, workers: Workers, guide: Measured, warm: WarmParts | None, listeners: Listeners
) -> dict[str, Any]:
    folder = Path(job.folder)
    if workers.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(workers.device)
    started = guide.started
    if workers.first:
        guide.progress("load", 0, 1, {})
    warm = warm or WarmParts(FeatureMemo(job.memo_bytes))
    warm.retain(run)
    vlm = build_vlm(run, partial(warm.load, run))
    strategy, why = choose(job.execution, run, vlm, workers)
    strategy.place(run)
    loaders = job.execution.loaders(workers.device)
    mixtures = [load_mixture(stage.data) for stage in run.stages]
    cache = decide(vlm, run, job.execution, mixtures, job.alike, workers, partial(make_feed, vlm, run, None))
    feed = make_feed(vlm, run, warm.memo if loaders == 0 and cache.allowed else None, cache.store, cache.share)
    kept = any(features.memo is not None or features.shelf is not None for features in feed.features)
    steps = _steps(run, mixtures)
    some = {stage.name: check_stage(stage, feed, mixture) for stage, mixture in zip(run.stages, mixtures, strict=True)}
    choice, device = job.execution.compile, workers.device
    seconds = uncompiled_seconds(vlm, run, some, steps, device, workers.size, live=not kept)
    enough = ENOUGH_SECONDS if job.labels.get("study") is None else ENOUGH_IN_A_STUDY
    compiled = compile_model(vlm, choice, device, live=not kept, seconds=seconds, enough=enough)
    choose_attention(device, long=choice == "on" or seconds >= enough)
    benchmarks = load_benchmarks(run.evaluate)
    manifest = _begin(job, run, vlm, workers, {"name": strategy.name, "why": why}, cache, steps, guide.began)
    manifest["compiled"] = compiled
    if workers.first:
        listeners.tell("chiasm_run_started", folder=folder, manifest=manifest)
    loaded = time.perf_counter()
    rungs = _rungs(job, run, vlm, cache, benchmarks, workers, strategy, guide) if job.rungs else None
    stages = Stages(job, run, vlm, mixtures, feed, workers, strategy, guide, rungs, listeners, manifest["environment"])
    finished: list[dict[str, Any]] = []
    ended: dict[str, Any] = {"status": "complete"}
    begun = 0.0  # seconds of a stage that is not finished
    try:
        for result in stages.train():  # one by one: those before an error are kept
            finished += [result]
    except PrunedError as pruned:
        assert rungs is not None
        ended = {"status": "pruned", "rung": pruned.rung}
        begun = sum(point["seconds"] for point in rungs.curve if point["rung"] == pruned.rung)
    trained = time.perf_counter()
    if ended["status"] == "complete":
        rows = _evaluate(run, vlm, feed, benchmarks, workers, strategy, guide)
        ended["scores"] = scores(rows)
        if workers.first:
            write_rows(folder / QUESTIONS, rows)
    feed.close()
    evaluated = time.perf_counter()
    manifest |= {
        **ended,
        "stages": finished,
        "curve": rungs.curve if rungs is not None else [],
        "seconds": {
            "load": loaded - started,
            "train": sum(stage["seconds"] for stage in finished) + begun,
            "shared": sum(stage["seconds"] for stage in finished if stage["shared"]),
            "evaluate": evaluated - trained,
            "total": evaluated - started,
        },
        "first_step_seconds": guide.first_step_seconds,
        "gpu_busy": guide.busy.share,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(workers.device) if workers.device.type == "cuda" else None,
    }
    if workers.first:
        write_json(folder / MANIFEST, manifest)  # last: a folder with a complete manifest has everything
        listeners.tell("chiasm_run_ended", folder=folder, manifest=manifest)
    workers.barrier()
    return manifest


def _evaluate(
    run: RunConfig,
    vlm: VLM,
    feed: Feed,
    benchmarks: dict[str, Benchmark],
    workers: Workers,
    strategy: Strategy,
    guide: Guide,
) -> list[Row]:
    """The rows of all questions.

    Raises:
        StoppedError: the guide stopped it.
    """

    def answered(done: int, total: int) -> None:
        if workers.first:
            guide.progress("evaluate", done, total, {})
        if workers.sum(done < total and workers.first and guide.stopping()):
            raise StoppedError(f"the evaluation was stopped after {done} of {total} questions; training is finished")

    with strategy.whole():  # workers answer different numbers of questions, at lengths of their own
        return evaluate(vlm, run, feed, benchmarks, workers, answered=answered)


def _rungs(
    job: Job,
    run: RunConfig,
    vlm: VLM,
    cache: CacheDecision,
    benchmarks: dict[str, Benchmark],
    workers: Workers,
    strategy: Strategy,
    guide: Guide,
) -> Rungs:
    """The rungs of a run, with a feed that leaves nothing in the memory where training's own would find it."""
    feed = make_feed(vlm, run, None, cache.store, cache.share)
    folder, shares, count = Path(job.folder), job.rungs, job.rung_questions
    return Rungs(folder, shares, count, run, feed, benchmarks, workers, strategy, guide)


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


def _earlier(run: RunConfig, folder: Path, *, pruned: bool) -> dict[str, Any] | None:
    """The manifest of this run if the folder holds it complete, or pruned where that counts.

    Raises:
        ConfigError: the folder holds another run.
    """
    if not (folder / RUN).is_file():
        return None
    if read_json(folder / RUN) != run.model_dump(mode="json"):
        raise ConfigError(f"{str(folder)!r} holds a run with other settings; choose another folder or empty this one")
    if (folder / MANIFEST).is_file():
        manifest: dict[str, Any] = read_json(folder / MANIFEST)
        if manifest["status"] == "complete" or (pruned and manifest["status"] == "pruned"):
            return manifest
    return None


def _steps(run: RunConfig, mixtures: list[Mixture]) -> dict[str, int]:
    """Optimiser steps of each stage."""
    pairs = zip(run.stages, mixtures, strict=True)
    return {
        stage.name: stage.steps or Order(len(mixture), stage.batch_size, run.seed, i).steps(stage.epochs)
        for i, (stage, mixture) in enumerate(pairs)
    }


def _begin(
    job: Job,
    run: RunConfig,
    vlm: VLM,
    workers: Workers,
    strategy: dict[str, str],
    cache: CacheDecision,
    steps: dict[str, int],
    started: float,
) -> dict[str, Any]:
    """The manifest as it stands before training."""
    vlm.set_trained(run.trained)
    counts = vlm.counts()
    manifest: dict[str, Any] = {
        **job.labels,
        "seed": run.seed,
        "status": "running",
        "started": started,
        "error": None,
        "run": run.model_dump(mode="json"),
        "workers": workers.size,
        "strategy": strategy,
        "steps": steps,
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
