"""Samples: the images and the dialogue that a model is trained on or asked about."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from chiasm.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_MARKER = "<image>"
"""Where an image stands in a question; without a marker the images come before the first turn."""

SETTLED = 2 * 10**9
"""Nanoseconds after which a file's time of change tells whether it has changed since."""


class ImageSource(Protocol):
    """An image that is read when it is needed.

    `key` identifies the content: equal keys promise equal pixels, so frozen features may be shared by key.
    """

    @property
    def key(self) -> str: ...

    def load(self) -> Image:
        """The image in RGB, upright.

        Raises:
            DataError: the image cannot be read; the message names it.
        """
        ...


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image file of any format that Pillow reads."""

    path: Path

    @property
    def key(self) -> str:
        """SHA-256 of the file's bytes, read again only when the file's size or its time of change is another.

        Raises:
            DataError: the file cannot be read.
        """
        try:
            status = self.path.stat()
            if time.time_ns() - status.st_mtime_ns < SETTLED:
                # a second change within the clock's tick would leave no trace
                return _content(self.path)
            return _known_content(self.path, status.st_size, status.st_mtime_ns, status.st_ino)
        except OSError as error:
            raise DataError(f"image {str(self.path)!r} cannot be read: {error.strerror or error}") from error

    def load(self) -> Image:
        from chiasm.image import read_image

        return read_image(self.path)


def _content(path: Path) -> str:
    return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()


@lru_cache(maxsize=2**20)
def _known_content(path: Path, *_status: int) -> str:
    return _content(path)


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its answer; the answer is None where the model is to give it."""

    question: str
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """A dialogue about any number of images, none for text alone.

    Raises:
        DataError: no turn, an answer missing before the last turn, or `<image>` markers and images that disagree in
            number. The message names the sample.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[ImageSource, ...] = ()
    system: str | None = None

    def __post_init__(self) -> None:
        if not self.turns:
            raise DataError(f"sample {self.id!r} has no turn; it needs at least one question")
        unanswered = [i for i, turn in enumerate(self.turns[:-1]) if turn.answer is None]
        if unanswered:
            raise DataError(f"sample {self.id!r}: turn {unanswered[0]} has no answer; only the last turn may be open")
        markers = count_markers(self.turns)
        if markers and markers != len(self.images):
            raise DataError(
                f"sample {self.id!r} has {markers} {IMAGE_MARKER} markers and {len(self.images)} images; "
                "write one marker for each image, or none to put the images first"
            )


def count_markers(turns: Sequence[Turn]) -> int:
    """How many `<image>` markers the questions hold."""
    return sum(turn.question.count(IMAGE_MARKER) for turn in turns)
