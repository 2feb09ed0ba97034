"""YAML files whose errors name the file, the line and the field."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from chiasm.errors import ConfigError

Location = tuple[str | int, ...]
"""A path into nested mappings and lists: ("stages", 0, "lr")."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, except that 1e-3 is a number, as everyone expects."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong at one place of a configuration."""

    location: Location
    message: str


@dataclass(frozen=True, slots=True)
class Document:
    """The content of a configuration and where each part of it was written."""

    data: Any
    lines: dict[Location, tuple[Path, int]] = field(default_factory=dict)
    """Location to file and line, lines counted from 1; empty for data that came from no file."""
    path: Path | None = None

    def folder(self, location: Location = ()) -> Path | None:
        """The folder against which relative paths at a location are meant."""
        where = self._where(location)
        return where[0].parent if where else self.path.parent if self.path else None

    def fail(self, problems: Sequence[Problem]) -> ConfigError:
        """One error that lists all problems, each with its file and line."""
        return ConfigError("\n".join(self.describe(problem) for problem in problems))

    def describe(self, problem: Problem) -> str:
        """`run.yaml:12: stages.0.lr: message`."""
        name = ".".join(str(part) for part in problem.location)
        where = self._where(problem.location)
        prefix = f"{where[0]}:{where[1]}: " if where else f"{self.path}: " if self.path else ""
        return f"{prefix}{name + ': ' if name else ''}{problem.message}"

    def _where(self, location: Location) -> tuple[Path, int] | None:
        for length in range(len(location), 0, -1):
            if location[:length] in self.lines:
                return self.lines[location[:length]]
        return None

    def graft(self, location: Location, other: Document) -> None:
        """Puts the lines of an included file below a location; the caller has put its data there."""
        self.lines.update({location + below: line for below, line in other.lines.items()})


def load_yaml(path: Path) -> Document:
    """Reads one YAML file.

    Raises:
        ConfigError: the file is missing, is not YAML, or gives a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    loader = _Loader(text)
    lines: dict[Location, tuple[Path, int]] = {}
    try:
        node = loader.get_single_node()
        data = {} if node is None else _construct(loader, node, (), path, lines)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: this is not YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: this is not YAML: {error}") from error
    finally:
        loader.dispose()
    return Document(data, lines, path)


def _construct(
    loader: _Loader, node: yaml.Node, at: Location, path: Path, lines: dict[Location, tuple[Path, int]]
) -> Any:
    lines.setdefault(at, (path, node.start_mark.line + 1))
    if isinstance(node, yaml.SequenceNode):
        return [_construct(loader, item, (*at, i), path, lines) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    loader.flatten_mapping(node)
    result: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key, line = loader.construct_object(key_node), key_node.start_mark.line + 1
        if key in result:
            raise ConfigError(f"{path}:{line}: {'.'.join(map(str, (*at, key)))} is given twice; keep one")
        lines[(*at, key)] = (path, line)
        result[key] = _construct(loader, value_node, (*at, key), path, lines)
    return result


def problems_of(
    error: ValidationError, data: Any, prefix: Location = (), model: type[BaseModel] | None = None
) -> list[Problem]:
    """The problems that pydantic found in `data`, in the words of a configuration's user.

    Args:
        error: what pydantic raised.
        data: what was validated, to tell the parts of a location that the user wrote from pydantic's own.
        prefix: where `data` stands in its file.
        model: what `data` was validated against, for the names of the known fields.
    """
    found: dict[Location, list[str]] = {}
    for detail in error.errors():
        written: list[str | int] = []
        node = data
        for part in detail["loc"]:
            if _holds(node, part):
                node = node[part]
            elif detail["type"] != "missing" or part != detail["loc"][-1]:
                continue  # a branch of a union or a wrapped single value: pydantic's, not the user's
            written.append(part)
        messages = found.setdefault(prefix + tuple(written), [])
        message = _message(detail, model)
        if message not in messages:
            messages.append(message)
    return [Problem(location, "; or ".join(messages)) for location, messages in found.items()]


def _holds(node: Any, part: str | int) -> bool:
    """Whether a mapping or a list has such an entry."""
    if isinstance(node, Mapping):
        return part in node
    return isinstance(node, list | tuple) and isinstance(part, int) and part < len(node)


def _message(detail: Any, model: type[BaseModel] | None) -> str:
    if detail["type"] == "missing":
        return "is missing and has no default"
    if detail["type"] == "extra_forbidden":
        known = _fields(model, detail["loc"][:-1])
        close = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return f"unknown field.{hint}" + (f" Fields: {', '.join(known)}." if known else "")
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    message = detail["msg"].removeprefix("Input should be ")
    if message == detail["msg"]:
        return f"{message} (given {detail['input']!r})"
    return f"wanted {message}, given {detail['input']!r}"


def _fields(model: type[BaseModel] | None, location: Location) -> list[str]:
    """The field names of the model that a location leads to, where annotations tell it."""
    for part in location:
        if model is None:
            return []
        if isinstance(part, int):
            continue
        info = model.model_fields.get(part)
        model = _inner_model(info.annotation) if info is not None else model
    return list(model.model_fields) if model is not None else []


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if (model := _inner_model(argument)) is not None:
            return model
    return None
