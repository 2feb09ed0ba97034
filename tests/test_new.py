"""`chiasm new`: each kind's package is whole, typed and named right, and its contract passes as it is written."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from chiasm.errors import PluginError
from chiasm.registry import registry
from chiasm.scaffold import KINDS, new_package
from chiasm.testing import checks_of

ROOT = Path(__file__).parents[1]


def run(*arguments: str, path: Path | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    before = [] if path is None else [str(path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*before, *filter(None, [os.environ.get("PYTHONPATH")])])}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


CHECK = """
import contextlib, io, json, runpy, sys
from pathlib import Path
from chiasm.cli import cli
from chiasm.registry import registry
found = {}
for kind in sys.argv[2:]:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        cli.main(["check", kind, f"my-{kind}", "--json"], standalone_mode=False)
    tests = runpy.run_path(str(Path(sys.argv[1]) / f"my-{kind}" / "tests" / "test_contract.py"))
    (tested,) = [item.component_class for name, item in tests.items() if name.startswith("Test")]
    owner = registry().get(kind, f"my-{kind}").owner
    same = tested is registry().load(kind, f"my-{kind}")
    found[kind] = json.loads(text.getvalue()) | {"tested": same, "owner": owner}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def checked(tmp_path_factory) -> dict:
    """A package of each kind, installed side by side, and what `chiasm check` says of each in a new process."""
    home = tmp_path_factory.mktemp("new")
    for kind in KINDS:
        new_package(kind, f"my-{kind}", home / f"my-{kind}")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    packages = [str(home / f"my-{kind}") for kind in KINDS]
    done = run("-m", "pip", "install", *options, "--target", str(home / "site"), *packages)
    assert done.returncode == 0, done.stderr
    done = run("-c", CHECK, str(home), *KINDS, path=home / "site")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_generated_keeps_its_contract(checked, kind):
    checks = checked[kind]["checks"]
    assert {row["check"]: row["message"] for row in checks if not row["passed"]} == {}
    assert [row["check"] for row in checks] == [check.__name__ for check in checks_of(kind)]
    assert checked[kind]["owner"] == f"chiasm-my-{kind}"
    assert checked[kind]["tested"]


def test_the_command_writes_the_package(tmp_path):
    done = run("-m", "chiasm.cli", "new", "adapter", "my-own", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    named = [Path(line) for line in done.stdout.splitlines() if line.startswith("my-own")]
    assert len(named) == 7
    assert all((tmp_path / path).is_file() for path in named)
    assert "chiasm check adapter my-own" in done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_generated_is_tidy(tmp_path, kind):
    folder = tmp_path / "package"
    written = new_package(kind, "my-own", folder)
    assert {str(path) for path in written} == {
        "pyproject.toml",
        "README.md",
        "src/chiasm_my_own/__init__.py",
        "src/chiasm_my_own/plugin.py",
        "src/chiasm_my_own/model.py",
        "src/chiasm_my_own/py.typed",
        "tests/test_contract.py",
    }
    assert "${" not in "".join(path.read_text() for path in folder.rglob("*") if path.is_file())
    for command in (["ruff", "check"], ["ruff", "format", "--check"]):
        done = run("-m", *command, "--config", str(ROOT / "pyproject.toml"), str(folder))
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["Mine", "my__own", "1st", "my--own", "-mine", "my own", "../mine", ""])
def test_a_malformed_name_is_refused(tmp_path, name):
    with pytest.raises(PluginError, match="wanted lower-case words with hyphens between them, say 'my-adapter'"):
        new_package("adapter", name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_taken_name_is_refused(tmp_path):
    taken = registry().names("adapter")[0]
    with pytest.raises(PluginError, match=f"adapter '{taken}' is offered by .* already; choose another name"):
        new_package("adapter", taken, tmp_path / "out")
    with pytest.raises(PluginError, match="would make a package 'chiasm_adapters', which is installed"):
        new_package("adapter", "adapters", tmp_path / "out")


def test_a_folder_that_exists_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(PluginError, match="exists; nothing was written. Remove it, or name another folder with --out"):
        new_package("encoder", "mine", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_kind_without_template_is_refused(tmp_path):
    done = run("-m", "chiasm.cli", "new", "dataset", "mine", "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "no template for the kind 'dataset'. Kinds: encoder, fusion, adapter, llm" in done.stderr


@pytest.mark.parametrize("name", ["block", "encoder", "my_encoder", "features"])
def test_no_name_hides_another(tmp_path, monkeypatch, name):
    new_package("encoder", name, tmp_path / "out")
    file = tmp_path / "out" / "src" / f"chiasm_{name}" / "model.py"
    spec = importlib.util.spec_from_file_location("made_by_a_test", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "made_by_a_test", module)
    spec.loader.exec_module(module)
    made = [item for item in vars(module).values() if isinstance(item, type) and item.__module__ == "made_by_a_test"]
    assert len({item.__name__ for item in made}) == 3
    (cls,) = [item for item in made if hasattr(item, "tiny")]
    assert cls.__name__ == {"my_encoder": "MyEncoder"}.get(name, f"{name.capitalize()}Encoder")
    assert cls.tiny().geometry.width == 12
