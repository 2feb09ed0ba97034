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
    """YAML as everyone expects it: 1e-3 is a number, and `on`, `no` and 2024-01-31 are the text that they are.

    PyYAML reads YAML 1.1, where they are text, truth values and a date.
    """


_TAG = "tag:yaml.org,2002:"

_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag not in (f"{_TAG}bool", f"{_TAG}timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    f"{_TAG}float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(f"{_TAG}bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))

_PLAIN_TAGS = {f"{_TAG}seq", f"{_TAG}map"}

MOST_VALUES = 100_000
"""Of one file. A few nested aliases can stand for more than any memory holds."""


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
        ConfigError: the file is missing, is not plain YAML, or gives a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    lines: dict[Location, tuple[Path, int]] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        data = {} if node is None else _Construction(loader, path, lines).value(node, ())
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        told = f"the character #x{error.character:04x} may not stand in it"
        raise ConfigError(f"{path}:{line}: this is not YAML: {told}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: this is not YAML: {error.problem or error.context}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: lists and mappings are nested too deeply for a configuration") from error
    return Document(data, lines, path)


@dataclass(frozen=True, slots=True)
class _Construction:
    """Plain values from the nodes of one file; notes where each was written."""

    loader: _Loader
    path: Path
    lines: dict[Location, tuple[Path, int]]
    inside: list[yaml.Node] = field(default_factory=list)
    """The lists and mappings around the node that is read: an alias to one of them would never end."""

    def value(self, node: yaml.Node, at: Location) -> Any:
        """The value of a node that stands at a location."""
        self.lines.setdefault(at, (self.path, node.start_mark.line + 1))
        if len(self.lines) > MOST_VALUES:
            raise self._error(node, f"more than {MOST_VALUES:,} values, by aliases of aliases perhaps")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if any(outer is node for outer in self.inside):
            raise self._error(node, "an alias inside what it stands for; a value cannot hold itself")
        if node.tag not in _PLAIN_TAGS:
            raise self._error(node, f"the tag {node.tag!r}; wanted plain lists and mappings")
        self.inside.append(node)
        result: Any
        if isinstance(node, yaml.MappingNode):
            result = self._mapping(node, at)
        else:
            result = [self.value(item, (*at, i)) for i, item in enumerate(node.value)]
        self.inside.pop()
        return result

    def _mapping(self, node: yaml.MappingNode, at: Location) -> dict[Any, Any]:
        own = {id(key_node) for key_node, _ in node.value}
        self.loader.flatten_mapping(node)  # puts what `<<` merges before the mapping's own fields
        fields: dict[Any, tuple[yaml.Node, yaml.Node]] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._error(key_node, "a list or a mapping as the name of a field; wanted text")
            key = self._scalar(key_node)
            if key in fields and id(fields[key][0]) in own:
                raise self._error(key_node, f"{'.'.join(map(str, (*at, key)))} is given twice; keep one")
            fields[key] = (key_node, value_node)
        node.value = list(fields.values())  # an alias may stand for this mapping, too
        for key, (key_node, _) in fields.items():
            self.lines[(*at, key)] = (self.path, key_node.start_mark.line + 1)
        return {key: self.value(value_node, (*at, key)) for key, (_, value_node) in fields.items()}

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        try:
            return self.loader.construct_object(node)
        except ValueError as error:  # `!!int two`
            kind = node.tag.rpartition(":")[2]
            raise self._error(node, f"{node.value!r} is no {kind}: {error}; quote it if text is meant") from error

    def _error(self, node: yaml.Node, message: str) -> ConfigError:
        return ConfigError(f"{self.path}:{node.start_mark.line + 1}: {message}")


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
    details = error.errors()
    for detail in details:
        if detail["type"] == "too_short" and any(_is_below(other["loc"], detail["loc"]) for other in details):
            continue  # pydantic does not count entries that are wrong
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


def _is_below(location: Location, other: Location) -> bool:
    return len(location) > len(other) and location[: len(other)] == other


def _holds(node: Any, part: str | int) -> bool:
    """Whether a mapping or a list has such an entry."""
    if isinstance(node, Mapping):
        return part in node
    return isinstance(node, list | tuple) and isinstance(part, int) and part < len(node)


_WANTED = {
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping of fields",
    "model_type": "a mapping of fields",
    "string_type": "text",
    "path_type": "a path",
    "float_type": "a number",
    "float_parsing": "a number",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "finite_number": "a finite number",
    "invalid_key": "text as the name of a field",
    "too_short": "{min_length} or more entries",
    "too_long": "at most {max_length} entries",
    "string_pattern_mismatch": "text that matches {pattern}",
}
"""What pydantic's types of error mean in the words of a YAML file."""


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
    if detail["type"] in _WANTED:
        return f"wanted {_WANTED[detail['type']].format(**detail.get('ctx', {}))}, given {detail['input']!r}"
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
