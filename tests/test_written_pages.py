"""The packages that the documentation writes: installed beside one another, checked, and planned with.

`test_outside_plugin.py` does the same for the page about encoders, step by step.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from chiasm.testing import checks_of

ROOT = Path(__file__).parents[1]

PAGES = {
    "write-a-fusion": ("fusion", "gated-pair", [16, 16]),
    "write-an-adapter": ("adapter", "rows", [36, 6, 6]),
    "add-a-language-model": ("llm", "house", [16, 16]),
}
"""Kind and name of each page's component, and the visual tokens of its study's cells."""

RUN = """
import contextlib, io, json, runpy, sys
from pathlib import Path
from chiasm.cli import cli
from chiasm.registry import registry
registry().plugins.hook.chiasm_commands(cli=cli)
def chiasm(*words):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        cli.main([*words, "--json"], standalone_mode=False)
    return json.loads(text.getvalue())
found = {}
for page, kind, name in json.loads(sys.argv[2]):
    source = Path(sys.argv[1], page)
    tests = runpy.run_path(str(source / "tests" / "test_contract.py"))
    (tested,) = [item.component_class for key, item in tests.items() if key.startswith("Test")]
    found[page] = {
        "checks": chiasm("check", kind, name)["checks"],
        "cells": chiasm("plan", str(source / "study.yaml"))["cells"],
        "owner": registry().get(kind, name).owner,
        "tested": tested is registry().load(kind, name),
    }
print(json.dumps(found))
"""


def text_of(page: str) -> str:
    return (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")


def files_of(page: str) -> dict[str, str]:
    """The code blocks whose first line is a comment with a file name."""
    blocks = re.findall(r"^```\w+\n# (\S+\.\w+)\n(.*?)^```$", text_of(page), re.DOTALL | re.MULTILINE)
    assert len(dict(blocks)) == len(blocks), f"{page} writes a file twice"
    return dict(blocks)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """What a new process says of every page's package."""
    home = tmp_path_factory.mktemp("pages")
    for page in PAGES:
        for name, text in files_of(page).items():
            file = home / page / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    site = home / "site"
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    packages = [str(home / page) for page in PAGES]
    install = [sys.executable, "-m", "pip", "install", *options, "--target", str(site), *packages]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    }
    names = json.dumps([(page, kind, name) for page, (kind, name, _) in PAGES.items()])
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(home), names], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("page", PAGES)
def test_the_page_lists_every_check(page):
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", text_of(page), re.MULTILINE)
    assert rows == [(check.__name__, check.__doc__.partition("\n")[0]) for check in checks_of(PAGES[page][0])]


@pytest.mark.parametrize("page", PAGES)
def test_the_page_writes_a_whole_package(page):
    folders = {name.partition("/")[0] for name in files_of(page)}
    assert {"pyproject.toml", "study.yaml", "tests"} < folders
    assert f"chiasm new {PAGES[page][0]} " in text_of(page)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_its_component_keeps_its_contract(found, page):
    kind, name, _ = PAGES[page]
    checks = found[page]["checks"]
    assert {row["check"]: row["message"] for row in checks if not row["passed"]} == {}
    assert [row["check"] for row in checks] == [check.__name__ for check in checks_of(kind)]
    assert found[page]["owner"] == f"chiasm-{name}"
    assert found[page]["tested"]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_its_study_is_planned(found, page):
    _, _, wanted = PAGES[page]
    cells = found[page]["cells"]
    assert [cell["problems"] for cell in cells] == [[]] * len(wanted)
    assert [cell["visual_tokens"] for cell in cells] == wanted
