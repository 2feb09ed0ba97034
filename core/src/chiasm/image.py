"""From image files to the pixels of one encoder.

Shape letters: B images, H height, W width.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import Field
from torch import Tensor

from chiasm.errors import DataError
from chiasm.settings import Settings

Resize = Literal["native", "pad", "crop", "squash"]
"""How an image of any shape becomes the encoder's rectangle.

`pad`: the whole image, its aspect kept, the rest filled with the encoder's mean colour. `crop`: shortest edge to size,
centre kept, borders lost. `squash`: both edges to size, aspect lost. `native`: what the encoder's published
processor does.
"""

_LOOKED_UP = 32
_MOST_SCALED = 2**24
"""Pixels of a resized image that is cut out of; of more, its middle alone is made."""


class ImageSpec(Settings):
    """The pixels that an encoder wants."""

    height: int = Field(gt=0)
    """Pixels."""
    width: int = Field(gt=0)
    """Pixels."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Subtracted from RGB in [0, 1]."""
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Divides RGB in [0, 1] after the mean is subtracted."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    native: Literal["crop", "squash"] = "squash"
    """What the published processor does."""
    crop_fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the shortest edge that a crop keeps: 224 / 256 for DINOv2's published processor. Where `native` is
    `squash`, the share of both edges that is kept after them."""
    crop_start: Literal["down", "even"] = "down"
    """Where a crop starts that cannot be in the very middle: rounded down, as transformers does, or to the even pixel,
    as torchvision and timm do."""


def read_image(path: Path) -> Image.Image:
    """Reads an image file upright and in RGB; transparency is laid over white.

    Raises:
        DataError: the file is missing or Pillow cannot decode it.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError as error:
        raise DataError(f"image {str(path)!r} does not exist") from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"image {str(path)!r} cannot be decoded: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of an image of any mode; transparency is laid over white, 16 bits a channel are scaled to 8."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        # Pillow clips these to 255 instead of scaling them
        image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).clip(0, 255).round().astype(np.uint8))
    with warnings.catch_warnings():
        # a palette image with transparency in bytes is what the next line is for
        warnings.filterwarnings("ignore", message="Palette images with Transparency")
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            rgba = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        return image.convert("RGB")


def to_pixels(images: Sequence[Image.Image], spec: ImageSpec, resize: Resize) -> Tensor:
    """Resizes and normalises images of any mode for one encoder.

    Returns:
        `[B, 3, H, W]` float32.
    """
    return normalise(to_bytes(images, spec, resize), spec)


def to_bytes(images: Sequence[Image.Image], spec: ImageSpec, resize: Resize) -> Tensor:
    """Resizes images for one encoder, for `normalise` to finish: a quarter of the bytes to send, and less to compute.

    Returns:
        `[B, 3, H, W]` uint8.
    """
    if not images:
        return torch.empty(0, 3, spec.height, spec.width, dtype=torch.uint8)
    resized = [fit(image, (spec.height, spec.width), resize, spec) for image in images]
    rgb_BHW3 = torch.from_numpy(np.stack([np.asarray(image, dtype=np.uint8) for image in resized]))
    return rgb_BHW3.permute(0, 3, 1, 2).contiguous()


def normalise(rgb_B3HW: Tensor, spec: ImageSpec) -> Tensor:
    """Bytes as `to_bytes` gives them to what an encoder takes, with the same bits on every device.

    Returns:
        `[B, 3, H, W]` float32 on the device of the bytes.
    """
    # GPUs divide by a constant as they multiply by its inverse, which rounds otherwise: all that can be is looked up
    return _normalised(rgb_B3HW, spec) if rgb_B3HW.device.type == "cpu" else looked_up(rgb_B3HW, spec)


def looked_up(rgb_B3HW: Tensor, spec: ImageSpec) -> Tensor:
    """`normalise` from a table that was computed on the CPU."""
    table, first_311 = _table(spec, rgb_B3HW.device)
    pixels_B3HW = torch.empty(rgb_B3HW.shape, dtype=torch.float32, device=rgb_B3HW.device)
    # some at a time: indices are eight times as large as the bytes
    for first in range(0, len(rgb_B3HW), _LOOKED_UP):
        some = slice(first, first + _LOOKED_UP)
        pixels_B3HW[some] = table[rgb_B3HW[some].int() + first_311]
    return pixels_B3HW


