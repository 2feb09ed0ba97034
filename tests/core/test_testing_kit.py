"""The contract kit itself: how checks are found, run and reported. What they find is in `test_contract_faults.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

import chiasm.cli
from chiasm.component import Component, Kind
from chiasm.errors import PluginError
from chiasm.registry import Registered, registry
from chiasm.testing import (
    AdapterContract,
    ContractError,
    EncoderContract,
    FusionContract,
    LanguageModelContract,
    checks_of,
    common,
    plugin_checks,
    run_check,
    run_checks,
)
from contract_faults.adapters import GoodAdapter, UnusedMatrix
from contract_faults.encoder_faults import Crashes
from contract_faults.encoders import GoodEncoder
from contract_faults.fusions import GoodFusion
from contract_faults.llms import GoodLM

GOOD = [("encoder", GoodEncoder), ("fusion", GoodFusion), ("adapter", GoodAdapter), ("llm", GoodLM)]


def test_a_heavy_plugin_module_is_caught(tmp_path, monkeypatch):
    (tmp_path / "timm.py").write_text("")
    (tmp_path / "heavy_plugin_of_a_test.py").write_text("import timm\n")
    (tmp_path / "broken_plugin_of_a_test.py").write_text("import no_such_module_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    for module, message in [
        ("heavy_plugin_of_a_test", "importing the plugin module heavy_plugin_of_a_test imports timm"),
        ("broken_plugin_of_a_test", "ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
    ]:
        monkeypatch.setattr(plugin_checks, "_plugin_modules", lambda cls, module=module: [module])
        result = run_check(plugin_checks.light, GoodAdapter)
        assert message in result.message


def test_a_class_is_traced_to_the_plugin_module_that_offers_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "fake_components", SimpleNamespace(Mine=GoodAdapter))
    offered = [
        Registered(Component("adapter", "mine", "fake_components:Mine"), "pytest"),
        Registered(Component("adapter", "other", "fake_components:Other"), "pluggy"),
    ]
    points = [
        EntryPoint("a", f"{owner}_plugin", "chiasm")._for(SimpleNamespace(name=owner)) for owner in ("pytest", "pluggy")
    ]
    monkeypatch.setattr(plugin_checks, "registry", lambda: SimpleNamespace(all=lambda: offered))
    monkeypatch.setattr(plugin_checks, "entry_points", lambda group: points)
    assert plugin_checks._plugin_modules(GoodAdapter) == ["pytest_plugin"]
    assert plugin_checks._plugin_modules(GoodEncoder) == []


def test_running_checks_leaves_random_numbers_alone():
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    run_checks("adapter", GoodAdapter)
    assert torch.equal(torch.rand(3), wanted)


def test_one_failure_stops_no_other_check():
    results = {result.name: result for result in run_checks("encoder", Crashes)}
    assert [check.__name__ for check in checks_of("encoder")] == list(results)
    assert results["parameters"].passed
    assert not results["features"].passed
    assert all(result.seconds >= 0 for result in results.values())
    assert all(bool(result.message) is not result.passed for result in results.values())


@pytest.mark.parametrize(("cls", "code"), [(GoodAdapter, 0), (UnusedMatrix, 1)])
def test_the_command_line_runs_the_same_checks(monkeypatch, cls, code):
    monkeypatch.setattr(chiasm.cli, "registry", lambda: SimpleNamespace(load=lambda kind, name: cls))
    done = CliRunner().invoke(chiasm.cli.cli, ["check", "adapter", "mine", "--json"])
    assert done.exit_code == code
    rows = {row["check"]: row for row in json.loads(done.stdout)["checks"]}
    assert list(rows) == [check.__name__ for check in checks_of("adapter")]
    assert [name for name, row in rows.items() if not row["passed"]] == ["gradients"] * code
    printed = CliRunner().invoke(chiasm.cli.cli, ["check", "adapter", "mine"])
    assert printed.exit_code == code
    assert ("FAIL gradients\n     no gradient reaches unused.weight" in printed.stdout) == bool(code)


def test_an_interrupt_is_no_failed_check():
    def interrupted(cls):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_check(interrupted, GoodAdapter)


def test_a_slow_tiny_is_told(monkeypatch):
    monkeypatch.setattr(common, "SLOW", 0.0)
    result = run_check(checks_of("adapter")[[c.__name__ for c in checks_of("adapter")].index("tiny")], GoodAdapter)
    assert "tiny() took over 0 s, wanted well under one second" in result.message


def test_a_class_without_tiny_says_so():
    class NotTiny(GoodAdapter):
        @classmethod
        def tiny(cls):
            raise NotImplementedError("later")

    messages = {result.message for result in run_checks("adapter", NotTiny) if not result.passed}
    assert all(message.startswith("NotTiny.tiny() raised NotImplementedError: later (at ") for message in messages)


def test_kinds_without_checks_are_told(monkeypatch):
    monkeypatch.setitem(registry().kinds, "bare", Kind("bare", "chiasm.adapter:Adapter"))
    monkeypatch.setitem(registry().kinds, "lost", Kind("lost", "chiasm.adapter:Adapter", checks="chiasm.adapter:NONE"))
    with pytest.raises(PluginError, match=r"the kind 'bare' has no checks; .* Kind\(checks="):
        checks_of("bare")
    with pytest.raises(PluginError, match=r"cannot be imported from 'chiasm.adapter:NONE'"):
        checks_of("lost")
    with pytest.raises(PluginError, match=r"no kind of component named 'encodr'. Kinds: encoder, fusion"):
        checks_of("encodr")


@pytest.mark.parametrize(("kind", "cls"), GOOD, ids=lambda value: getattr(value, "__name__", value))
def test_every_check_says_what_it_promises(kind, cls):
    for check in checks_of(kind):
        assert check.__doc__, check.__name__


class TestEncoder(EncoderContract):
    component_class = GoodEncoder


class TestFusion(FusionContract):
    component_class = GoodFusion


class TestAdapter(AdapterContract):
    component_class = GoodAdapter


class TestLanguageModel(LanguageModelContract):
    component_class = GoodLM


class TestKnownFault(AdapterContract):
    component_class = UnusedMatrix
    xfails = {"gradients": "a matrix is kept for later"}


def test_a_suite_has_a_test_for_each_check():
    tests = [name for name in vars(TestEncoder) if name.startswith("test_")]
    assert tests == [f"test_{check.__name__}" for check in checks_of("encoder")]
    assert not [name for name in vars(EncoderContract) if name.startswith("test_")]


def test_suites_are_strict():
    class Suite(AdapterContract):
        component_class = UnusedMatrix
        xfails = {"gradients": "known", "config": "wrong", "gradient": "misspelt"}

    suite = Suite()
    with pytest.raises(pytest.xfail.Exception, match="known: no gradient reaches"):
        suite.test_gradients()
    with pytest.raises(pytest.fail.Exception, match=r"config passes and is listed in xfails \(wrong\)"):
        suite.test_config()
    with pytest.raises(AssertionError, match=r"no check named 'gradient'. Did you mean 'gradients'"):
        suite.test_xfails_name_checks()
    Suite.xfails = {}
    with pytest.raises(ContractError, match=r"no gradient reaches unused\.weight"):
        suite.test_gradients()


def test_the_kit_is_light_to_import_and_needs_no_pytest():
    code = """
import sys
sys.modules["pytest"] = None
import chiasm.testing
assert "torch" not in sys.modules
import chiasm.testing.suites
assert chiasm.testing.checks_of("encoder") == chiasm.testing.EncoderContract.checks
"""
    subprocess.run([sys.executable, "-c", code], check=True)
