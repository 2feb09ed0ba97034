"""One stage of training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from chiasm.config import RunConfig, StageConfig
from chiasm.errors import ChiasmError
from chiasm.vlm import VLM
from chiasm_experiments.data.feed import Example, Feed
from chiasm_experiments.data.loader import load_steps
from chiasm_experiments.data.mixture import Mixture
from chiasm_experiments.data.order import Order
from chiasm_experiments.training.checkpoint import Checkpoints, Learner, Position
from chiasm_experiments.training.execution import Choice
from chiasm_experiments.training.guide import Guide, StoppedError, Unguided
from chiasm_experiments.training.memory import explained, fit_memory
from chiasm_experiments.training.meter import Metrics
from chiasm_experiments.training.optim import make_optimizer, make_schedule
from chiasm_experiments.training.packing import PADDED, Packing
from chiasm_experiments.training.precision import autocast
from chiasm_experiments.training.rungs import Rungs
from chiasm_experiments.training.sight import NOTHING, Sight
from chiasm_experiments.training.strategy import Alone, Sharded, Strategy, idle_batch
from chiasm_experiments.training.workers import Workers

OnStep = Callable[[int, int, Metrics], None]
"""Called on the first worker with each step (from 1), the steps in all, and the metrics: in order, and on a GPU a
little later than the step itself."""


class DivergedError(ChiasmError):
    """The loss is no longer a finite number."""


@dataclass(frozen=True, slots=True)
class StageResult:
    """What a stage cost and came to."""

    steps: int
    samples: int
    supervised_tokens: int
    cut_positions: int
    """Positions of samples that the context's length cost."""
    first_loss: float
    last_loss: float
    """Mean over the last tenth of the steps."""
    seconds: float
    micro_batch: int
    """Samples of one forward pass on one worker."""
    activation_checkpointing: bool


