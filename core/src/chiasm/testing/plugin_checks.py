"""What the plugin module of every distribution promises."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from importlib.metadata import entry_points
from typing import Any

from chiasm.registry import GROUP, registry
from chiasm.testing.common import require

HEAVY = ("torch", "transformers", "timm", "ray", "optuna")
"""What listing the installed components must not import."""

_LIST = """
import importlib, json, sys
sys.path[:] = json.loads(sys.argv[1])
module = importlib.import_module(sys.argv[2])
if hasattr(module, "chiasm_components"):
    list(module.chiasm_components())
print(json.dumps([name for name in json.loads(sys.argv[3]) if name in sys.modules]))
"""


def light(cls: Any) -> None:
    """The plugin module that lists the component imports nothing heavy, so that `chiasm plugins` stays quick."""
    for module in _plugin_modules(cls):
        heavy, error = _heavy(module)
        require(not error, f"the plugin module {module} cannot be imported in a new process: {error}")
        require(
            not heavy,
            f"importing the plugin module {module} imports {', '.join(heavy)}: keep component classes in modules of "
            "their own and name them as 'package.module:Class'",
        )


def _plugin_modules(cls: type) -> list[str]:
    """The plugin modules of the distributions that offer a class; none where it is not installed."""
    owners = set()
    for item in registry().all():
        module, _, name = item.component.target.partition(":")
        if getattr(sys.modules.get(module), name, None) is cls:
            owners.add(item.owner.partition(":")[0])
    points = entry_points(group=GROUP)
    return sorted({point.module for point in points if point.dist is not None and point.dist.name in owners})


@functools.cache
def _heavy(module: str) -> tuple[list[str], str]:
    """What is imported with a plugin module in a process of its own, or why it cannot be imported."""
    command = [sys.executable, "-c", _LIST, json.dumps(sys.path), module, json.dumps(HEAVY)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return [], done.stderr.strip().rpartition("\n")[2]
    found: list[str] = json.loads(done.stdout.strip().rpartition("\n")[2])  # the module may print of its own
    return found, ""
