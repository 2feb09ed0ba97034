"""The contract kit on deliberate faults: each is caught by its check with a message that names it, and no correct
component is rejected.
"""

from __future__ import annotations

import pytest

from chiasm.testing import checks_of, run_check, run_checks
from contract_faults import CORRECT, FAULTS


@pytest.mark.parametrize(("kind", "cls"), CORRECT, ids=[f"{kind}-{cls.__name__}" for kind, cls in CORRECT])
def test_a_correct_component_passes_every_check(kind, cls):
    results = run_checks(kind, cls)
    assert {result.name: result.message for result in results if not result.passed} == {}


@pytest.mark.parametrize("fault", FAULTS, ids=[f"{fault.cls.__name__}-{fault.check}" for fault in FAULTS])
def test_a_fault_is_caught_and_named(fault):
    check = next(check for check in checks_of(fault.kind) if check.__name__ == fault.check)
    result = run_check(check, fault.cls)
    assert not result.passed
    with pytest.raises(AssertionError, match=f"(?s){fault.message}"):
        raise AssertionError(result.message)


@pytest.mark.parametrize("kind", ["encoder", "fusion", "adapter", "llm"])
def test_every_check_has_a_fault_that_it_alone_is_there_for(kind):
    tried = {fault.check for fault in FAULTS if fault.kind == kind}
    everywhere = {fault.check for fault in FAULTS}
    names = {check.__name__ for check in checks_of(kind)}
    assert tried <= names
    # shared checks are tried on one kind, and `light` in its own test
    assert names - everywhere == {"light"}


def test_every_fault_is_one_class_with_a_description():
    classes = {fault.cls for fault in FAULTS}
    assert len({cls.__name__ for cls in classes}) == len(classes) >= 30
    assert all(cls.__doc__ for cls in classes)
