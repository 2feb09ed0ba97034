"""How much of a step is computed at once, so that a stage fits the memory at hand; results differ by rounding alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor

from chiasm.config import RunConfig, StageConfig
from chiasm.cost import FULL, HALF, LOGIT_BYTES, MOMENT_BYTES, connector_cost, encoder_bytes
from chiasm.encoder import Encoder
from chiasm.errors import ChiasmError
from chiasm.sample import Sample
from chiasm.vlm import LOGITS, VLM
from chiasm_experiments.data.feed import Example, Feed
from chiasm_experiments.data.mixture import Mixture
from chiasm_experiments.training.execution import Choice
from chiasm_experiments.training.precision import autocast
from chiasm_experiments.training.workers import Workers

HEADROOM = 0.08
"""Of the memory, left free: for fragments, for what the optimiser needs for a moment, and for samples longer still."""
SCANNED = 20_000
"""Samples that are looked at to find long ones; their images are not read."""
CHARACTERS = 3
"""Of a token, roughly: to tell which samples are long."""


class MemoryShortError(ChiasmError):
    """A forward and backward pass does not fit the device's memory."""


@dataclass(frozen=True, slots=True)
class MemoryFit:
    """What is computed at once."""

    micro_batch: int
    """Samples of one forward pass on one worker."""
    checkpointing: bool
    """Whether blocks of the language model are computed again in the backward pass."""


def fit_memory(
    vlm: VLM,
    run: RunConfig,
    index: int,
    samples: Mixture,
    feed: Feed,
    workers: Workers,
    choice: Choice = "auto",
    *,
    shards: bool = False,
) -> MemoryFit:
    """Settles the micro-batch and activation checkpointing of a stage, the same for all workers, and switches it.

    Called when the stage's parts learn already and its optimiser is still to be made. `activation_checkpointing: auto`
    goes by an estimate from the longest samples; `micro_batch_size: auto` by forward and backward passes of them, at
    growing sizes. On the CPU a micro-batch that is left to be found is all of a worker's share.

    Args:
        vlm: on the device.
        run: that the stage belongs to.
        index: of the stage.
        samples: of its data sets.
        feed: makes batches.
        workers: this worker among all.
        choice: of activation checkpointing.
        shards: the language model lies in shards, so that no worker can try a pass by itself; the micro-batch then
            goes by the estimate too.

    Raises:
        MemoryShortError: the micro-batch is to be found, and not one sample fits.
    """
    stage = run.stages[index]
    share = math.ceil(stage.batch_size / workers.size)
    given = stage.micro_batch_size
    size = share if given in (None, "auto") else min(int(given), share)
    if workers.device.type != "cuda":
        vlm.llm.checkpoint_activations(choice == "on")
        return MemoryFit(size, choice == "on")
    long = longest(samples, share, vlm.visual_tokens) if "auto" in (given, choice) else []
    examples = [feed.train(sample) for sample in long[: 1 if given != "auto" or shards else share]]
    on = choice == "on"
    if choice == "auto" and vlm.llm.block_modules():
        free = free_bytes(workers.device)
        needed = step_bytes(vlm, run, stage, examples[0], 1 if given == "auto" else size, checkpointing=False)
        on = bool(workers.most(int(needed is not None and needed > free * (1 - HEADROOM))))
    vlm.llm.checkpoint_activations(on)
    if given != "auto":
        return MemoryFit(size, on)

    def fits(count: int) -> bool:
        if shards:
            needed = step_bytes(vlm, run, stage, examples[0], count, checkpointing=on)
            return needed is not None and needed <= free_bytes(workers.device) * (1 - HEADROOM)
        return _try(vlm, run, stage, feed, examples[:count], workers.device, again=count < share)

    found = largest(fits, share)
    if choice == "auto" and not on and vlm.llm.block_modules() and workers.most(int(not found)):
        on = True
        vlm.llm.checkpoint_activations(True)
        found = largest(fits, share)
    found = -workers.most(-found)
    if not found:
        raise MemoryShortError(
            f"stage {stage.name!r}: not one of its longest samples fits the memory of {workers.device} "
            f"({free_bytes(workers.device) / 2**30:.1f} GiB free beside the weights"
            + (", activation checkpointing on); " if on else "); set activation_checkpointing=on, ")
            + "train less, quantise what is frozen, or spread it over more workers with strategy=fsdp"
        )
    return MemoryFit(even(share, found), on)


