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
    """A run is about to train, or to go on; `manifest` holds its trial, its whole configuration and what is frozen."""


@hookspec
def chiasm_metrics(folder: Path, stage: str, step: int, metrics: Mapping[str, float]) -> None:
    """Metrics of one optimiser step of a stage (loss, tokens/s, ...), from rank 0; a run that goes on repeats some."""


@hookspec
def chiasm_stage_ended(folder: Path, stage: str, result: Mapping[str, Any]) -> None:
    """A stage is trained, or was found finished; `result` holds what it cost and came to."""


@hookspec
def chiasm_run_ended(folder: Path, manifest: Mapping[str, Any]) -> None:
    """A run has ended; `manifest` holds its status: `complete` with cost and scores, `pruned` with its learning curve,
    `failed` with its error, or `stopped`, to be taken up again."""
