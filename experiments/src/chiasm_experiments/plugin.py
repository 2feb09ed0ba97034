"""What chiasm-experiments offers: two kinds, data sets and benchmarks, and the commands that run them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from chiasm.plugin import Component, Kind, hookimpl

if TYPE_CHECKING:
    import click


@hookimpl
def chiasm_kinds() -> Iterator[Kind]:
    """What is trained on and what is asked."""
    home, checks = "chiasm_experiments.interfaces", "chiasm_experiments.testing"
    yield Kind("dataset", f"{home}:Dataset", "samples to train on", f"{checks}:DATASET_CHECKS")
    yield Kind("benchmark", f"{home}:Benchmark", "questions to be scored by", f"{checks}:BENCHMARK_CHECKS")


@hookimpl
def chiasm_components() -> Iterator[Component]:
    """The built-in world, and data in LLaVA's format."""
    world = "chiasm_experiments.world"
    yield Component("dataset", "world", f"{world}.dataset:WorldDataset", "captions or dialogues of generated scenes")
    yield Component("dataset", "llava", "chiasm_experiments.data.llava:LlavaDataset", "a JSON file in LLaVA's format")
    yield Component("benchmark", "world", f"{world}.benchmark:WorldBenchmark", "questions with exact answers by skill")


@hookimpl
def chiasm_commands(cli: click.Group) -> None:
    """Everything that runs: plan, train, sweep, evaluate, report, ask."""
    from chiasm_experiments.commands import COMMANDS

    for command in COMMANDS:
        cli.add_command(command)
