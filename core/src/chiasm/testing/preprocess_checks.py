"""What every encoder promises of `preprocess`: its own size, constants and resizing, as its spec states them.

Shape letters: B images, H and W pixels.
"""

from __future__ import annotations

from typing import get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from chiasm.encoder import Encoder
from chiasm.image import ImageSpec, Resize, to_pixels, to_rgb
from chiasm.testing.check import Check
from chiasm.testing.common import calling, make_tiny, require
from chiasm.testing.probe import check_close
from chiasm.testing.process import random_numbers_kept

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
        with random_numbers_kept(f"preprocess with resize={policy!r}"):
            again = encoder.preprocess(images, policy)
        check_close(
            again, pixels, f"preprocess with resize={policy!r} of the same images gives other pixels the second time"
        )
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
            turned = _turned(found, wanted[policy])
            require(
                not turned or distances[policy] <= LIKE,
                f"preprocess of a {name} image with resize={policy!r} gives it {turned}; wanted it as it stands",
            )
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
            _check_nearer(spec, policy, name, distance, off)
        if policy == "squash":
            for name, resized in _coarse(image, spec).items():
                distance = float((found - to_pixels([resized], spec, policy)).abs().mean())
                _check_nearer(spec, policy, name, distance, off)


def _check_nearer(spec: ImageSpec, policy: str, name: str, distance: float, off: float) -> None:
    # another library's filter is nearer to the same filter of Pillow's than to the other one
    require(
        off <= 4 * distance + 0.02,
        f"preprocess with resize={policy!r} seems to use {name} (off by {distance:.2g} from that, by {off:.2g} from "
        f"what spec states: {spec.interpolation}, crop_fraction={spec.crop_fraction:g})",
    )


def image_modes(cls: type[Encoder]) -> None:
    """An image that is grey, has a palette or is transparent gives the pixels of what it looks like, on white."""
    encoder = make_tiny(cls)
    spec = encoder.geometry.image
    colours = Image.fromarray(np.random.default_rng(6).integers(0, 256, (spec.height, spec.width, 3), dtype=np.uint8))
    clear = colours.copy()
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    modes = {
        "grey (mode L)": colours.convert("L"),
        "with a palette (mode P)": colours.convert("P", palette=Image.Palette.ADAPTIVE, colors=16),
        "transparent (mode RGBA)": clear,
    }
    for name, image in modes.items():
        with calling(f"preprocess of an image that is {name}; convert it by chiasm.image.to_rgb:"):
            found = encoder.preprocess([image])
        check_close(
            found,
            encoder.preprocess([to_rgb(image)]),
            f"preprocess of an image that is {name} gives other pixels than of the same in RGB on white; convert it by "
            "chiasm.image.to_rgb",
        )


def _coarse(image: Image.Image, spec: ImageSpec) -> dict[str, Image.Image]:
    """An image brought to the encoder's size by filters that lose what lies between their pixels."""
    nearest = image.resize((spec.width, spec.height), Image.Resampling.NEAREST)
    rgb_13HW = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    mode = spec.interpolation
    found_13HW = F.interpolate(rgb_13HW, (spec.height, spec.width), mode=mode, align_corners=False)
    thin = found_13HW.clamp(0, 255).round().byte()[0].permute(1, 2, 0).contiguous().numpy()
    return {"the nearest pixel": nearest, f"{mode} without antialias": Image.fromarray(thin)}


def _turned(found_13HW: Tensor, wanted_13HW: Tensor) -> str:
    """How an image was mirrored or turned, empty where neither explains it."""
    ways = {"mirrored": found_13HW.flip(3), "upside down": found_13HW.flip(2), "turned around": found_13HW.flip(2, 3)}
    return next((name for name, back in ways.items() if float((back - wanted_13HW).abs().mean()) <= LIKE), "")


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


PREPROCESS_CHECKS: tuple[Check, ...] = (preprocess, image_modes, normalisation, resize_policy, resize_details)
