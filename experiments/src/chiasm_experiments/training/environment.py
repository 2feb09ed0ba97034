"""What a run was made with."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import chiasm
from chiasm.registry import registry

PACKAGES = ("torch", "transformers", "timm", "ray", "optuna", "numpy", "pillow", "scikit-learn")


def command() -> list[str]:
    """The command of this process."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def describe() -> dict[str, Any]:
    """Versions, revision and machine, as plain values."""
    owners = {item.owner.partition(":")[0] for item in registry().all()} | {"chiasm"}
    return {
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "plugins": {owner: _version(owner) for owner in sorted(owners)},
        "chiasm": str(Path(chiasm.__file__).parent),
        "git_revision": _revision(Path(chiasm.__file__).parent),
        "platform": platform.platform(),
        "host": platform.node(),
        "process": os.getpid(),
        "cpu_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


@cache
def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@cache  # of the code that this process runs, however often it is asked
def _revision(folder: Path) -> str | None:
    """The commit of the checkout that chiasm runs from, with `+` where files differ from it."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, env={**os.environ, "LC_ALL": "C"})
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
