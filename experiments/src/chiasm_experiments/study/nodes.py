"""Whether every node of the cluster has what this one has, asked before the first trial."""

from __future__ import annotations

import platform
import socket
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from chiasm.errors import ConfigError
from chiasm.registry import registry

PACKAGES = ("chiasm", "torch", "transformers", "timm")
"""Beside the distributions of all plugins, and Python."""
SECONDS = 120.0
"""How long a node may take to answer; it may have to make the environment of a job first."""

Versions = dict[str, str | None]
"""By package; None: it is not installed."""


def check_nodes() -> None:
    """Asks every node for the versions that a result depends on.

    Raises:
        ConfigError: a node has other ones, or does not answer: which node, which package, and both versions.
    """
    wanted = versions()
    asked = {}
    for node in ray.nodes():
        if node["Alive"]:
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"] = _ask.options(
                scheduling_strategy=here
            ).remote(sorted(wanted))
    found: dict[str, Versions] = {}
    silent = {}
    for name, reference in asked.items():
        try:
            found[name] = ray.get(reference, timeout=SECONDS)
        except GetTimeoutError:
            silent[name] = f"no answer within {SECONDS:g} s"
        except RayError as error:
            silent[name] = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    problems = [f"{name}: {why}" for name, why in silent.items()] + differences(wanted, found)
    if problems:
        raise ConfigError(
            f"the nodes of the cluster differ from {socket.gethostname()}, where the study was started, so that trials "
            "would not be comparable:\n"
            + "\n".join(f"  {problem}" for problem in problems)
            + "\ninstall the same versions on every node and start Ray there again, or take the node out of the cluster"
        )


def differences(wanted: Mapping[str, str | None], found: Mapping[str, Versions]) -> list[str]:
    """In which packages nodes differ from what is wanted, in words."""
    problems = []
    for node, has in found.items():
        for package in sorted({*wanted, *has}):
            here, there = wanted.get(package), has.get(package)
            if here != there:
                problems.append(f"{node}: {package} is {_told(there)} there and {_told(here)} here")
    return problems


def versions(also: list[str] | None = None) -> Versions:
    """The versions of this process's environment.

    Args:
        also: packages to look for even if they bring no plugin here.
    """
    found = registry()
    owners = {item.owner.partition(":")[0] for item in found.all()} | {name.partition(":")[0] for name in found.broken}
    names = {*PACKAGES, *owners, *(also or ())} - {"python"}
    return {"python": platform.python_version()} | {name: _version(name) for name in sorted(names)}


@ray.remote(num_cpus=0)  # type: ignore[untyped-decorator]
def _ask(also: list[str]) -> Versions:
    return versions(also)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _told(found: str | None) -> str:
    return found or "not installed"
