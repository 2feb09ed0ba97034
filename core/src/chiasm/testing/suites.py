"""Contracts as pytest classes: subclass one, name the component, and every check is a test.

    class TestMine(EncoderContract):
        component_class = Mine
        xfails = {"seeded": "weights come from a vendor's own generator"}

A check in `xfails` must fail: one that passes, or that does not exist, is an error.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from chiasm.testing import adapter_checks, encoder_checks, fusion_checks, llm_checks
from chiasm.testing.check import Check, isolated


class Contract:
    """The base of all contracts; a kind's contract sets `checks`, an author's class sets `component_class`."""

    checks: ClassVar[tuple[Check, ...]] = ()
    """The checks of the kind."""
    component_class: ClassVar[type | None] = None
    """What is tested."""
    xfails: ClassVar[Mapping[str, str]] = {}
    """Checks that this component cannot pass, and why."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for check in cls.checks if cls.component_class is not None else ():
            setattr(cls, f"test_{check.__name__}", _test(check))

    def test_xfails_name_checks(self) -> None:
        """Every name in `xfails` is that of a check."""
        names = [check.__name__ for check in self.checks]
        for name in self.xfails:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise AssertionError(f"xfails: no check named {name!r}.{hint} Checks: {', '.join(names)}")


def _test(check: Check) -> Callable[[Contract], None]:
    def test(self: Contract) -> None:
        reason = self.xfails.get(check.__name__)
        if reason is None:
            with isolated():
                check(self.component_class)
            return
        import pytest  # only here, so that the kit is usable without it

        try:
            with isolated():
                check(self.component_class)
        except Exception as error:
            pytest.xfail(f"{reason}: {error}")
        pytest.fail(f"{check.__name__} passes and is listed in xfails ({reason}); remove it there")

    test.__name__ = f"test_{check.__name__}"
    test.__doc__ = check.__doc__
    return test


class EncoderContract(Contract):
    """What every encoder promises."""

    checks = encoder_checks.CHECKS


class FusionContract(Contract):
    """What every fusion promises."""

    checks = fusion_checks.CHECKS


class AdapterContract(Contract):
    """What every adapter promises."""

    checks = adapter_checks.CHECKS


class LanguageModelContract(Contract):
    """What every language model promises."""

    checks = llm_checks.CHECKS
