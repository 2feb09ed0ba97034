"""The LLaVA format: what it reads, and that bad data is told before any training."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from chiasm.config import ComponentRef
from chiasm.errors import DataError
from chiasm_experiments.data.llava import LlavaConfig, LlavaDataset
from chiasm_experiments.data.mixture import load_mixture


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


@pytest.fixture
def write(tmp_path):
    for name in "abc":
        Image.new("RGB", (9, 7), "red").save(tmp_path / f"{name}.png")

    def make(records, name="data.json") -> LlavaDataset:
        file = tmp_path / name
        file.write_text(records if isinstance(records, str) else json.dumps(records))
        return LlavaDataset(LlavaConfig(file=file))

    return make


GOOD = [
    {"id": 1, "image": "a.png", "conversations": [human("<image>\nWhat?"), gpt("Red"), human("Sure?"), gpt("Yes")]},
    {"id": "two", "image": ["b.png", "c.png"], "conversations": [human("<image> and <image>"), gpt("Both")]},
    {"id": "text", "conversations": [human("1 + 1?"), gpt("2")]},
]


def test_samples_are_read(write):
    data = write(GOOD)
    data.check()
    first, second, third = data[0], data[1], data[2]
    assert [(turn.question, turn.answer) for turn in first.turns] == [("<image>What?", "Red"), ("Sure?", "Yes")]
    assert [image.path.name for image in second.images] == ["b.png", "c.png"]
    assert first.images[0].load().size == (9, 7)
    assert third.images == ()
    lines = write("\n".join(json.dumps(record) for record in GOOD), "data.jsonl")
    assert [sample.turns for sample in lines] == [sample.turns for sample in data]


@pytest.mark.parametrize(
    ("records", "says"),
    [
        ([], "is empty"),
        ("{", "is not JSON"),
        ({"id": 1}, "holds no list of samples"),
        (
            [{"id": 7, "image": "gone.png", "conversations": [human("q"), gpt("a")]}],
            r"gone.png' of sample 'data.json:7' does",
        ),
        ([{"id": 7, "image": "broken.png", "conversations": [human("q"), gpt("a")]}], "broken.png'.*cannot be decoded"),
        ([{"id": 7, "image": "cut.png", "conversations": [human("q"), gpt("a")]}], "cut.png'.*cannot be decoded"),
        ([{"id": 7, "conversations": [gpt("a"), human("q")]}], r"'data.json:7': conversations must alternate"),
        ([{"id": 7, "conversations": []}], "'data.json:7': conversations must alternate"),
        ([{"id": 7, "conversations": [human("<image>"), gpt("a")]}], "1 <image> markers and 0 images"),
    ],
)
def test_bad_data_is_told_and_named(write, tmp_path, records, says):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:-30])
    good = GOOD[:2] if isinstance(records, list) and records else []
    with pytest.raises(DataError, match=says):
        write(good + records if good else records).check()


def test_missing_files_and_empty_sets_are_told(tmp_path, write):
    with pytest.raises(DataError, match=r"nowhere.json' cannot be read"):
        LlavaDataset(LlavaConfig(file=tmp_path / "nowhere.json")).check()
    write([])
    with pytest.raises(DataError, match="'llava' is empty"):
        load_mixture([ComponentRef.model_validate({"name": "llava", "file": str(tmp_path / "data.json")})])