def train_stage(
    vlm: VLM,
    run: RunConfig,
    index: int,
    samples: Mixture,
    feed: Feed,
    workers: Workers,
    on_step: OnStep,
    loader_workers: int = 0,
    checkpoints: Checkpoints | None = None,
    sight: Sight = NOTHING,
    activation_checkpointing: Choice = "auto",
    strategy: Strategy | None = None,
    packing: Packing = PADDED,
    guide: Guide | None = None,
    rungs: Rungs | None = None,
) -> StageResult:
    """Trains the parts that a stage names, in place; goes on from its newest checkpoint where it has one.

    The loss of a step is the mean over its supervised tokens, whatever the micro-batch and the number of workers:
    every micro-batch contributes its sum divided by the count of the whole step, and gradients are added.

    Args:
        vlm: trained in place.
        run: that the stage belongs to.
        index: of the stage.
        samples: of its data sets.
        feed: makes batches.
        workers: that train together.
        on_step: told of each step.
        loader_workers: processes that make samples ready.
        checkpoints: of this stage; None: none are written.
        sight: what is measured and traced.
        activation_checkpointing: of the language model's blocks.
        strategy: how the workers share the work; None: there is one worker.
        packing: when the samples of a forward pass become one row.
        guide: whose first worker's word stops all workers after the same step; None: nobody's does.
        rungs: of this stage.

    Raises:
        StoppedError: the guide said so; a checkpoint holds the stage as it is.
        PrunedError: the guide ended the run at a rung.
        DivergedError: the loss is not finite.
        DataError: a sample cannot be used; the message names it.
    """
    stage = run.stages[index]
    order = Order(len(samples), stage.batch_size, run.seed, index)
    steps = stage.steps or order.steps(stage.epochs)
    vlm.set_trained(stage.train)
    vlm.train()
    strategy = strategy or Alone(workers, vlm)
    guide = guide or Unguided()
    forward = strategy.stage()
    shards = isinstance(strategy, Sharded)
    fit = fit_memory(vlm, run, index, samples, feed, workers, activation_checkpointing, shards=shards)
    optimizer = make_optimizer(vlm, stage)
    schedule = make_schedule(optimizer, stage, steps)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    # dropout draws from torch's global generator; the stage's draws depend on nothing that ran before
    torch.manual_seed(run.seed * 1009 + index * 101 + workers.rank)

    learner = Learner(vlm, stage, optimizer, schedule)
    position = checkpoints.load(learner) if checkpoints else Position()
    spent, started = position.seconds, time.perf_counter()
    meter = sight.meter(workers.device)

    def report(finished: Iterable[tuple[int, Metrics]]) -> None:
        for step, metrics in finished:
            if not math.isfinite(metrics["loss"]):
                raise DivergedError(
                    f"stage {stage.name!r}: the loss is {metrics['loss']} at step {step} of {steps}; lower lr "
                    f"({stage.lr}), lengthen the warm-up, or set clip_norm"
                )
            position.losses.append(metrics["loss"])
            if workers.first:
                on_step(step, steps, metrics)

    if rungs is not None:
        rungs.take_up(position, steps)
    todo = range(position.step, steps)
    share = (order.step(step)[workers.rank :: workers.size] for step in todo)
    given = zip(todo, load_steps(share, samples, feed, workers.device, loader_workers), strict=True)
    for step, examples in sight.traced(given, len(todo), workers.device):
        meter.begin()
        prompts = [example.prompt for example in examples]
        tokens, cut, positions = workers.sums(
            sum(p.supervised for p in prompts), sum(p.cut for p in prompts), sum(map(len, prompts))
        )
        position.cut_positions += int(cut)
        # on the device, which goes on meanwhile; in float64, as many sums are added
        loss_sum = torch.zeros((), dtype=torch.float64, device=workers.device)
        size = fit.micro_batch
        parts = [examples[first : first + size] for first in range(0, len(examples), size)]
        idle = max(0, strategy.rounds(len(parts)) - len(parts))
        for i, part in enumerate([*parts, *[[]] * idle]):
            pad = packing.pad([len(example.prompt) for example in part]) if part else "right"
            batch = feed.batch(part, workers.device, pad=pad) if part else idle_batch(workers.device)
            with explained(stage, fit), strategy.micro_batch(last=i + 1 == len(parts) + idle):
                with autocast(run, workers.device):
                    loss, _ = forward(batch)
                torch.autograd.backward(loss / tokens)
            loss_sum += loss.detach()
        strategy.finish(trained)
        rate = optimizer.param_groups[0]["lr"]
        with explained(stage, fit):
            norm = strategy.clip(trained, stage.clip_norm)
            optimizer.step()  # the first one takes memory for what it keeps
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        position.step = step + 1
        position.supervised_tokens += int(tokens)
        position.seconds = spent + time.perf_counter() - started
        meter.end(
            step + 1,
            loss=workers.total(loss_sum) / tokens,
            gradient_norm=norm,
            lr=rate,
            tokens=tokens,
            samples=stage.batch_size,
            positions=positions,
            flops=sight.needed(examples),
        )
        report(meter.ready())
        if step + 1 == steps:
            break  # the whole stage is saved
        if rungs is not None and step + 1 in rungs.steps(steps).values():
            report(meter.flush())
            paused = time.perf_counter()
            rungs.reach(position, steps)
            started += time.perf_counter() - paused
            meter.restart()
        due, stop = workers.sums(
            workers.first and checkpoints is not None and checkpoints.due(), workers.first and guide.stopping()
        )
        if due or stop:
            report(meter.flush())  # a checkpoint claims no step whose metrics could be lost
            if checkpoints is not None:
                checkpoints.write(learner, position)
        if stop:
            if checkpoints is not None:
                checkpoints.wait()
            workers.barrier()
            raise StoppedError(f"stage {stage.name!r} was stopped after step {step + 1} of {steps}")
    report(meter.flush())
    losses = position.losses
    tail = losses[-max(1, len(losses) // 10) :]
    return StageResult(
        steps=steps,
        samples=steps * stage.batch_size,
        supervised_tokens=position.supervised_tokens,
        cut_positions=position.cut_positions,
        first_loss=losses[0],
        last_loss=sum(tail) / len(tail),
        seconds=position.seconds,
        micro_batch=fit.micro_batch,
        activation_checkpointing=fit.checkpointing,
    )


def check_stage(stage: StageConfig, feed: Feed, samples: Mixture, probe: int = 4) -> list[Example]:
    """Makes a few samples ready, so that data that cannot be used fails before any training; gives those.

    Raises:
        DataError: a sample cannot be used; the message names it.
    """
    last = len(samples) - 1
    places = sorted({round(i * last / max(1, probe - 1)) for i in range(probe)})
    return [feed.train(samples[place]) for place in places]