@lru_cache(maxsize=64)
def _table(spec: ImageSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """What each byte of each channel becomes, and where each channel's bytes start."""
    every_131W = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    first_311 = torch.arange(3, dtype=torch.int32).view(3, 1, 1) * 256
    return _normalised(every_131W, spec).flatten().to(device), first_311.to(device)


def _normalised(rgb_B3HW: Tensor, spec: ImageSpec) -> Tensor:
    pixels_B3HW = rgb_B3HW.to(torch.float32, memory_format=torch.contiguous_format) / 255
    mean, std = (torch.tensor(v, dtype=torch.float32).view(1, 3, 1, 1) for v in (spec.mean, spec.std))
    return (pixels_B3HW - mean) / std


def fit(image: Image.Image, size: tuple[int, int], resize: Resize, spec: ImageSpec) -> Image.Image:
    """An image brought to `size` (height, width), in RGB, by a policy; filter and fill colour are those of `spec`."""
    image = to_rgb(image)
    policy = spec.native if resize == "native" else resize
    filter_ = Image.Resampling.BICUBIC if spec.interpolation == "bicubic" else Image.Resampling.BILINEAR
    height, width = size
    if policy == "squash":
        if resize == "native" and spec.crop_fraction < 1:
            tall, wide = _before_crop(size, spec.crop_fraction)
            return _centre(image, (wide, tall), size, spec.crop_start, filter_)
        return image.resize((width, height), filter_)
    if policy == "pad":
        scale = min(width / image.width, height / image.height)
        inner = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        canvas = Image.new("RGB", (width, height), tuple(round(255 * value) for value in spec.mean))
        canvas.paste(image.resize(inner, filter_), ((width - inner[0]) // 2, (height - inner[1]) // 2))
        return canvas
    # the edge that binds is scaled to size, and the other one truncated, as transformers' shortest-edge rule has it, or
    # crops differ by a pixel
    tall, wide = _before_crop(size, spec.crop_fraction)
    width, height = image.size
    if wide * height >= tall * width:
        scaled = (wide, max(tall, int(wide * height / width)))
    else:
        scaled = (max(wide, int(tall * width / height)), tall)
    return _centre(image, scaled, size, spec.crop_start, filter_)


def _before_crop(size: tuple[int, int], fraction: float) -> tuple[int, int]:
    """The height and width of which a crop to `size` keeps a fraction."""
    # the tolerance is for 384 / (384 / 450), which is just below 450
    return math.floor(size[0] / fraction + 1e-6), math.floor(size[1] / fraction + 1e-6)


def _centre(
    image: Image.Image,
    scaled: tuple[int, int],
    size: tuple[int, int],
    start: Literal["down", "even"],
    filter_: Image.Resampling,
) -> Image.Image:
    """The middle of `size` (height, width) of an image that is resized to `scaled` (width, height)."""
    margins = scaled[0] - size[1], scaled[1] - size[0]
    left, top = (margin // 2 if start == "down" else round(margin / 2) for margin in margins)
    box = (left, top, left + size[1], top + size[0])
    if scaled[0] * scaled[1] <= _MOST_SCALED:
        return image.resize(scaled, filter_).crop(box)
    # of an image of one row and many columns the whole would take gigabytes: the same, where it is looked at
    across, down = image.width / scaled[0], image.height / scaled[1]
    part = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
    x, y = (math.ceil(2 * max(1, scale)) + 1 for scale in (across, down))  # as far as a filter reaches
    left, top = max(0, math.floor(part[0]) - x), max(0, math.floor(part[1]) - y)
    seen = image.crop((left, top, min(image.width, math.ceil(part[2]) + x), min(image.height, math.ceil(part[3]) + y)))
    return seen.resize((size[1], size[0]), filter_, (part[0] - left, part[1] - top, part[2] - left, part[3] - top))
