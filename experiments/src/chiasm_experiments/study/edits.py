"""What changed in a study since its folder was begun, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

SETTINGS = "settings that change no result of a finished trial"
SHOWN = 5
"""So many names are told one by one."""
OF_THE_CELLS = ("name", "base", "factors", "when", "design", "cells", "constraints", "invalid", "seeds", "fidelities")
"""Settings whose effect is told by the cells and trials that they bring and take away."""


def changes(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each change of what the study is.

    Args:
        earlier: study.json as the folder has it.
        now: as it would be written.
    """
    yield from _factors(earlier["factors"], now["factors"])
    for what in ("seeds", "fidelities"):
        yield from _listed(what, earlier.get(what) or [], now[what])
    for what in ("design", "control", "objective"):
        if earlier.get(what) != now[what]:
            yield f"{what} was {_short(earlier.get(what))}, is {_short(now[what])}"
    settings = list(_settings(earlier.get("config") or {}, now["config"]))
    if settings:
        yield f"{SETTINGS}: {', '.join(settings)}"


def some(names: Sequence[str]) -> str:
    """A few names of many."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _factors(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    yield from _listed("factors", list(earlier), list(now))
    for path in now:
        if path not in earlier or earlier[path] == now[path]:
            continue
        if isinstance(earlier[path], list) and isinstance(now[path], list):
            before = [label for label in earlier[path] if label != "base"]
            yield from _listed(f"levels of {path}", before, [label for label in now[path] if label != "base"])
        else:
            yield f"factor {path} was {_short(earlier[path])}, is {_short(now[path])}"


def _listed(what: str, earlier: Sequence[Any], now: Sequence[Any]) -> Iterator[str]:
    added = [str(item) for item in now if item not in earlier]
    removed = [str(item) for item in earlier if item not in now]
    if added:
        yield f"{what} added: {some(added)}"
    if removed:
        yield f"{what} removed: {some(removed)}"
    if not added and not removed and list(earlier) != list(now):
        yield f"{what} in another order"


def _settings(earlier: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in now.items():
        before = earlier.get(name)
        if before == value or (not prefix and name in (*OF_THE_CELLS, "control", "objective")):
            continue
        if isinstance(value, dict) and isinstance(before, dict) and not prefix:
            yield from _settings(before, value, f"{name}.")
        else:
            yield f"{prefix}{name}"


def _short(value: Any) -> str:
    return "none" if value is None else str(value)
