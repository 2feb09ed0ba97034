"""The LLaVA format: what it reads, and that bad data is told before any training."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from chiasm.config import ComponentRef
from chiasm.errors import DataError
from chiasm_experiments.data import llava
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
        ([{"id": 7, "image": ".", "conversations": [human("q"), gpt("a")]}], "of sample 'data.json:7' is no file"),
        ([{"id": 7, "image": 3, "conversations": [human("q"), gpt("a")]}], "'data.json:7': image must be a path .*3"),
        ([{"id": 7, "image": ["a.png", 3], "conversations": [human("q"), gpt("a")]}], "'data.json:7': image must be"),
        ([{"id": 7, "conversations": "hello"}], "'data.json:7': conversations must be a list of .* found 'hello'"),
        ([{"id": 7, "conversations": None}], "'data.json:7': conversations must be a list of .* found None"),
        ([{"id": 7, "conversations": ["q", "a"]}], "'data.json:7': conversations must be a list of .* found 'q'"),
        (
            [{"id": 7, "conversations": [human("q"), gpt(None)]}],
            "'data.json:7': conversations must be a list of .*None",
        ),
        ([{"id": 7, "conversations": [human(1), gpt("a")]}], "'data.json:7': conversations must be a list of .* 1"),
    ],
)
def test_bad_data_is_told_and_named(write, tmp_path, records, says):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:-30])
    good = GOOD[:2] if isinstance(records, list) and records else []
    with pytest.raises(DataError, match=says):
        write(good + records if good else records).check()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp"])
def test_a_file_that_was_cut_off_is_found_wherever_it_stands(write, tmp_path, suffix, monkeypatch):
    """Of large sets not every image is decoded."""
    monkeypatch.setattr(llava, "DECODED", 1)
    noise = Image.effect_noise((64, 48), 60).convert("RGB")
    records = []
    for i in range(5):
        noise.save(tmp_path / f"{i}.{suffix}")
        records.append({"id": i, "image": f"{i}.{suffix}", "conversations": [human("q"), gpt("a")]})
    write(records).check()
    cut = tmp_path / f"3.{suffix}"
    whole = cut.read_bytes()
    cut.write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(DataError, match=rf"3.{suffix}' of sample 'data.json:3' cannot be decoded"):
        write(records).check()


def test_a_line_of_json_may_hold_any_character(write):
    """U+2028 ends a line for Python, not for JSON."""
    record = {"id": 1, "conversations": [human("one\u2028two\x85three"), gpt("a")]}
    data = write(json.dumps(record, ensure_ascii=False) + "\n\n", "data.jsonl")
    assert data[0].turns[0].question == "one\u2028two\x85three"
    assert len(data) == 1


def test_a_bad_line_is_named(write):
    with pytest.raises(DataError, match=r"line 3 of data file '.*data\.jsonl' is not JSON"):
        write(json.dumps(GOOD[2]) + "\n\n{\n", "data.jsonl").check()


def test_missing_files_and_empty_sets_are_told(tmp_path, write):
    with pytest.raises(DataError, match=r"nowhere.json' cannot be read"):
        LlavaDataset(LlavaConfig(file=tmp_path / "nowhere.json")).check()
    write([])
    with pytest.raises(DataError, match="'llava' is empty"):
        load_mixture([ComponentRef.model_validate({"name": "llava", "file": str(tmp_path / "data.json")})])
