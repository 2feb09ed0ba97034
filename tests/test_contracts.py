"""Every installed component keeps the contract of its kind, and the contracts of data sets and benchmarks are real.

The contracts of the core's own kinds are tried on deliberate faults in `core/test_testing_kit.py`.
"""

from __future__ import annotations

import inspect

import pytest

from chiasm.errors import PluginError
from chiasm.registry import registry
from chiasm.testing import checks_of, run_check
from chiasm_experiments.testing import BenchmarkContract, DatasetContract
from record_faults import CORRECT, FAULTS, GoodBenchmark, GoodDataset

OWN = {"config", "options", "missing_checkpoint", "light", "chat"}
"""What a published model changes in a family: its configuration and what it names."""


def installed() -> list:
    """Each check of each component that is installed, by name.

    A published model by name that has neither code nor a tiny instance of its own is checked for what is its own;
    `benchmarks/contract_faults.py` asks all of every component.
    """
    cases, seen = [], set()
    for item in registry().all():
        kind, name = item.component.kind, item.component.name
        try:
            checks = checks_of(kind)
        except PluginError:  # `test_every_kind_has_checks` tells
            continue
        if kind in ("encoder", "llm"):
            key = code_and_geometry(kind, name)
            checks = [check for check in checks if key not in seen or check.__name__ in OWN]
            seen.add(key)
        cases += [pytest.param(kind, name, check, id=f"{kind}-{name}-{check.__name__}") for check in checks]
    return cases


def code_and_geometry(kind: str, name: str) -> tuple:
    """What two components have in common that differ in their defaults alone."""
    try:
        cls = registry().load(kind, name)
        code = next(base for base in cls.__mro__ if any(map(inspect.isroutine, vars(base).values())))
        return code, repr(cls.tiny().geometry)
    except Exception:  # its checks tell
        return kind, name


@pytest.mark.parametrize(("kind", "name", "check"), installed())
def test_installed_component_keeps_its_contract(kind, name, check):
    result = run_check(check, registry().load(kind, name))
    assert result.passed, result.message


@pytest.mark.parametrize("kind", list(registry().kinds))
def test_every_kind_has_checks(kind):
    names = [check.__name__ for check in checks_of(kind)]
    assert names
    assert len(set(names)) == len(names)
    assert all(check.__doc__ for check in checks_of(kind))


def test_no_plugin_is_broken_and_no_name_has_two_owners():
    assert registry().broken == {}
    assert registry().duplicates() == {}


@pytest.mark.parametrize(("kind", "cls"), CORRECT, ids=[f"{kind}-{cls.__name__}" for kind, cls in CORRECT])
def test_a_correct_component_passes_every_check(kind, cls):
    results = [run_check(check, cls) for check in checks_of(kind)]
    assert {result.name: result.message for result in results if not result.passed} == {}


@pytest.mark.parametrize("fault", FAULTS, ids=[f"{fault.cls.__name__}-{fault.check}" for fault in FAULTS])
def test_a_fault_is_caught_and_named(fault):
    check = next(check for check in checks_of(fault.kind) if check.__name__ == fault.check)
    result = run_check(check, fault.cls)
    assert not result.passed
    with pytest.raises(AssertionError, match=f"(?s){fault.message}"):
        raise AssertionError(result.message)


@pytest.mark.parametrize("kind", ["dataset", "benchmark"])
def test_every_check_has_a_fault(kind):
    everywhere = {fault.check for fault in FAULTS}
    assert {check.__name__ for check in checks_of(kind)} - everywhere == {"light"}


class TestDataset(DatasetContract):
    component_class = GoodDataset


class TestBenchmark(BenchmarkContract):
    component_class = GoodBenchmark
