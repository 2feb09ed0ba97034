"""Does the contract kit catch deliberate faults by name, and let correct components pass?

    python benchmarks/contract_faults.py

Every component of tests/core/contract_faults and of tests/experiments/record_faults.py, one fault each, and as correct
ones those beside them and every installed component.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from typing import Any

from common import ROOT, write_result

sys.path.insert(0, str(ROOT / "tests" / "core"))
sys.path.insert(0, str(ROOT / "tests" / "experiments"))

import record_faults
from chiasm.registry import registry
from chiasm.testing import checks_of, run_check, run_checks
from contract_faults import CORRECT, FAULTS
from fault_record import Fault

KINDS = ("encoder", "fusion", "adapter", "llm", "dataset", "benchmark")


def catch(fault: Fault) -> dict[str, Any]:
    """What the check that a fault is for says of it."""
    check = next(check for check in checks_of(fault.kind) if check.__name__ == fault.check)
    result = run_check(check, fault.cls)
    return {
        "kind": fault.kind,
        "component": fault.cls.__name__,
        "fault": str(fault.cls.__doc__),
        "check": fault.check,
        "caught": not result.passed,
        "named": re.search(fault.message, result.message, re.DOTALL) is not None,
        "message": placeless(result.message),
    }


def placeless(message: str) -> str:
    """A message without the folders in it, which depend on where the repository and temporary files lie."""
    message = re.sub(r"\(at .*?(\w+\.py:\d+)", r"(at \1", message)
    return re.sub(re.escape(tempfile.gettempdir()) + r"/[^/']+/", "", message)


def installed() -> list[tuple[str, str, type]]:
    """Kind, name and class of every installed component."""
    found = registry()
    return [(kind, name, found.load(kind, name)) for kind in KINDS for name in found.names(kind)]


if __name__ == "__main__":
    start = time.perf_counter()
    faults = [catch(fault) for fault in FAULTS + record_faults.FAULTS]
    correct = [(kind, cls.__name__, cls) for kind, cls in CORRECT + record_faults.CORRECT] + installed()
    rejected = {
        f"{kind} {name}: {result.name}": result.message
        for kind, name, cls in correct
        for result in run_checks(kind, cls)
        if not result.passed
    }
    components = {(fault["kind"], fault["component"]) for fault in faults}
    missed = sorted({fault["component"] for fault in faults if not (fault["caught"] and fault["named"])})
    write_result(
        "contract_faults",
        figures={
            "seconds": round(time.perf_counter() - start, 1),
            "checks": {kind: len(checks_of(kind)) for kind in KINDS},
            "faulty_components": len(components),
            "faulty_components_by_kind": {kind: sum(k == kind for k, _ in components) for kind in KINDS},
            "missed": missed,
            "correct_components": [f"{kind} {name}" for kind, name, _ in correct],
            "rejected": rejected,
            "faults": faults,
        },
        asked="at least 30 faulty components, all caught with a message that names the fault; none correct rejected",
        met=len(components) >= 30 and not missed and not rejected,
    )
