"""Whether a run keeps the features of its frozen encoders on the disk, and why."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from chiasm.config import RunConfig, StageConfig
from chiasm.cost import train_flops
from chiasm.errors import ConfigError
from chiasm.vlm import VLM
from chiasm_experiments.data.feed import Feed
from chiasm_experiments.data.mixture import Mixture
from chiasm_experiments.data.order import Order
from chiasm_experiments.data.store import FeatureStore, default_folder
from chiasm_experiments.training.execution import Execution
from chiasm_experiments.training.speeds import disk_speed, encoder_seconds, memory_for_files
from chiasm_experiments.training.workers import Workers

GIB = 2**30
PROBES = 64
"""Samples of each stage that are looked at, to learn how many images they have and which ones stages share."""
WORTH_SECONDS = 20.0
WORTH_SHARE = 0.05
"""Below either, what the cache would save is not worth its space on the disk."""
FILL = 0.9
"""Of the folder's size that one run may fill, since other processes' packs come in whole pieces."""
TEXT, ANSWER = 64, 32
"""Positions of text, and those answered, of the sample for which a step's operations are counted."""

MakeFeed = Callable[[FeatureStore], Feed]
"""A run's feed with its features in a store."""


@dataclass(frozen=True, slots=True)
class CacheDecision:
    """What was decided about the features of a run's encoders."""

    allowed: bool
    """Whether they may be kept at all, be it in memory."""
    used: bool
    """Whether they are kept on the disk."""
    why: str
    figures: dict[str, Any] = field(default_factory=dict)
    share: float = 1.0
    """Of the images that are kept."""
    store: FeatureStore | None = None

    @property
    def told(self) -> dict[str, Any]:
        """For the manifest."""
        return {"used": self.used, "why": self.why, **self.figures}


def decide(
    vlm: VLM,
    run: RunConfig,
    execution: Execution,
    mixtures: Sequence[Mixture],
    runs: int,
    workers: Workers,
    make_feed: MakeFeed,
) -> CacheDecision:
    """Decides by `execution.cache`; called on every worker, all of which come to the same.

    Args:
        vlm: placed on the device.
        run: the run.
        execution: holds the choice, the folder and its size.
        mixtures: the data of each stage.
        runs: that want the same features, this one among them: those of its study.
        workers: the first one measures and decides.
        make_feed: to look for features that are stored already.

    Raises:
        ConfigError: the cache is turned on and its folder cannot be written to.
    """
    if "encoders" in run.trained:
        return CacheDecision(False, False, "an encoder is trained, so its features change")
    if execution.cache == "off":
        return CacheDecision(False, False, "turned off")
    store = FeatureStore(execution.cache_folder or default_folder(), int(execution.cache_gib * GIB))
    told: Sequence[Any] = ()
    if workers.first:
        wanted = count_uses(run, mixtures)
        space = Space.needed(vlm, wanted, store.limit)
        figures = {"folder": str(store.folder), **wanted.figures, **space.figures}
        refused = _refused(store)
        if execution.cache == "on":
            if refused:
                raise ConfigError(f"cache=on, and {refused}; set cache_folder or $CHIASM_CACHE to another folder")
            told = (True, "turned on", figures, space.share)
        elif refused:
            told = (False, refused, figures, 1.0)
        elif not wanted.uses:
            told = (False, "the data have no image", figures, 1.0)
        elif not _operations(vlm):
            told = (False, "the encoders compute nothing", figures, 1.0)
        else:
            hits = stored_share(wanted, make_feed(store)) if any(store.folder.glob("*/*.index")) else 0.0
            told = (*_weigh(vlm, run, wanted, space, hits, runs, store, workers.device, figures), space.share)
    if workers.size > 1:
        everyone = [told]
        dist.broadcast_object_list(everyone, src=0)
        (told,) = everyone
    used, why, figures, share = told
    return CacheDecision(True, used, why, figures, share, store if used else None)


def _operations(vlm: VLM) -> int:
    """Of all encoders for one view; the image-blind control has none."""
    encoders: list[Any] = list(vlm.encoders)
    return sum(encoder.geometry.flops for encoder in encoders)


@dataclass(frozen=True, slots=True)
class Wanted:
    """How often a run wants features, as far as a look at some samples tells."""

    images: float
    """Different images."""
    uses: float
    """Images in all samples of all epochs of all stages."""
    samples: int
    """Samples of all epochs of all stages."""
    keys: tuple[str, ...]
    """Of the images in the samples that were looked at."""

    @property
    def figures(self) -> dict[str, Any]:
        """For the manifest."""
        return {"images": round(self.images), "uses": round(self.uses)}


