"""Fields of a run by their dotted paths: where a path leads, and a run with some of its fields replaced."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from chiasm.config import RunConfig, include_data, parse_run, resolve
from chiasm.yamlfile import Document, Location, Problem

COMPONENTS = (("vision", "fusion"), ("vision", "adapter"), ("llm",))
LISTS = (("vision", "encoders"), ("stages", int, "data"), ("evaluate",))
"""Where components stand: alone, and in lists that a single one may stand for."""


@dataclass(frozen=True, slots=True)
class Replacement:
    """A field of a run and what it is to be.

    Args:
        path: of the field, say `stages.pretrain.lr`; entries of lists by name or by index.
        value: plain data, as a YAML file gives it.
        source: the file that asks for it.
        place: where in that file the value stands.
    """

    path: str
    value: Any
    source: Document
    place: Location


def replaced(base: Document, replacements: Iterable[Replacement]) -> RunConfig:
    """A run with fields replaced, read as if it had been written so; a field within another is replaced after it.

    Fields on the way to one that the base leaves to their defaults are made.

    Raises:
        ConfigError: a path leads nowhere, two lead to one field, or the run is wrong; with file, line and field.
    """
    document = Document(copy.deepcopy(base.data), dict(base.lines), base.path)
    include_data(document)
    _write_out(document.data)
    paths: dict[Location, str] = {}
    for item in sorted(replacements, key=lambda item: item.path.count(".")):
        try:
            location = _make_way(document.data, item.path)
            if location in paths:
                raise LookupError(f"this is the same field as {paths[location]!r}; keep one")
        except LookupError as error:
            raise item.source.fail([Problem(item.place, str(error))]) from None
        paths[location] = item.path
        _place(document, location, item)
        include_data(document)
        _write_out(document.data)
    return parse_run(document)


def content(run: RunConfig) -> dict[str, Any]:
    """A run as plain values with every default written out, those of its components too: equal for equal runs."""
    values: dict[str, Any] = run.model_dump(mode="json")
    for location, kind, ref in run.components():
        options = resolve(kind, ref)[1].model_dump(mode="json")
        _at(values, location[:-1])[location[-1]] = {"name": ref.name, **options}
    return values


def value_at(data: Any, path: str) -> Any:
    """What stands at a path.

    Raises:
        LookupError: nothing does.
    """
    location: Location = ()
    for name in path.split("."):
        location = _step(data, location, name)
        if location[-1:] == (name,) and name not in _at(data, location[:-1]):
            raise LookupError(f"no field {path!r}")
    return _at(data, location)


def _make_way(data: Any, path: str) -> Location:
    """The location of a path, with all that leads there made where it is missing.

    Raises:
        LookupError: it leads nowhere.
    """
    location: Location = ()
    for name in path.split("."):
        node = _at(data, location[:-1]) if location else None
        if isinstance(node, dict):
            node.setdefault(location[-1], {})
        location = _step(data, location, name)
    return location


def _step(data: Any, location: Location, name: str) -> Location:
    """The location after one step of a path; of a mapping it may be a field that is missing.

    Raises:
        LookupError: there is no such entry, or nothing to have one.
    """
    node = _at(data, location)
    where = ".".join(map(str, location)) or "the run"
    if isinstance(node, list):
        names = [item.get("name") if isinstance(item, dict) else item for item in node]
        if names.count(name) == 1:
            return (*location, names.index(name))
        if name.isdigit() and int(name) < len(node):
            return (*location, int(name))
        if len(node) == 1 and _matches(location, LISTS) and not name.isdigit():
            return _step(data, (*location, 0), name)  # the only entry need not be named on the way to its fields
        if names.count(name) > 1:
            raise LookupError(f"{where} has several entries {name!r}; name one by its index, counted from 0")
        raise LookupError(f"{where} has no entry {name!r}; entries: {names}")
    if not isinstance(node, dict):
        raise LookupError(f"{where} is {node!r} in the base run, so it has no field {name!r}")
    # a single component where a list may stand is its own only entry
    return location if _matches(location, LISTS) and name in ("0", node.get("name")) else (*location, name)


def _place(document: Document, location: Location, item: Replacement) -> None:
    """Puts a value where it belongs, and the lines of what is gone and of what came."""
    _at(document.data, location[:-1])[location[-1]] = copy.deepcopy(item.value)
    lines, place = document.lines, item.place
    for at in [at for at in lines if at[: len(location)] == location]:
        del lines[at]
    lines.update({location + at[len(place) :]: n for at, n in item.source.lines.items() if at[: len(place)] == place})
    for n in range(1, len(location) if location in lines else 0):
        lines.setdefault(location[:n], lines[location])  # an unknown field on the way: the line that asked for it


def _write_out(data: Any) -> None:
    """Writes components that stand as a name alone as mappings, so that paths lead into their options."""
    if not isinstance(data, dict):
        return
    stages = data.get("stages")
    one_or_many: list[Location] = [("stages", i, "data") for i in range(len(stages) if isinstance(stages, list) else 0)]
    places: list[Location] = [*COMPONENTS, *one_or_many, ("evaluate",)]
    for place in (*one_or_many, ("evaluate",), ("vision", "encoders")):
        node = _find(data, place)
        places += [(*place, i) for i in range(len(node) if isinstance(node, list) else 0)]
    for place in places:
        if isinstance(name := _find(data, place), str):
            _at(data, place[:-1])[place[-1]] = {"name": name}


def _at(data: Any, location: Location) -> Any:
    for part in location:
        data = data[part]
    return data


def _find(data: Any, location: Location) -> Any:
    """What stands at a location, None where it is not what a run has there."""
    for part in location:
        known = part in data if isinstance(data, dict) else isinstance(data, list) and isinstance(part, int)
        if not known:
            return None
        data = data[part]
    return data


def _matches(location: Location, patterns: tuple[tuple[Any, ...], ...]) -> bool:
    return any(
        len(location) == len(pattern)
        and all(
            part == wanted or (wanted is int and isinstance(part, int))
            for part, wanted in zip(location, pattern, strict=True)
        )
        for pattern in patterns
    )
