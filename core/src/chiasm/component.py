"""`Component`: the light record by which a plugin announces one class."""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")
_TARGET = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of component and the interface that its classes subclass.

    Args:
        name: what users write, say `encoder`.
        interface: `package.module:Class` of the abstract base, imported on first use.
        summary: one line for `chiasm plugins`.
        checks: `package.module:NAME` of the tuple of checks that `chiasm check` runs, imported on first use.
    """

    name: str
    interface: str
    summary: str = ""
    checks: str = ""


@dataclass(frozen=True, slots=True)
class Component:
    """One class that a plugin offers, named but not imported.

    Args:
        kind: `encoder`, `fusion`, `adapter`, `llm`, `dataset`, `benchmark`, or a kind that another plugin defines.
        name: the exact name in a configuration: lower case letters, digits, `_`, `.`, `-`.
        target: `package.module:Class`, imported on first use.
        summary: one line for `chiasm plugins`.

    Raises:
        ValueError: the name or the target is malformed.
    """

    kind: str
    name: str
    target: str
    summary: str = ""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"component name {self.name!r}: wanted lower case letters, digits, '_', '.' or '-', say 'my-encoder'"
            )
        if not _TARGET.fullmatch(self.target):
            raise ValueError(f"component target {self.target!r}: wanted 'package.module:Class'")