@dataclass(frozen=True, slots=True)
class Space:
    """What all features of a run take on the disk."""

    bytes: int
    image_bytes: float
    views: float
    """Of an image, in the middle."""
    share: float
    """Of the images for which there is room."""
    limit: int

    @classmethod
    def needed(cls, vlm: VLM, wanted: Wanted, limit: int) -> Space:
        """What a run's features need."""
        views = sum(vlm.views.counts) / 2
        image = views * sum(_view_bytes(encoder) for encoder in vlm.encoders)
        size = int(wanted.images * image)
        return cls(size, image, views, min(1.0, FILL * limit / size) if size else 1.0, limit)

    @property
    def figures(self) -> dict[str, Any]:
        """For the manifest."""
        return {"bytes": self.bytes, "limit_bytes": self.limit, "share": self.share}


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one image."""

    encode: float
    step: float
    """Of all that comes behind the encoders, forward and backward."""
    write: float
    read: float

    def live(self) -> float:
        """Encoded in the step."""
        return self.encode + self.step

    def first(self) -> float:
        """Encoded in the step and written beside it."""
        return max(self.live(), self.write)

    def again(self) -> float:
        """Read beside the step."""
        return max(self.step, self.read)


def _weigh(
    vlm: VLM,
    run: RunConfig,
    wanted: Wanted,
    space: Space,
    hits: float,
    runs: int,
    store: FeatureStore,
    device: torch.device,
    figures: dict[str, Any],
) -> tuple[bool, str, dict[str, Any]]:
    """Used or not, why, and the figures."""
    new = wanted.images * (1 - hits)
    figures = figures | {"stored_share": hits, "runs": runs}
    times_seen = f"each image is wanted {runs * wanted.uses / wanted.images:.3g} times"
    times_seen += f" by the {runs} runs of the study that see it" if runs > 1 else " by this run"
    if runs * wanted.uses < 1.05 * new:
        return False, f"{times_seen}, and storing features that are never read saves nothing", figures
    times, measured = measure(vlm, run, wanted, space, store, device)
    live = runs * wanted.uses * times.live()
    cached = new * times.first() + (runs * wanted.uses - new) * times.again()
    saved = space.share * (live - cached)
    worth = saved >= WORTH_SECONDS and saved >= WORTH_SHARE * live
    figures |= measured | {"live_seconds": live, "saved_seconds": saved}
    why = (
        f"{times_seen}, {hits:.0%} of the images are stored already; an image takes {times.encode * 1e3:.3g} ms to "
        f"encode and {times.read * 1e3:.3g} ms to read beside a step of {times.step * 1e3:.3g} ms, so that "
        f"{saved:.3g} of {live:.3g} s are saved"
    )
    if space.share < 1:
        why += f", with room for {space.share:.0%} of the images"
    if not worth:
        why += f"; wanted at least {WORTH_SECONDS:g} s and {WORTH_SHARE:.0%}"
    return worth, why, figures


def measure(
    vlm: VLM, run: RunConfig, wanted: Wanted, space: Space, store: FeatureStore, device: torch.device
) -> tuple[Times, dict[str, Any]]:
    """The times of an image, and what they come from.

    Encoders and disk are timed. The step is counted in operations, at the rate that the encoders reach here: before
    training there is no step to time, and a language model too large for one worker cannot be run on one.
    """
    sizes = [(stage.micro_batch_size, stage.batch_size) for stage in run.stages]
    batch = min(micro if isinstance(micro, int) else whole for micro, whole in sizes)
    seconds = [encoder_seconds(vlm, k, device, round(batch * space.views)) for k in range(len(vlm.encoders))]
    rate = _operations(vlm) / sum(seconds)
    positions = vlm.views.most_tokens + TEXT
    stages = [train_flops(stage, vlm.llm.geometry, positions, ANSWER, encode=0, connect=0) for stage in run.stages]
    operations = sum(stages) / len(stages) * wanted.samples / wanted.uses
    disk = disk_speed(store.folder, space.bytes)
    in_memory = space.bytes <= memory_for_files()
    times = Times(
        encode=space.views * sum(seconds),
        step=operations / rate,
        write=space.image_bytes / disk.write,
        read=space.image_bytes / (disk.read_again if in_memory else disk.read),
    )
    return times, {
        "encoder_view_seconds": seconds,
        "operations_per_second": rate,
        "disk_write_bytes_per_second": disk.write,
        "disk_read_bytes_per_second": disk.read,
        "memory_read_bytes_per_second": disk.read_again,
        "step_image_seconds": times.step,
    }


def count_uses(run: RunConfig, mixtures: Sequence[Mixture]) -> Wanted:
    """How many images a run's stages want, and how often, from some samples of each.

    Stages share an image where the same place of both data sets has it, which is so for data about the same images.
    """
    images = uses = 0.0
    total = 0
    seen: dict[str, None] = {}
    for index, (stage, samples) in enumerate(zip(run.stages, mixtures, strict=True)):
        probes = [samples[place] for place in _places(len(samples))]
        keys = [image.key for sample in probes for image in sample.images]
        new = set(keys) - seen.keys()
        seen |= dict.fromkeys(keys)
        drawn = _drawn(run, stage, index, len(samples))
        total += drawn
        uses += drawn * len(keys) / len(probes)
        images += min(drawn, len(samples)) * len(new) / len(probes)
    return Wanted(images, uses, total, tuple(seen))


def stored_share(wanted: Wanted, feed: Feed) -> float:
    """The share of the images looked at whose features are stored for every encoder."""
    known = [all(features.views(key) is not None for features in feed.features) for key in wanted.keys]
    return sum(known) / len(known)


def _refused(store: FeatureStore) -> str:
    """Why nothing can be written to a store's folder; empty where it can."""
    try:
        store.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"the folder {str(store.folder)!r} cannot be made: {error.strerror}"
    return "" if os.access(store.folder, os.W_OK) else f"the folder {str(store.folder)!r} cannot be written to"


def _drawn(run: RunConfig, stage: StageConfig, index: int, size: int) -> int:
    """Samples that a stage takes, over all its epochs."""
    steps = stage.steps or Order(size, stage.batch_size, run.seed, index).steps(stage.epochs)
    return steps * stage.batch_size


def _places(size: int) -> list[int]:
    return sorted({round(i * (size - 1) / max(1, PROBES - 1)) for i in range(PROBES)})


def _view_bytes(encoder: Any) -> int:
    spec = encoder.geometry.features
    dtype = next((p.dtype for p in encoder.parameters()), torch.float32)
    return int(spec.layers * spec.tokens * spec.width * dtype.itemsize)
