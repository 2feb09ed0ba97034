"""Finds plugins and resolves (kind, name) to a class, importing it on first use.

One entry point of each distribution, in the group `chiasm`, names a light module that implements the hooks of
`chiasm.hookspecs`. Each is loaded on its own: a broken one is reported and disables nothing else.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

import pluggy

from chiasm import hookspecs, kinds
from chiasm.component import Component, Kind
from chiasm.errors import DuplicateComponentError, PluginError, UnknownComponentError

if TYPE_CHECKING:
    import click

GROUP = "chiasm"
ALLOW_VARIABLE = "CHIASM_PLUGINS"
"""Environment variable: comma-separated distributions that may load; unset, all may."""


@dataclass(frozen=True, slots=True)
class Registered:
    """A component and the distribution that owns it."""

    component: Component
    owner: str


class Registry:
    """The installed components of a process.

    Args:
        found: the entry points to load; None takes the installed ones of the group `chiasm`.
    """

    def __init__(self, found: Iterable[EntryPoint] | None = None) -> None:
        self.plugins = pluggy.PluginManager("chiasm")
        self.plugins.add_hookspecs(hookspecs)
        self.broken: dict[str, str] = {}
        """Owner of each plugin that could not be loaded, and its error."""
        self.kinds: dict[str, Kind] = {}
        self._owned: dict[tuple[str, str], list[Registered]] = {}
        self.plugins.register(kinds, name="chiasm")
        for point in _installed() if found is None else found:
            self._load(point)
        self._collect()

    def _load(self, point: EntryPoint) -> None:
        owner = _owner(point)
        if owner in self.broken or self.plugins.has_plugin(owner):  # a second entry point of one distribution
            owner = f"{owner}:{point.name}"
        try:
            module = point.load()
            self.plugins.register(module, name=owner)
            self.plugins.check_pending()
        except (Exception, SystemExit) as error:  # whatever a stranger's module raises must not stop the others
            if self.plugins.get_plugin(owner) is not None:
                self.plugins.unregister(name=owner)
            self.broken[owner] = f"{type(error).__name__}: {error}"

    def _collect(self) -> None:
        for kind, owner in self._each("chiasm_kinds", Kind):
            if kind.name in self.kinds and self.kinds[kind.name] != kind:
                self.broken[owner] = f"DuplicateKind: it defines the kind {kind.name!r} again"
            else:
                self.kinds[kind.name] = kind
        for component, owner in self._each("chiasm_components", Component):
            if component.kind in self.kinds:
                self._owned.setdefault((component.kind, component.name), []).append(Registered(component, owner))
            else:
                self.broken[owner] = (
                    f"UnknownKind: {component.name!r} is of kind {component.kind!r}; kinds: {', '.join(self.kinds)}"
                )

    def _each(self, hook: str, record: type) -> list[tuple]:
        """Calls a hook plugin by plugin, so that one that raises loses only its own records."""
        pairs: list[tuple] = []
        for owner, module in self.plugins.list_name_plugin():
            if module is None:  # a name that was unregistered stays listed
                continue
            try:
                for result in self._hook(hook, module)():
                    for item in result:
                        if not isinstance(item, record):
                            raise TypeError(f"{hook} yielded {item!r}; wanted chiasm.plugin.{record.__name__} records")
                        pairs.append((item, owner))
            except Exception as error:
                self.broken[owner] = f"{type(error).__name__}: {error}"
                pairs = [pair for pair in pairs if pair[1] != owner]
        return pairs

    def _hook(self, name: str, module: object) -> pluggy.HookCaller:
        """A hook as one plugin alone implements it."""
        others = [other for other in self.plugins.get_plugins() if other is not module]
        return self.plugins.subset_hook_caller(name, others)

    def add_commands(self, cli: click.Group) -> None:
        """Has each plugin add its commands; one that raises is reported as broken and stops no other."""
        for owner, module in self.plugins.list_name_plugin():
            if module is None:
                continue
            try:
                self._hook("chiasm_commands", module)(cli=cli)
            except Exception as error:
                self.broken[owner] = f"its commands cannot be added: {type(error).__name__}: {error}"

    def names(self, kind: str) -> list[str]:
        """The names of a kind, sorted.

        Raises:
            UnknownComponentError: no such kind.
        """
        if kind not in self.kinds:
            raise UnknownComponentError(f"no kind of component named {kind!r}. Kinds: {', '.join(self.kinds)}.")
        return sorted(name for owned_kind, name in self._owned if owned_kind == kind)

    def all(self) -> list[Registered]:
        """Every component, duplicates included, sorted by kind and name."""
        return sorted(
            (item for items in self._owned.values() for item in items),
            key=lambda item: (list(self.kinds).index(item.component.kind), item.component.name, item.owner),
        )

    def duplicates(self) -> dict[tuple[str, str], list[str]]:
        """Each (kind, name) that has several owners, and the owners."""
        return {key: sorted(i.owner for i in items) for key, items in self._owned.items() if len(items) > 1}

    def get(self, kind: str, name: str) -> Registered:
        """The record of a component, without importing its class.

        Raises:
            UnknownComponentError: no such name; the message gives the closest match and what is installed.
            DuplicateComponentError: two distributions own the name; the message names both.
        """
        items = self._owned.get((kind, name))
        if items is None:
            raise UnknownComponentError(self._unknown(kind, name))
        if len(items) > 1:
            owners = " and ".join(sorted(item.owner for item in items))
            raise DuplicateComponentError(
                f"{kind} {name!r} is offered by {owners}; uninstall one, or set {ALLOW_VARIABLE} to those you want"
            )
        return items[0]

    def load(self, kind: str, name: str) -> type:
        """The class of a component, imported now.

        Raises:
            PluginError: the import fails, or the class does not implement the interface of its kind.
        """
        registered = self.get(kind, name)
        target = registered.component.target
        try:
            cls = _import(target)
        except Exception as error:
            raise PluginError(
                f"{kind} {name!r} of {registered.owner} cannot be imported from {target!r}: "
                f"{type(error).__name__}: {error}"
            ) from error
        interface = _import(self.kinds[kind].interface)
        if not (isinstance(cls, type) and issubclass(cls, interface)):
            raise PluginError(
                f"{kind} {name!r} of {registered.owner}: {target!r} does not subclass {self.kinds[kind].interface!r}"
            )
        return cls

    def _unknown(self, kind: str, name: str) -> str:
        names = self.names(kind)
        close = difflib.get_close_matches(name, names, n=1)
        lines = [f"no {kind} named {name!r}."]
        if close:
            lines[0] += f" Did you mean {close[0]!r}?"
        lines[0] += f" Installed: {', '.join(names) or 'none'}."
        lines += [f"Plugin {owner} is broken and offers nothing: {error}" for owner, error in self.broken.items()]
        return "\n".join(lines)


def _import(target: str) -> type:
    module, _, attribute = target.partition(":")
    found: type = getattr(importlib.import_module(module), attribute)
    return found


def _owner(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.name


def _installed() -> list[EntryPoint]:
    """The entry points of the group, each once: an editable install can be listed twice on sys.path."""
    allowed = os.environ.get(ALLOW_VARIABLE)
    names = None if allowed is None else {name.strip() for name in allowed.split(",")}
    unique = {(_owner(point), point.value): point for point in entry_points(group=GROUP)}
    return [point for (owner, _), point in sorted(unique.items()) if names is None or owner in names]


@functools.cache
def registry() -> Registry:
    """The registry of this process, built on first use."""
    return Registry()
