"""Every shipped study parses and plans without network, and each says of the paper's tables what it claims to."""

from __future__ import annotations

import functools
import itertools
import re
from pathlib import Path

import pytest
import yaml

from chiasm.cost import SampleSize
from chiasm_experiments.study.cells import Cells, make_cells, refuse_invalid
from chiasm_experiments.study.config import Study
from chiasm_experiments.study.overview import plan_study

FOLDER = Path(__file__).parents[2] / "experiments/studies"
STUDIES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
TABLES = [name for name in STUDIES if name.startswith("omnifusion") and not name.endswith("-proxy")]
PROXIES = [f"{name}-proxy" for name in TABLES]
HOURS, RATE = 5, 1.5e14
"""An afternoon of one GPU, and the operations of a second that the files reckon with."""


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """A look at the network would be an error, not a wait."""
    import socket

    def refuse(*_, **__):
        raise AssertionError("a study's plan needs the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@functools.cache
def study(name: str) -> Study:
    return Study(FOLDER / f"{name}.yaml")


@functools.cache
def cells(name: str) -> Cells:
    return make_cells(study(name))


def levels(name: str) -> list[tuple[str, ...]]:
    return [tuple(cell.levels.values()) for cell in cells(name).cells]


def comment(name: str) -> str:
    lines = itertools.takewhile(lambda line: line.startswith("#"), (FOLDER / f"{name}.yaml").read_text().splitlines())
    return " ".join(line.removeprefix("#").strip() for line in lines)


def test_the_tables_are_there():
    assert [f"omnifusion-table{number}" for number in (4, 5, 6, 9)] == TABLES
    assert set(PROXIES) <= set(STUDIES)


@pytest.mark.parametrize("name", STUDIES)
def test_every_shipped_study_plans_and_opens_with_its_question(name):
    made = cells(name)
    refuse_invalid(made, study(name))
    assert not made.skipped
    assert not made.notes
    config = study(name).config
    assert config.name == name
    assert len(config.seeds) >= 3
    assert config.question.endswith("?")
    assert "?" in comment(name)
    if name in TABLES:
        assert comment(name).index("?") < 140
        assert "GigaChat" in comment(name)
    else:
        assert config.control


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_at_full_size_against_published_weights(name):
    for cell in cells(name).cells:
        assert cell.plan.parameters["llm"] > 6.5e9
        assert all(stage.data[0].name == "llava" for stage in cell.run.stages)
        for ref in (*cell.run.vision.encoders, cell.run.llm):
            assert "pretrained" not in ref.options  # that of the preset, a hub id
            assert "shape" not in ref.options


@pytest.mark.parametrize("name", PROXIES)
def test_a_proxy_aligns_first_and_takes_an_afternoon(name):
    for cell in cells(name).cells:
        first, second = cell.run.stages
        assert set(first.train) == {"fusion", "adapter", "tokens"}
        assert set(second.train) == {"fusion", "adapter", "tokens", "llm"}
        assert cell.plan.parameters["llm"] < 0.6e9
        assert {ref.name for ref in (*first.data, *second.data, *cell.run.evaluate)} == {"world"}
    plan = plan_study(study(name), SampleSize())
    words = r"Estimate: ([\d.e]+) operations to train all trials, ([\d.]+) hours .* ([\d.e]+) a second"
    stated = re.search(words, comment(name))
    assert stated is not None
    operations, hours, rate = map(float, stated.groups())
    assert operations == pytest.approx(plan.flops, rel=0.02)
    assert rate == RATE
    assert hours == pytest.approx(operations / RATE / 3600, abs=0.06)
    assert hours <= HOURS


def test_table_4_separates_encoders_from_their_tokens():
    made = cells("omnifusion-table4").cells
    assert len(made) == 10
    tokens = {tuple(cell.levels.values()): cell.plan.visual_tokens for cell in made}
    own = {"CLIP-L-336": 576, "bigG-224": 256, "bigG-336": 576, "SigLIP-B-512": 1024, "InternViT-6B-448": 1024}
    assert tokens == {(name, "all its tokens"): count for name, count in own.items()} | {
        (name, "16 x 16 tokens"): 256 for name in own
    }


@pytest.mark.parametrize("name", ["omnifusion-table5", "omnifusion-table5-proxy"])
def test_table_5_has_the_mixers_and_the_whole_block_of_controls(name):
    made = cells(name).cells
    first = made[0].run
    assert [ref.name for ref in first.vision.encoders] == ["clip-l-336"]
    assert first.vision.encoders[0].options["layers"] == "all"
    assert (first.vision.fusion.name, first.vision.adapter.name) == ("project_sum", "linear")

    def described(cell):
        vision = cell.run.vision
        fusion = vision.fusion.name + (f" {query}" if (query := vision.fusion.options.get("query")) else "")
        taps = {str(ref.options.get("layers")) for ref in vision.encoders}
        assert len(taps) == 1
        names = "+".join(ref.name.split("-")[0] for ref in vision.encoders)
        return names, taps.pop(), fusion, vision.adapter.name

    found = [described(cell) for cell in made if cell.run.vision.encoders[0].name != "blind"]
    mixers = {
        (["clip", "l"][0], "-2", "single", "transformer"),
        ("clip+dinov2", "-2", "concat_tokens", "transformer"),
        ("clip+dinov2", "all", "project_sum", "linear"),
        ("clip+dinov2", "all", "project_attention features", "linear"),
        ("clip+dinov2", "all", "project_attention matrix", "linear"),
    }
    encoders, taps, adapters = ("clip", "dinov2", "clip+dinov2"), ("-2", "all"), ("linear", "transformer")
    block = {(e, t, "project_sum", a) for e, t, a in itertools.product(encoders, taps, adapters)}
    assert set(found) == mixers | block
    assert len(found) == 16
    both = [cell for cell in made if len(cell.run.vision.encoders) == 2]
    # grids are equal, so that no token is padded
    assert {cell.plan.visual_tokens for cell in both} == {576, 1152}


def test_table_6_separates_tiles_from_the_encoder():
    for name, high in (("omnifusion-table6", "InternViT-6B-448"), ("omnifusion-table6-proxy", "InternViT-300M-448")):
        assert set(itertools.product(("CLIP-L-336", high), ("whole", "tiles"))) <= set(levels(name))
    views = {cell.label: cell.plan.visual_tokens for cell in cells("omnifusion-table6").cells}
    assert views["CLIP-L-336, tiles"] == 5 * 576


def test_table_9_has_the_merge_and_one_encoder_with_each_language_model():
    llms = ["Mistral-7B", "Vicuna-7B", "Qwen2.5-7B for GigaChat-7B"]
    assert levels("omnifusion-table9") == list(itertools.product(llms, ["CLIP alone", "CLIP + DINO merged"]))


# the page that says how to write a study

PAGE = Path(__file__).parents[2] / "docs/studies.md"
BLOCKS = re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def of_the_page(tmp_path):
    """A study of the page: its first block, with the fields of another in place of its own."""

    def make(block: str) -> Study:
        whole = yaml.safe_load(BLOCKS[0]) | yaml.safe_load(block)
        whole["base"] = str((PAGE.parent / whole["base"]).resolve())
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(whole, sort_keys=False))
        return Study(path)

    return make


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_snippet_of_the_page_is_a_study_that_works(of_the_page, number):
    study = of_the_page(BLOCKS[number])
    made = make_cells(study)
    refuse_invalid(made, study)
    assert made.cells
    assert not made.notes


def test_the_page_counts_what_its_conditions_leave(of_the_page):
    (block,) = [block for block in BLOCKS if "when:" in block]
    study = of_the_page(block)
    assert len(make_cells(study).cells) == 4
    assert "That is four cells and not eight" in PAGE.read_text()


def test_every_path_of_the_page_can_be_a_factor(of_the_page):
    section = PAGE.read_text().partition("## What can vary")[2].partition("\n## ")[0]
    paths = re.findall(r"^\| `([a-z0-9_.]+)` \|", section, re.MULTILINE)
    values = {"vision.adapter": "linear", "vision.encoders.0.layers": -1, "stages.finetune.lr": 1e-4, "vision": None}
    assert set(values) < set(paths)
    for path in paths:
        value = values.get(path, 2)
        value = {"encoders": ["blind"]} if path == "vision" else value
        study = of_the_page(yaml.safe_dump({"factors": {path: {"x": value}}}))
        assert len(make_cells(study).cells) == 1, path
