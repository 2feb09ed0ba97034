"""docs/components.md and the READMEs name what is installed, and state geometry as the components do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from chiasm.registry import registry

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "components.md").read_text(encoding="utf-8")
KINDS = ("encoder", "fusion", "adapter", "llm")


def names_in(text: str) -> set[str]:
    return set(re.findall(r"`([\w.-]+)`", text))


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_names_every_component(kind):
    assert set(registry().names(kind)) <= names_in(PAGE)


@pytest.mark.parametrize("folder", ["", "plugins/adapters/"])
@pytest.mark.parametrize("kind", ["fusion", "adapter"])
def test_the_readmes_name_every_fusion_and_adapter(folder, kind):
    assert set(registry().names(kind)) <= names_in((ROOT / folder / "README.md").read_text(encoding="utf-8"))


def test_the_tables_hold_no_other_fusion_or_adapter():
    first_columns = set(re.findall(r"^\| `([\w-]+)` \|", PAGE, re.MULTILINE))
    known = {name for kind in KINDS for name in registry().names(kind)}
    assert first_columns <= known


def test_grids_and_widths_are_those_of_the_components(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    seen = set()
    for published, rows, columns, width in re.findall(
        r"^\| [^|]*\| (`[^|]*`[^|]*) \| (\d+) x (\d+) of (\d+) \|$", PAGE, re.MULTILINE
    ):
        for name in names_in(published):
            cls = registry().load("encoder", name)
            spec = cls.spec(cls.Config())
            assert (spec.grid, spec.width) == ((int(rows), int(columns)), int(width)), name
            seen.add(name)
    presets = [n for n in registry().names("encoder") if registry().load("encoder", n).__module__.endswith("presets")]
    assert seen == set(presets)
