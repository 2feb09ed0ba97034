"""The two kinds of component that experiments define: data sets to train on and benchmarks to be scored by."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from chiasm.sample import ImageSource, Sample
from chiasm.settings import Settings


class Dataset(ABC):
    """Samples in a fixed order: sample i is the same in every process.

    A subclass has a `Config`, takes it as its only argument, and reads nothing before `check` or the first sample.
    """

    Config: ClassVar[type[Settings]]

    def __init__(self, config: Settings) -> None:
        self.config = config

    @classmethod
    @abstractmethod
    def tiny(cls) -> Self:
        """A small instance for tests, made without a download."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample: ...

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def identity(self) -> str:
        """A name that is equal only for equal samples: results of stages are shared by it.

        This one holds the class, the settings, and the content of each file that a setting names. A data set that
        reads more, or draws from something else, adds to it. Images in a folder are taken to keep their names.
        """
        files = {
            name: _digest(value)
            for name in type(self.config).model_fields
            if isinstance(value := getattr(self.config, name), Path) and value.is_file()
        }
        kind = f"{type(self).__module__}:{type(self).__qualname__}"
        known: list[Any] = [kind, self.config.model_dump(mode="json"), files]
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()

    def check(self) -> None:  # noqa: B027 -- nothing to look for is a fine answer
        """Looks for what would stop training later: missing files, no sample, an unreadable image.

        Raises:
            DataError: what is wrong, with the name of the file or the sample.
        """


@dataclass(frozen=True, slots=True)
class Question:
    """One question of a benchmark.

    Args:
        id: unique in the benchmark and the same in every run, so that models are compared on equal questions.
        text: what the model is asked, with any instruction about the form of the answer.
        references: accepted answers.
        images: what the question is about.
        cluster: questions that share it are not independent (one image), so errors are clustered by it.
        skill: the category that tables group by.
        chance: expected score of a guess that sees the question alone, in [0, 1].
    """

    id: str
    text: str
    references: tuple[str, ...]
    images: tuple[ImageSource, ...]
    cluster: str
    skill: str
    chance: float
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Score:
    """The score of one response.

    Args:
        value: in [0, 1], or None where it could not be scored (never silently 0).
        parsed: the answer that was read from the response, None where there was none.
        status: `scored`, or `unparsed` (counted apart; `value` is then what the benchmark's rule says), or
            `not_scored` (no judge, say; `value` is None).
    """

    value: float | None
    parsed: str | None
    status: Literal["scored", "unparsed", "not_scored"] = "scored"


class Benchmark(ABC):
    """Questions with exact rules of scoring. A subclass has a `Config` and takes it as its only argument."""

    Config: ClassVar[type[Settings]]
    max_new_tokens: ClassVar[int] = 16
    """The longest answer that the scoring rule needs, in tokens."""

    def __init__(self, config: Settings) -> None:
        self.config = config

    @classmethod
    @abstractmethod
    def tiny(cls) -> Self:
        """A small instance for tests, made without a download."""

    @property
    @abstractmethod
    def split(self) -> str:
        """Which part of the benchmark is asked, say `test`."""

    @abstractmethod
    def questions(self) -> Sequence[Question]:
        """All questions, in a fixed order."""

    @abstractmethod
    def score(self, question: Question, response: str) -> Score:
        """Scores the model's text against the question's references; pure."""

    def check(self) -> None:  # noqa: B027 -- nothing to look for is a fine answer
        """Looks for what would stop the evaluation later.

        Raises:
            DataError: what is wrong, with the name of the file or the question.
        """


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
