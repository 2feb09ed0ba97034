"""Scenes: what an image of the world shows, in exact terms and without a pixel.

Lengths and places are whole thousandths of the image's side, (0, 0) at the top left, so that a scene has one
canonical description and looks the same at every image size.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Literal, NamedTuple

Split = Literal["train", "eval"]
SPLITS: tuple[Split, ...] = ("train", "eval")

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 36, 40),
    "orange": (250, 132, 20),
    "yellow": (246, 212, 22),
    "green": (34, 150, 62),
    "blue": (36, 84, 214),
    "purple": (124, 48, 168),
    "pink": (250, 110, 182),
    "black": (20, 20, 20),
}
"""RGB by name."""

KINDS = ("circle", "square", "triangle", "diamond", "star", "heart", "cross", "ring")

WORDS = (
    "baby", "bird", "book", "cake", "desk", "door", "farm", "fish", "game", "hand",
    "home", "king", "lake", "milk", "moon", "rain", "ship", "song", "tree", "wolf",
)  # fmt: skip
"""Words that scenes show: all of four letters, so that the length tells nothing."""

MAX_COUNT = 5


class Shape(NamedTuple):
    """A coloured shape; `radius` is half the side of the square around it."""

    kind: str
    colour: str
    x: int
    y: int
    radius: int


class Digit(NamedTuple):
    """A handwritten digit; `source` is its index in scikit-learn's digits."""

    value: int
    source: int
    x: int
    y: int


class Word(NamedTuple):
    """A rendered word."""

    text: str
    large: bool
    x: int
    y: int


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything an image shows.

    Args:
        shapes: from top to bottom, so that their order tells nothing about how the scene was drawn.
        digit: at most one.
        words: at most one large and one small.
        counted: the kind whose number was drawn uniformly from 1 to `MAX_COUNT`; other kinds must not be asked for
            their number, which is nearly always one.
        background: seed of the background.
    """

    shapes: tuple[Shape, ...]
    digit: Digit | None
    words: tuple[Word, ...]
    counted: str | None
    background: int

    @property
    def content(self) -> str:
        """The canonical description of all objects, which decides the split; the background is no part of it."""
        return json.dumps((self.shapes, self.digit, self.words))

    @property
    def split(self) -> Split:
        """The split this scene belongs to, whoever drew it: a function of `content` alone."""
        return split_of(self.content.encode())

    @property
    def digest(self) -> str:
        """SHA-256 of the content and the background, in hexadecimal."""
        return hashlib.sha256(f"{self.content} {self.background}".encode()).hexdigest()


def split_of(content: bytes) -> Split:
    """The split that owns a content. Every content has exactly one, so nothing can be in both."""
    return SPLITS[hashlib.sha256(content).digest()[0] % len(SPLITS)]
