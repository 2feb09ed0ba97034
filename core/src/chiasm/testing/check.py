"""Finding the checks of a kind and running them."""

from __future__ import annotations

import importlib
import json
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chiasm.errors import PluginError
from chiasm.registry import registry
from chiasm.testing.errors import ContractError

Check = Callable[[Any], None]
"""Takes a component class and raises `ContractError` where it breaks one promise. Its name is the check's name, the
first line of its docstring says what is promised."""

_CORE = Path(__file__).parents[1]
_PYTHON = Path(json.__file__).parents[1]
_LIBRARIES = {"torch", "transformers", "timm", "numpy", "pydantic", "PIL", "contextlib.py", "<string>"}
"""Parts of a path that no author's file has; a generated `__init__` is in `<string>`."""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The outcome of one check."""

    name: str
    passed: bool
    message: str
    """What is wrong; empty where the check passed."""
    seconds: float


def checks_of(kind: str) -> tuple[Check, ...]:
    """The checks of a kind, as its record names them.

    Raises:
        PluginError: there is no such kind, or it names no checks, or they cannot be imported.
    """
    kinds = registry().kinds
    if kind not in kinds:
        raise PluginError(f"no kind of component named {kind!r}. Kinds: {', '.join(kinds)}")
    target = kinds[kind].checks
    if not target:
        raise PluginError(
            f"the kind {kind!r} has no checks; its owner can name them: Kind(checks='package.module:NAME')"
        )
    module, _, name = target.partition(":")
    try:
        checks: tuple[Check, ...] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise PluginError(f"the checks of kind {kind!r} cannot be imported from {target!r}: {error}") from error
    return checks


def run_checks(kind: str, cls: type) -> list[CheckResult]:
    """Runs every check of a kind on a component class; a failure stops none of the others."""
    return [run_check(check, cls) for check in checks_of(kind)]


def run_check(check: Check, cls: type) -> CheckResult:
    """Runs one check on a component class."""
    start = time.perf_counter()
    passed, message = False, ""
    try:
        with isolated():
            check(cls)
        passed = True
    except ContractError as error:
        message = str(error)
    except Exception as error:
        message = describe(error)
    return CheckResult(check.__name__, passed, message, time.perf_counter() - start)


@contextmanager
def isolated() -> Iterator[None]:
    """Gives a check random numbers of its own, the same in every run, and leaves the process's as they were.

    One thread is enough for tiny models, and on a busy machine it is far quicker than threads that wait for each other.
    """
    import torch

    from chiasm.testing.process import settings_kept

    with settings_kept(), torch.random.fork_rng(devices=[]):
        torch.set_num_threads(1)
        torch.default_generator.manual_seed(0)  # torch.manual_seed would reseed accelerators too
        yield


def describe(error: BaseException) -> str:
    """An exception of a component in one line, with the place in the author's code that it came from."""
    return f"{type(error).__name__}: {str(error) or 'no message'}{place(traceback.extract_tb(error.__traceback__))}"


def place(frames: Sequence[traceback.FrameSummary]) -> str:
    """The innermost place in the author's own code, for messages; empty where there is none."""
    own = [frame for frame in frames if _by_an_author(Path(frame.filename))]
    return f" (at {own[-1].filename}:{own[-1].lineno}, in {own[-1].name})" if own else ""


def _by_an_author(file: Path) -> bool:
    if file.is_relative_to(_CORE) or _LIBRARIES & set(file.parts):
        return False
    # plugins may be installed beneath Python's own modules
    return not file.is_relative_to(_PYTHON) or bool({"site-packages", "dist-packages"} & set(file.parts))
