"""What tests of this folder share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import pytest

from chiasm.cli import main

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def cluster():
    """Ray with two CPUs, once for all tests of this process."""
    import ray

    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Calls the command line in this process: its exit status, its output, and its errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["chiasm", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, captured.out, captured.err

    return run
