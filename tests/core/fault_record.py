"""How a deliberate fault is written down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T", bound=type)


@dataclass(frozen=True)
class Fault:
    """One deliberately wrong component, and what the kit must say of it."""

    kind: str
    cls: type
    check: str
    """The check that must fail."""
    message: str
    """A pattern that its message must match."""


class Recorder:
    """The components of one kind that are written in one file.

    Used as a decorator: `@fault("places", "column by column")` above a faulty class, `@fault.correct` above one that
    is right.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.faults: list[Fault] = []
        self.components: list[type] = []

    def __call__(self, check: str, message: str) -> Callable[[T], T]:
        def record(cls: T) -> T:
            self.faults.append(Fault(self.kind, cls, check, message))
            return cls

        return record

    def correct(self, cls: T) -> T:
        self.components.append(cls)
        return cls