@contextmanager
def explained(stage: StageConfig, fit: MemoryFit) -> Iterator[None]:
    """Says what to set where a step runs out of memory.

    Raises:
        MemoryShortError: it did.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        less = [] if fit.micro_batch == 1 else [f"micro_batch_size below {fit.micro_batch} (or to auto)"]
        less += [] if fit.checkpointing else ["activation_checkpointing=on"]
        raise MemoryShortError(
            f"stage {stage.name!r}: a step in passes of {fit.micro_batch} samples does not fit the memory; "
            f"set {' or '.join(less) or 'strategy=fsdp on more workers, or train less'}. {error}"
        ) from error


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest size that fits, found by doubling from 1 up to `most`; 0 where not even 1 does."""
    found, size = 0, 1
    while fits(size):
        found = size
        if size == most:
            break
        size = min(2 * size, most)
    return found


def even(share: int, most: int) -> int:
    """The size of equal micro-batches, none larger than `most`, in which a worker computes its share."""
    return math.ceil(share / math.ceil(share / most))


def longest(samples: Mixture, count: int, visual_tokens: int) -> list[Sample]:
    """About the longest samples of a stage, the longest first."""
    step = max(1, len(samples) // SCANNED)

    def length(index: int) -> float:
        sample = samples[index]
        characters = sum(len(turn.question) + len(turn.answer or "") for turn in sample.turns)
        return len(sample.images) * visual_tokens + characters / CHARACTERS

    ranked = sorted(range(0, len(samples), step), key=length, reverse=True)
    return [samples[ranked[place % len(ranked)]] for place in range(count)]


def step_bytes(
    vlm: VLM, run: RunConfig, stage: StageConfig, example: Example, size: int, *, checkpointing: bool
) -> int | None:
    """Memory that a step takes beside the weights, for micro-batches of so many samples like one.

    None where the language model, or an encoder that learns, does not say what it keeps.
    """
    llm, positions = vlm.llm, len(example.prompt)
    kept = type(llm).activation_bytes(llm.config, positions, trained="llm" in stage.train)
    seen = encoder_bytes(run) if "encoders" in stage.train else 0
    if kept is None or seen is None:
        return None
    depth, width = llm.geometry.depth, llm.geometry.width
    if checkpointing:
        kept = depth * positions * width * HALF + kept // depth
    views = sum(len(views) for views in example.prompt.views)
    connector = connector_cost(run, [encoder.geometry.features for encoder in _encoders(vlm)], width)
    kept += views * (seen + connector.saved_bytes)
    logits = min(LOGITS, size * example.prompt.supervised * llm.geometry.vocabulary)
    learning = sum(_elements(p) for part in stage.train for p in vlm.trainable(part).values())
    passes = size * kept + logits * LOGIT_BYTES
    return _moments(stage, learning) + learning * HALF + max(passes, learning * FULL)


def free_bytes(device: torch.device) -> int:
    """Memory of a GPU that this process can still take."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _try(
    vlm: VLM,
    run: RunConfig,
    stage: StageConfig,
    feed: Feed,
    examples: Sequence[Example],
    device: torch.device,
    *,
    again: bool,
) -> bool:
    """Whether a forward and backward pass of some samples fits, with what the optimiser will hold beside it.

    `again` says that it is one of several in a step, of which the later ones find the gradients of the first.
    """
    learning = [p for part in stage.train for p in vlm.trainable(part).values()]
    buffers = {name: value.clone() for name, value in vlm.named_buffers()} if vlm.training else {}
    limit = (free_bytes(device) + torch.cuda.memory_allocated(device)) * (1 - HEADROOM)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        with autocast(run, device):
            loss, _ = vlm(feed.batch(examples, device))
        loss.backward()
        elements = sum(map(_elements, learning))
        held = _moments(stage, elements) + (elements * FULL if again else 0)
        return torch.cuda.max_memory_allocated(device) + held <= limit
    except torch.OutOfMemoryError:
        return False
    finally:
        loss = None
        for parameter in learning:
            parameter.grad = None
        for name, value in vlm.named_buffers():
            if name in buffers:
                value.copy_(buffers[name])
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _encoders(vlm: VLM) -> list[Encoder]:
    return list(vlm.encoders)  # type: ignore[arg-type]


def _moments(stage: StageConfig, learning: int) -> int:
    """What the optimiser keeps."""
    return learning * MOMENT_BYTES[stage.optimizer]


def _elements(parameter: torch.nn.Parameter) -> int:
    """Elements that this worker holds."""
    return parameter.to_local().numel() if isinstance(parameter, DTensor) else parameter.numel()
