"""From a scene to pixels."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import PIL
from PIL import Image, ImageDraw, ImageFont

from chiasm_experiments.world.digits import ink
from chiasm_experiments.world.sampling import DIGIT_BOX
from chiasm_experiments.world.scene import COLOURS, Scene

VERSION = 1
"""Raised whenever the same scene gets other pixels, so that cached features are not taken for those of the new ones."""

MIN_SIZE = 96
LARGE_TEXT = 150
"""Size of large letters in thousandths of the image's side."""
SMALL_TEXT = 10
"""Size of small letters in pixels, in images of any size: a model that shrinks a large image cannot read them, one that
sees its tiles can."""

_INK = (46, 46, 58)
_SUPERSAMPLING = 4

Polygon = tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class WorldImage:
    """An image of a scene, drawn when it is loaded.

    Args:
        scene: what it shows.
        size: side in pixels, at least `MIN_SIZE`.
    """

    scene: Scene
    size: int

    @property
    def key(self) -> str:
        """From the scene, the size and what draws it; nothing is drawn."""
        text = f"{VERSION} {PIL.__version__} {self.size} {self.scene.digest}"
        return "world:" + hashlib.sha256(text.encode()).hexdigest()

    def load(self) -> Image.Image:
        return render(self.scene, self.size)


def render(scene: Scene, size: int) -> Image.Image:
    """Draws a scene in RGB, `size` by `size` pixels. Shapes have exactly their colour except at their edges."""
    image = _background(scene.background, size)
    for shape in scene.shapes:
        stencil = _stencil(shape.kind, max(1, _pixels(shape.radius, size)))
        _stamp(image, COLOURS[shape.colour], stencil, shape.x, shape.y)
    if scene.digit is not None:
        side = 2 * _pixels(DIGIT_BOX.x, size)
        stencil = Image.fromarray(ink(scene.digit.source)).resize((side, side), Image.Resampling.BICUBIC)
        _stamp(image, _INK, stencil, scene.digit.x, scene.digit.y)
    draw = ImageDraw.Draw(image)
    for word in scene.words:
        font = _font(_pixels(LARGE_TEXT, size) if word.large else SMALL_TEXT)
        centre = (_pixels(word.x, size), _pixels(word.y, size))
        draw.text(centre, word.text, fill=_INK, font=font, anchor="mm")
    return image


def _pixels(thousandths: int, size: int) -> int:
    return round(thousandths * size / 1000)


def _stamp(image: Image.Image, colour: tuple[int, int, int], stencil: Image.Image, x: int, y: int) -> None:
    left = _pixels(x, image.width) - stencil.width // 2
    top = _pixels(y, image.height) - stencil.height // 2
    image.paste(colour, (left, top), stencil)


def _background(seed: int, size: int) -> Image.Image:
    """A light cloud of soft colours with a little noise."""
    rng = np.random.default_rng(seed)
    cloud = Image.fromarray(rng.integers(185, 240, (4, 4, 3), dtype=np.uint8))
    # bilinear never leaves the range of the corners, so the noise cannot overflow
    smooth = np.asarray(cloud.resize((size, size), Image.Resampling.BILINEAR))
    return Image.fromarray(smooth + rng.integers(0, 14, (size, size, 1), dtype=np.uint8))


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


@lru_cache(maxsize=2048)
def _stencil(kind: str, radius: int) -> Image.Image:
    """Coverage of a shape, `L`, 2 `radius` pixels wide and high."""
    centre = radius * _SUPERSAMPLING
    canvas = Image.new("L", (2 * centre, 2 * centre))
    draw = ImageDraw.Draw(canvas)
    outline, *holes = _POLYGONS[kind]
    for polygon, fill in ((outline, 255), *((hole, 0) for hole in holes)):
        draw.polygon([(centre + x * (centre - 1), centre + y * (centre - 1)) for x, y in polygon], fill=fill)
    return canvas.reduce(_SUPERSAMPLING)


def _regular(corners: int, radius: float = 1.0, inner: float | None = None) -> Polygon:
    """A regular polygon with a corner on top; every second corner lies at `inner`, which makes a star."""
    return tuple(
        (reach * math.sin(2 * math.pi * i / corners), -reach * math.cos(2 * math.pi * i / corners))
        for i in range(corners)
        for reach in [inner if inner is not None and i % 2 else radius]
    )


def _heart() -> Polygon:
    angles = (2 * math.pi * i / 48 for i in range(48))
    return tuple(
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 17 - 0.12,
        )
        for t in angles
    )


def _cross(arm: float = 0.34) -> Polygon:
    corners = [(arm, -1.0), (arm, -arm), (1.0, -arm)]
    for x, y in corners[:3] + [(-y, x) for x, y in corners[:3]] + [(-x, -y) for x, y in corners[:3]]:
        corners.append((-y, x))
    return tuple(corners)


_POLYGONS: dict[str, tuple[Polygon, ...]] = {
    "circle": (_regular(64, 0.95),),
    "square": (((-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)),),
    "triangle": (((0.0, -0.92), (1.0, 0.84), (-1.0, 0.84)),),
    "diamond": (((0.0, -1.0), (0.74, 0.0), (0.0, 1.0), (-0.74, 0.0)),),
    "star": (_regular(10, 1.0, inner=0.42),),
    "heart": (_heart(),),
    "cross": (_cross(),),
    "ring": (_regular(64, 0.97), _regular(64, 0.56)),
}
"""Outline and holes by kind, in units of the radius, y downwards."""
