"""The whole surface of a plugin: the hooks that chiasm calls, each optional."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import click

    from chiasm.component import Component, Kind

hookspec = pluggy.HookspecMarker("chiasm")


@hookspec
def chiasm_components() -> Iterable[Component]:  # type: ignore[empty-body]
    """The components of this distribution, named but not imported."""


@hookspec
def chiasm_kinds() -> Iterable[Kind]:  # type: ignore[empty-body]
    """Kinds of component that this distribution defines."""


@hookspec
def chiasm_commands(cli: click.Group) -> None:
    """Adds commands to the `chiasm` command line; import what is heavy inside the command."""


@hookspec
def chiasm_run_started(folder: Path, manifest: Mapping[str, Any]) -> None:
    """A run is about to train; `manifest` holds its whole configuration and what is frozen."""


@hookspec
def chiasm_metrics(folder: Path, stage: str, step: int, metrics: Mapping[str, float]) -> None:
    """Metrics of one optimiser step of a stage (loss, tokens/s, ...), from rank 0."""


@hookspec
def chiasm_run_ended(folder: Path, manifest: Mapping[str, Any]) -> None:
    """A run has ended; `manifest` holds its status, cost and scores."""
