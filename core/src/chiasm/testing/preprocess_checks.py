"""What every encoder promises of `preprocess`: its own size, constants and resizing, as its spec states them.

Shape letters: B images, H and W pixels.
"""

from __future__ import annotations

from typing import get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from chiasm.encoder import Encoder
from chiasm.image import ImageSpec, Resize, to_pixels
from chiasm.testing.check import Check
from chiasm.testing.common import calling, make_tiny, require
from chiasm.testing.probe import check_close

SIZES = ((1, 1), (7, 5), (64, 64), (97, 61), (200, 5), (5, 200))
"""Width and height of the images that are preprocessed: one pixel, odd ones, and strips."""

COLOURS = ((0, 0, 0), (255, 255, 255), (250, 120, 10), (20, 200, 90))

LIKE = 0.06
"""Mean difference of RGB in [0, 1] up to which two resized images are the same: filters differ at edges."""

UNLIKE = 0.12
"""Difference above which two policies can be told apart."""

POLICIES: tuple[Resize, ...] = get_args(Resize)


def preprocess(cls: type[Encoder]) -> None:
    """Images of any shape become `[B, 3, H, W]` float32 as `spec` states, under every resize policy, each alone."""
    encoder = make_tiny(cls)
    images = _noise()
    image = encoder.geometry.image
    wanted = (len(images), 3, image.height, image.width)
    for policy in POLICIES:
        pixels = _pixels(encoder, images, policy, f" of images of {SIZES} pixels")
        require(images == _noise(), f"preprocess with resize={policy!r} changed the images that it was given")
        _check_pixels(pixels, wanted, policy)
        last = encoder.preprocess(images[-1:], policy)
        check_close(pixels[-1:], last, f"preprocess with resize={policy!r} gives an image other pixels among others")


def normalisation(cls: type[Encoder]) -> None:
    """Pixels are normalised by the mean and standard deviation that `spec` states, in the order red, green, blue."""
    encoder = make_tiny(cls)
    spec = encoder.geometry.image
    images = [Image.new("RGB", (spec.width, spec.height), colour) for colour in COLOURS]
    mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
    for policy in POLICIES:
        # a plain image of the encoder's own size is the same under every policy
        pixels_B3HW = _pixels(encoder, images, policy, " of plain images")
        for colour, pixels in zip(COLOURS, pixels_B3HW, strict=True):
            found = pixels.mean(dim=(1, 2)) * std + mean
            off = float((found - torch.tensor(colour) / 255).abs().max())
            require(
                off <= 2 / 255,
                f"preprocess with resize={policy!r} of a plain image of RGB {colour}: undone with the mean {spec.mean} "
                f"and std {spec.std} that spec states it is {[round(float(255 * v)) for v in found]}; normalise with "
                "what spec states, in the order red, green, blue",
            )


def resize_policy(cls: type[Encoder]) -> None:
    """`pad` keeps the whole image, `crop` its middle, `squash` loses its shape; `native` is what `spec` states."""
    encoder = make_tiny(cls)
    spec = encoder.geometry.image
    for name, image in (
        ("wide", _stripes(3 * spec.width, spec.height)),
        ("tall", _stripes(spec.width, 3 * spec.height)),
    ):
        wanted = {policy: _rgb(to_pixels([image], spec, policy), spec) for policy in POLICIES}
        for policy in POLICIES:
            found = _rgb(_pixels(encoder, [image], policy, f" of a {name} image"), spec)
            distances = {other: float((found - wanted[other]).abs().mean()) for other in POLICIES}
            nearest = min(distances, key=lambda other: distances[other])
            apart = float((wanted[nearest] - wanted[policy]).abs().mean())
            require(
                nearest != policy or distances[policy] <= UNLIKE,
                f"preprocess of a {name} image with resize={policy!r} is off by {distances[policy]:.2f} of the range "
                "from what Chiasm's own does: `pad` fills the rest with the mean colour and keeps the image in the "
                "middle, `crop` keeps the middle",
            )
            require(
                distances[policy] <= LIKE or apart <= UNLIKE,
                f"preprocess of a {name} image with resize={policy!r} gives what {nearest!r} should give (it is off by "
                f"{distances[nearest]:.2f} of the range from that, by {distances[policy]:.2f} from {policy!r}); "
                f"spec states native={spec.native!r} and crop_fraction={spec.crop_fraction:g}",
            )


def resize_details(cls: type[Encoder]) -> None:
    """Images are resized by the filter, and cropped to the share of the edge, that `spec` states."""
    encoder = make_tiny(cls)
    spec = encoder.geometry.image
    colours = np.random.default_rng(4).integers(0, 256, (2 * spec.height, 2 * spec.width, 3), dtype=np.uint8)
    image = Image.fromarray(colours).resize((2 * spec.width + 3, 2 * spec.height + 5), Image.Resampling.BOX)
    others: dict[str, dict[str, object]] = {
        name: {"interpolation": name} for name in get_args(ImageSpec.model_fields["interpolation"].annotation)
    }
    others |= {f"crop_fraction={share:g}": {"crop_fraction": share} for share in (1.0, 0.9, 0.875)}
    for policy in POLICIES:
        found = _pixels(encoder, [image], policy, "")
        off = float((found - to_pixels([image], spec, policy)).abs().mean())
        for name, change in others.items():
            other = ImageSpec.model_validate(spec.model_dump() | change)
            distance = float((found - to_pixels([image], other, policy)).abs().mean())
            # another library's filter is nearer to the same filter of Pillow's than to the other one
            require(
                off <= 4 * distance + 0.02,
                f"preprocess with resize={policy!r} seems to use {name} (off by {distance:.2g} from that, by {off:.2g} "
                f"from what spec states: {spec.interpolation}, crop_fraction={spec.crop_fraction:g})",
            )


def _stripes(width: int, height: int) -> Image.Image:
    """Coarse areas of colour, with others at the borders than in the middle."""
    colours = np.random.default_rng(2).integers(0, 2, (4, 4, 3), dtype=np.uint8) * 255
    colours[0], colours[-1] = (255, 0, 0), (0, 0, 255)
    colours[:, 0], colours[:, -1] = (0, 255, 0), (255, 0, 255)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST)


def _rgb(pixels_B3HW: Tensor, spec: ImageSpec) -> Tensor:
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (spec.mean, spec.std))
    return pixels_B3HW * std + mean


def _noise() -> list[Image.Image]:
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]


def _pixels(encoder: Encoder, images: list[Image.Image], policy: Resize, what: str) -> Tensor:
    with calling(f"preprocess{what} with resize={policy!r}"):
        return encoder.preprocess(images, policy)


def _check_pixels(pixels: Tensor, wanted: tuple[int, ...], policy: str) -> None:
    shape = tuple(pixels.shape)
    require(shape == wanted, f"preprocess with resize={policy!r} returned {shape}, declared (B, 3, H, W) = {wanted}")
    require(
        pixels.dtype == torch.float32,
        f"preprocess with resize={policy!r} returned {pixels.dtype}, wanted torch.float32",
    )
    require(bool(pixels.isfinite().all()), f"preprocess with resize={policy!r} returned NaN or infinity")


PREPROCESS_CHECKS: tuple[Check, ...] = (preprocess, normalisation, resize_policy, resize_details)
