"""What a checkpoint's published image processor does, as an `ImageSpec`.

Shape letters: B images, H and W pixels.
"""

from __future__ import annotations

import math
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from chiasm.errors import CheckpointError, ConfigError
from chiasm.image import ImageSpec
from chiasm_encoders._checkpoint import read_json

_FILTERS = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers, which processor files use."""


def image_spec(source: str | None, size: tuple[int, int], published: ImageSpec) -> ImageSpec:
    """The pixels for a model of `size` (height, width).

    Mean, deviation, filter and cropping are those of the checkpoint's processor file, else those of `published`. The
    size is always the model's: a processor that makes smaller images, as DINOv2's does, gives its cropping alone.

    Raises:
        CheckpointError: the processor does something that an `ImageSpec` cannot state.
    """
    facts = published.model_dump() | {"height": size[0], "width": size[1]}
    file = _read(source) if source is not None else {}
    try:
        return ImageSpec.model_validate(facts | _facts(file, published))
    except (ValueError, TypeError, KeyError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise CheckpointError(f"pretrained: the image processor of {source!r} is not understood: {reason}") from error


def timm_image_spec(model: str, facts: dict[str, Any], image_size: int | None) -> ImageSpec:
    """The pixels for a timm model, by what timm's `resolve_model_data_config` says of it.

    Raises:
        ConfigError: the model's evaluation transform is none that an `ImageSpec` can state.
    """
    channels, height, width = facts["input_size"]
    if channels != 3:
        raise ConfigError(f"model: timm's {model!r} takes {channels} channels; wanted the 3 of RGB")
    height, width = (height, width) if image_size is None else (image_size, image_size)
    mode, share = facts["crop_mode"], facts["crop_pct"]
    natives = {"center": "crop", "squash": "squash"}
    try:
        if mode not in natives:
            raise ValueError(f"crop_mode {mode!r}; wanted center or squash")
        # timm rounds the edge before the crop down; as a share of that edge nothing is left to round
        return ImageSpec.model_validate(
            {
                "height": height,
                "width": width,
                "mean": facts["mean"],
                "std": facts["std"],
                "interpolation": facts["interpolation"],
                "native": natives[mode],
                "crop_fraction": height / math.floor(height / share),
                "crop_start": "even",
            }
        )
    except ValueError as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise ConfigError(f"model: the preprocessing of timm's {model!r} is not understood: {reason}") from error


def check_pixels(pixels_B3HW: Tensor, image: ImageSpec) -> None:
    """Refuses pixels of another shape than `[B, 3, H, W]`.

    Raises:
        ValueError: they have another shape.
    """
    wanted = (3, image.height, image.width)
    if pixels_B3HW.shape[1:] != wanted:
        raise ValueError(f"pixels of shape {tuple(pixels_B3HW.shape)}; wanted [B, {', '.join(map(str, wanted))}]")


def _read(source: str) -> dict[str, Any]:
    """The processor's fields from the file of either name that transformers writes."""
    own = read_json(source, "preprocessor_config.json")
    if own is None:
        own = (read_json(source, "processor_config.json") or {}).get("image_processor")
    return own if isinstance(own, dict) else {}


def _facts(file: dict[str, Any], published: ImageSpec) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if file.get("image_mean") is not None and file.get("image_std") is not None:
        facts |= {"mean": file["image_mean"], "std": file["image_std"]}
    if file.get("do_normalize") is False:
        facts |= {"mean": (0, 0, 0), "std": (1, 1, 1)}
    if file.get("resample") is not None:
        if file["resample"] not in _FILTERS:
            raise ValueError(f"resample {file['resample']}; wanted 2 (bilinear) or 3 (bicubic)")
        facts["interpolation"] = _FILTERS[file["resample"]]
    size = file.get("size")
    if size is None:
        return facts
    cropped = file.get("do_center_crop", published.native == "crop")
    crop = _edges(file.get("crop_size", size)) if cropped else None
    if isinstance(size, dict) and "height" in size:
        if crop is not None and crop != _edges(size):
            raise ValueError(f"size {size} followed by a crop to {crop}; wanted a crop of the shortest edge")
        return facts | {"native": "squash", "crop_fraction": 1.0}
    if crop is None:
        return facts | {"native": "squash" if isinstance(size, int) else "crop", "crop_fraction": 1.0}
    return facts | {"native": "crop", "crop_fraction": min(crop) / min(_edges(size))}


def _edges(size: Any) -> tuple[int, int]:
    """Height and width of a processor's size in any of its forms: 224, {shortest_edge: 224}, {height:, width:}."""
    if isinstance(size, int):
        return size, size
    if "shortest_edge" in size:
        return size["shortest_edge"], size["shortest_edge"]
    return size["height"], size["width"]
