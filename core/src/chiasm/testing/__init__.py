"""The contract kit: what every component promises, as functions that anyone can run on a class of their own.

    run_checks("encoder", Mine)                  a result for each check; `chiasm check encoder mine` prints them

    from chiasm.testing import EncoderContract   with pytest: a test for each check

    class TestMine(EncoderContract):
        component_class = Mine

A check takes a component class, makes small instances of it with `tiny()`, and raises `ContractError` where a promise
is broken. Nothing is downloaded and pytest is not needed to run checks.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from chiasm.testing.check import Check, CheckResult, checks_of, run_check, run_checks
from chiasm.testing.errors import ContractError

if TYPE_CHECKING:
    from chiasm.testing.suites import (
        AdapterContract,
        Contract,
        EncoderContract,
        FusionContract,
        LanguageModelContract,
    )

__all__ = [
    "AdapterContract",
    "Check",
    "CheckResult",
    "Contract",
    "ContractError",
    "EncoderContract",
    "FusionContract",
    "LanguageModelContract",
    "checks_of",
    "run_check",
    "run_checks",
]


def __getattr__(name: str) -> object:
    # the suites import the checks of all kinds, and with them torch
    if name in __all__:
        return getattr(importlib.import_module("chiasm.testing.suites"), name)
    raise AttributeError(f"module 'chiasm.testing' has no attribute {name!r}")
