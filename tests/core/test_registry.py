"""Discovery: exact names, duplicates, broken plugins."""

from __future__ import annotations

import sys
import types
from importlib.metadata import EntryPoint

import click
import pytest

from chiasm.errors import DuplicateComponentError, PluginError, UnknownComponentError
from chiasm.plugin import Component, hookimpl
from chiasm.registry import ALLOW_VARIABLE, Registry


class _Distribution:
    def __init__(self, name: str) -> None:
        self.name = name


@pytest.fixture
def plugin(monkeypatch):
    """Makes an entry point whose module holds the given functions."""

    def make(owner: str, **functions) -> EntryPoint:
        module = types.ModuleType(f"fake_{owner.replace('-', '_')}")
        for name, function in functions.items():
            setattr(module, name, function)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        point = EntryPoint(name=owner, value=module.__name__, group="chiasm")
        return point._for(_Distribution(owner))

    return make


def components(*names: str, kind: str = "encoder", target: str = "chiasm.encoder:Encoder"):
    @hookimpl
    def chiasm_components():
        for name in names:
            yield Component(kind, name, target)

    return chiasm_components


def test_names_match_exactly_and_errors_help(plugin):
    registry = Registry([plugin("a", chiasm_components=components("mlp", "mof_mlp"))])
    assert registry.get("encoder", "mlp").component.name == "mlp"
    with pytest.raises(
        UnknownComponentError, match=r"no encoder named 'mof_ml'\. Did you mean 'mof_mlp'\? Installed: "
    ):
        registry.get("encoder", "mof_ml")
    with pytest.raises(UnknownComponentError, match=r"no kind of component named 'encodr'\. Kinds: encoder, fusion"):
        registry.get("encodr", "mlp")


def test_two_owners_of_a_name_are_named_and_others_still_work(plugin):
    first = plugin("dist-a", chiasm_components=components("clip", "one"))
    second = plugin("dist-b", chiasm_components=components("clip", "two"))
    registry = Registry([first, second])
    with pytest.raises(DuplicateComponentError, match="encoder 'clip' is offered by dist-a and dist-b"):
        registry.get("encoder", "clip")
    assert registry.duplicates() == {("encoder", "clip"): ["dist-a", "dist-b"]}
    assert registry.get("encoder", "two").owner == "dist-b"


def test_one_name_may_serve_two_kinds(plugin):
    both = plugin("a", chiasm_components=components("same"))
    other = plugin("b", chiasm_components=components("same", kind="adapter", target="chiasm.adapter:Adapter"))
    registry = Registry([both, other])
    assert (registry.get("encoder", "same").owner, registry.get("adapter", "same").owner) == ("a", "b")


def test_broken_plugins_are_reported_and_disable_nothing_else(plugin):
    @hookimpl
    def chiasm_components():
        yield Component("encoder", "half", "chiasm.encoder:Encoder")
        raise RuntimeError("no such card")

    @hookimpl
    def chiasm_componets():
        return []

    registry = Registry(
        [
            plugin("good", chiasm_components=components("fine")),
            plugin("raises", chiasm_components=chiasm_components),
            plugin("misspelt", chiasm_componets=chiasm_componets),
            plugin("wrong-kind", chiasm_components=components("x", kind="encodr")),
            plugin("wrong-record", chiasm_components=hookimpl(lambda: ["clip"], specname="chiasm_components")),
            EntryPoint("missing", "no_such_module_anywhere", "chiasm")._for(_Distribution("missing")),
        ]
    )
    assert registry.names("encoder") == ["fine"]
    assert set(registry.broken) == {"raises", "misspelt", "wrong-kind", "wrong-record", "missing"}
    assert "no such card" in registry.broken["raises"]
    assert "chiasm_componets" in registry.broken["misspelt"]
    assert "'encodr'" in registry.broken["wrong-kind"]
    assert "no_such_module_anywhere" in registry.broken["missing"]
    with pytest.raises(UnknownComponentError, match="Plugin raises is broken and offers nothing: RuntimeError"):
        registry.get("encoder", "half")


def test_a_plugin_whose_commands_fail_takes_no_other_command_away(plugin):
    @hookimpl(specname="chiasm_commands")
    def fails(cli):
        raise RuntimeError("no such screen")

    @hookimpl(specname="chiasm_commands")
    def adds(cli):
        cli.add_command(click.Command("fine"))

    registry = Registry(
        [plugin("a", chiasm_commands=fails, chiasm_components=components("kept")), plugin("b", chiasm_commands=adds)]
    )
    cli = click.Group()
    registry.add_commands(cli)
    assert list(cli.commands) == ["fine"]
    assert registry.broken == {"a": "its commands cannot be added: RuntimeError: no such screen"}
    assert registry.names("encoder") == ["kept"]


def test_a_module_that_exits_is_broken(monkeypatch, tmp_path):
    (tmp_path / "leaves_at_once.py").write_text("raise SystemExit('goodbye')")
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry([EntryPoint("leaves", "leaves_at_once", "chiasm")._for(_Distribution("leaves"))])
    assert registry.broken == {"leaves": "SystemExit: goodbye"}


def test_loading_checks_the_target_and_its_interface(plugin):
    registry = Registry(
        [
            plugin("a", chiasm_components=components("absent", target="chiasm.encoder:Nothing")),
            plugin("b", chiasm_components=components("other", target="chiasm.fusion:Fusion")),
            plugin("c", chiasm_components=components("good")),
        ]
    )
    with pytest.raises(PluginError, match="'absent' of a cannot be imported from 'chiasm.encoder:Nothing'"):
        registry.load("encoder", "absent")
    with pytest.raises(PluginError, match=r"does not subclass 'chiasm\.encoder:Encoder'"):
        registry.load("encoder", "other")
    assert registry.load("encoder", "good").__name__ == "Encoder"


@pytest.mark.parametrize(
    ("name", "target"), [("CLIP", "a:B"), ("", "a:B"), ("x y", "a:B"), ("ok", "a.b"), ("ok", "a:b.c")]
)
def test_malformed_records_are_refused(name, target):
    with pytest.raises(ValueError, match="wanted"):
        Component("encoder", name, target)


def test_two_entry_points_of_one_distribution_both_load(plugin):
    first = plugin("dist", chiasm_components=components("one"))
    module = types.ModuleType("fake_second")
    module.chiasm_components = components("two")
    sys.modules["fake_second"] = module
    try:
        second = EntryPoint("more", "fake_second", "chiasm")._for(_Distribution("dist"))
        registry = Registry([first, second])
    finally:
        del sys.modules["fake_second"]
    assert registry.names("encoder") == ["one", "two"]
    assert not registry.broken


def test_allow_list_keeps_plugins_out(monkeypatch):
    monkeypatch.setenv(ALLOW_VARIABLE, "chiasm-adapters")
    registry = Registry()
    assert {item.owner for item in registry.all()} == {"chiasm-adapters"}
    assert "encoder" in registry.kinds
