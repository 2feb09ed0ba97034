"""Whether a run keeps the features of its frozen encoders on the disk, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from chiasm.config import RunConfig, StageConfig
from chiasm.vlm import VLM
from chiasm_experiments.data.mixture import Mixture
from chiasm_experiments.data.order import Order
from chiasm_experiments.data.store import FeatureStore, default_folder
from chiasm_experiments.training.execution import Execution
from chiasm_experiments.training.workers import Workers

GIB = 2**30
PROBES = 64
"""Samples of each stage that are looked at, to learn how many images they have and which ones stages share."""
WORTH_SECONDS = 20.0
WORTH_SHARE = 0.05
"""Below either, what the cache would save is not worth its space on the disk."""
TEXT, ANSWER = 64, 32
"""Positions of text, and those answered, of the sample for which a step's operations are counted."""


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


@dataclass(frozen=True, slots=True)
class Uses:
    """How often a run wants features."""

    images: float
    """Different images, as far as a look at some samples tells."""
    uses: float
    """Images in all samples of all epochs of all stages."""


def decide(
    vlm: VLM,
    run: RunConfig,
    execution: Execution,
    mixtures: Sequence[Mixture],
    labels: dict[str, Any],
    workers: Workers,
) -> CacheDecision:
    """Decides by `execution.cache`; called on every worker, all of which do the same.

    Args:
        vlm: placed on the device.
        run: the run.
        execution: holds the choice, the folder and its size.
        mixtures: the data of each stage.
        labels: tell whether the run belongs to a study, whose other runs want the same features.
        workers: the first one measures and decides.
    """
    if "encoders" in run.trained:
        return CacheDecision(False, False, "an encoder is trained")
    if execution.cache == "off":
        return CacheDecision(False, False, "turned off")
    folder = execution.cache_folder or default_folder()
    limit = int(execution.cache_gib * GIB)
    told: tuple[bool, str, dict[str, Any], float] | None = None
    if workers.first:
        told = _decide(vlm, run, execution.cache == "on", folder, limit, mixtures, labels.get("study") is not None)
    if workers.size > 1:
        everyone = [told]
        dist.broadcast_object_list(everyone, src=0)
        told = everyone[0]
    assert told is not None
    used, why, figures, share = told
    return CacheDecision(True, used, why, figures, share, FeatureStore(folder, limit) if used else None)


def _decide(
    vlm: VLM, run: RunConfig, forced: bool, folder: Path, limit: int, mixtures: Sequence[Mixture], study: bool
) -> tuple[bool, str, dict[str, Any], float]:
    """Used or not, why, the figures, and the share of images."""
    uses = count_uses(run, mixtures)
    view_bytes = sum(_view_bytes(encoder) for encoder in vlm.encoders)
    views = sum(vlm.views.counts) / 2
    size = int(uses.images * views * view_bytes)
    share = min(1.0, 0.9 * limit / size) if size else 1.0
    figures: dict[str, Any] = {
        "folder": str(folder),
        "images": round(uses.images),
        "uses": round(uses.uses),
        "bytes": size,
        "limit_bytes": limit,
        "share": share,
    }
    if forced:
        return True, "turned on", figures, share
    if not uses.uses:
        return False, "the data have no image", figures, share
    return False, "not measured", figures, share


def count_uses(run: RunConfig, mixtures: Sequence[Mixture]) -> Uses:
    """How many images a run's stages want, and how often, from some samples of each.

    Stages share an image where the same place of both data sets has it, which is so for data about the same images.
    """
    images = uses = 0.0
    seen: set[str] = set()
    for index, (stage, samples) in enumerate(zip(run.stages, mixtures, strict=True)):
        probes = [samples[place] for place in _places(len(samples))]
        keys = [[image.key for image in sample.images] for sample in probes]
        every = [key for mine in keys for key in mine]
        new = set(every) - seen
        seen |= new
        drawn = _drawn(run, stage, index, len(samples))
        uses += drawn * len(every) / len(probes)
        images += min(drawn, len(samples)) * len(new) / len(probes)
    return Uses(images, uses)


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
