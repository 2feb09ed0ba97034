"""A stranger's package, written from the documentation's own code: installed, listed, checked and planned with.

Nothing of Chiasm is edited and nothing of it is in the package.
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
PAGE = ROOT / "docs" / "write-an-encoder.md"
NAME = "patch-mean"

pytestmark = pytest.mark.slow


def files_of_the_page() -> dict[str, str]:
    """The code blocks whose first line is a comment with a file name."""
    blocks = re.findall(
        r"^```\w+\n# (\S+\.\w+)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    assert len(dict(blocks)) == len(blocks), "the page writes a file twice"
    return dict(blocks)


class Installed:
    """The package in a folder of its own, put on the path of new processes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.source = folder, folder / "chiasm-patch-mean"
        for name, text in files_of_the_page().items():
            file = self.source / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        site = folder / "site"
        self.path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
        options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
        done = self.run("-m", "pip", "install", *options, "--target", str(site), str(self.source))
        assert done.returncode == 0, done.stderr

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": self.path}
        return subprocess.run(
            [sys.executable, *arguments], cwd=self.folder, env=environment, capture_output=True, text=True, check=False
        )

    def chiasm(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "chiasm.cli", *arguments)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installed:
    return Installed(tmp_path_factory.mktemp("outside"))


def test_the_page_is_a_whole_package():
    assert set(files_of_the_page()) == {
        "pyproject.toml",
        "patch_mean/__init__.py",
        "patch_mean/encoder.py",
        "tests/test_contract.py",
        "study.yaml",
    }


def test_the_page_lists_every_check():
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [(check.__name__, check.__doc__.partition("\n")[0]) for check in checks_of("encoder")]


def test_it_is_listed_with_its_owner_and_summary(installed):
    done = installed.chiasm("plugins", "--json")
    listed = json.loads(done.stdout)
    (found,) = [item for item in listed["components"] if item["name"] == NAME]
    assert found == {
        "kind": "encoder",
        "name": NAME,
        "owner": "chiasm-patch-mean",
        "summary": "the mean colour of each patch",
    }
    assert "chiasm-patch-mean" not in listed["broken"]
    assert len(listed["components"]) > 1, "it took the others' place"
    assert done.returncode == 0, done.stderr


def test_it_is_not_listed_where_it_is_not_installed(installed):
    done = subprocess.run([sys.executable, "-m", "chiasm.cli", "plugins"], capture_output=True, text=True, check=False)
    assert NAME not in done.stdout


def test_it_passes_its_contract_on_the_command_line(installed):
    done = installed.chiasm("check", "encoder", NAME)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAIL" not in done.stdout
    for check in checks_of("encoder"):
        assert check.__name__ in done.stdout


def test_it_passes_its_contract_in_its_own_tests(installed):
    done = installed.run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(installed.source / "tests"))
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= len(checks_of("encoder"))


def test_a_study_can_name_it(installed):
    done = installed.chiasm("plan", str(installed.source / "study.yaml"), "--json")
    cells = json.loads(done.stdout)["cells"]
    assert [(cell["valid"], cell["problems"]) for cell in cells] == [(True, [])] * 3
    assert {cell["visual_tokens"] for cell in cells} == {14 * 14, 7 * 7, 4 * 4}
    assert done.returncode == 0, done.stderr
