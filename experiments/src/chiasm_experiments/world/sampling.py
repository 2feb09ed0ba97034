"""Drawing scenes so that no question's text tells its answer.

What a question may ask for is drawn first and uniformly, whatever else the scene holds: colours and kinds are
exchangeable, the number of the counted kind, the digit and the words are uniform. Only then are places sought, and only
places are drawn again, when objects do not fit or the scene belongs to the other split. So rejection cannot favour an
answer. Places are symmetric under reflection.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.random import Generator

from chiasm_experiments.world.digits import sources
from chiasm_experiments.world.scene import (
    COLOURS,
    KINDS,
    MAX_COUNT,
    SPLITS,
    WORDS,
    Digit,
    Scene,
    Shape,
    Split,
    Word,
)

Content = Literal["shapes", "group", "digit", "large_word", "small_word"]
"""What a scene may hold. `group`: the kind that is counted, beside the other shapes."""
CONTENTS: tuple[Content, ...] = ("shapes", "group", "digit", "large_word", "small_word")

T = TypeVar("T")


class Box(NamedTuple):
    """Half the width and half the height that an object keeps for itself."""

    x: int
    y: int


RADIUS = (60, 100)
GAP = 8
DIGIT_BOX = Box(110, 110)
# the widest word in large letters, and in small letters in the smallest image
LARGE_BOX, SMALL_BOX = Box(220, 95), Box(150, 65)
_TRIES = 200


def stream(seed: int, split: Split, index: int) -> Generator:
    """The random numbers of item `index`: the same in every process, whatever was drawn before.

    Args:
        seed: in [0, 2^32); a wider one could repeat another seed's stream.
        split: each has streams of its own.
        index: at least 0.
    """
    return np.random.default_rng((seed, SPLITS.index(split), index))


def shuffled(items: Collection[T], rng: Generator) -> list[T]:
    """The items in random order."""
    ordered = list(items)
    return [ordered[i] for i in rng.permutation(len(ordered)).tolist()]


def draw_contents(required: Collection[Content], allowed: Collection[Content], rng: Generator) -> frozenset[Content]:
    """The required contents, and each other allowed one with probability a half."""
    coins = rng.random(len(CONTENTS)) < 0.5
    extra = {content for content, coin in zip(CONTENTS, coins, strict=True) if coin and content in allowed}
    return frozenset({*required, *extra})


def draw_scene(contents: Collection[Content], split: Split, rng: Generator) -> Scene:
    """A scene of the split that holds the contents.

    Two or three kinds of shape stand alone, so that they can be named by their kind; one shape stands alone in its
    colour; the counted kind comes one to `MAX_COUNT` times.
    """
    kinds, counted = _draw_kinds(contents, rng)
    colours = _draw_colours(len(kinds), rng)
    radii = rng.integers(RADIUS[0], RADIUS[1] + 1, size=len(kinds)).tolist()
    words = [
        (WORDS[rng.integers(len(WORDS))], large)
        for content, large in (("large_word", True), ("small_word", False))
        if content in contents
    ]
    digit = _draw_digit(split, rng) if "digit" in contents else None
    background = int(rng.integers(2**32))

    boxes = [LARGE_BOX if large else SMALL_BOX for _, large in words]
    boxes += [DIGIT_BOX] if digit is not None else []
    boxes += [Box(radius, radius) for radius in radii]
    while True:
        places = iter(place(boxes, rng))
        shown_words = tuple(Word(*word, *next(places)) for word in words)
        shown_digit = Digit(*digit, *next(places)) if digit is not None else None
        shapes = [
            Shape(kind, colour, *next(places), radius)
            for kind, colour, radius in zip(kinds, colours, radii, strict=True)
        ]
        shapes.sort(key=lambda shape: (shape.y, shape.x))
        scene = Scene(tuple(shapes), shown_digit, shown_words, counted, background)
        if scene.split == split:
            return scene


def place(boxes: Sequence[Box], rng: Generator) -> list[tuple[int, int]]:
    """Centres (x, y) at which no box leaves the image and any two are at least `GAP` apart; large boxes come first."""
    while True:
        fractions = iter(rng.random(2 * _TRIES).tolist())
        placed: list[tuple[int, int, int, int]] = []
        for half_x, half_y in boxes:
            # a crowded start can leave no room for the rest, so the tries of one attempt are bounded
            for u, v in zip(fractions, fractions, strict=False):
                x = half_x + int(u * (1001 - 2 * half_x))
                y = half_y + int(v * (1001 - 2 * half_y))
                if all(
                    abs(x - other_x) >= half_x + other_half_x + GAP or abs(y - other_y) >= half_y + other_half_y + GAP
                    for other_x, other_y, other_half_x, other_half_y in placed
                ):
                    placed.append((x, y, half_x, half_y))
                    break
        if len(placed) == len(boxes):
            return [(x, y) for x, y, _, _ in placed]


def _draw_kinds(contents: Collection[Content], rng: Generator) -> tuple[list[str], str | None]:
    if "shapes" not in contents and "group" not in contents:
        return [], None
    kinds = shuffled(KINDS, rng)
    singles = kinds[: rng.integers(2, 4)]
    if "group" not in contents:
        return singles, None
    counted = kinds[-1]
    return singles + [counted] * int(rng.integers(1, MAX_COUNT + 1)), counted


def _draw_colours(number: int, rng: Generator) -> list[str]:
    if number == 0:
        return []
    unique, *rest = shuffled(COLOURS, rng)
    return shuffled([unique, *(rest[i] for i in rng.integers(len(rest), size=number - 1))], rng)


def _draw_digit(split: Split, rng: Generator) -> tuple[int, int]:
    value = int(rng.integers(10))
    pool = sources(split)[value]
    return value, pool[rng.integers(len(pool))]
