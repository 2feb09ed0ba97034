"""What every benchmark shares: where results go and what stands in them."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("chiasm", "torch", "transformers", "timm", "ray", "optuna")


def write_result(
    name: str,
    *,
    figures: dict[str, Any],
    asked: str,
    met: bool,
    ratio: float | None = None,
    machine: str | None = None,
    versions: dict[str, str] | None = None,
    write: bool = True,
) -> None:
    """Writes benchmarks/results/NAME.json: command, versions, machine, figures, what was asked, and if it was met.

    Args:
        name: of the file.
        figures: ours and the peer's.
        asked: the bar, in words.
        met: whether the figures meet it.
        ratio: ours to the peer's.
        machine: where it was measured; None: here.
        versions: with which it was measured; None: those installed here.
        write: whether the file is written; else it is only printed.
    """
    result = {
        "command": shlex.join(["python", *(str(relative(word)) for word in sys.argv)]),
        "versions": versions or {"python": platform.python_version()} | {p: v for p in PACKAGES if (v := _version(p))},
        "machine": machine or _machine(),
        "figures": figures,
        "ratio": ratio,
        "asked": asked,
        "met": met,
    }
    if write:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def relative(word: str) -> str | Path:
    """A path below the repository as it is written from its root, the name alone of any other."""
    path = Path(word)
    if not path.exists():
        return word
    return path.resolve().relative_to(ROOT) if path.resolve().is_relative_to(ROOT) else path.name


def _machine() -> str:
    import os

    import torch

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        name = torch.cuda.get_device_name()
        return f"{f'{count} x ' if count > 1 else ''}{name}, {os.cpu_count()} CPU cores"
    return f"{platform.machine()}, {os.cpu_count()} CPU cores, no GPU"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
