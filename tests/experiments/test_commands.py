"""The command line: what is given by mistake ends in one error, before anything is trained or written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

RUN = """\
vision:
  encoders: [{name: blind, grid: [2, 2], width: 8}]
llm: {name: causal, tokenizer: bytes, shape: {width: 8, depth: 1, heads: 1, kv_heads: 1, mlp_width: 8}}
stages:
  - {name: pretrain, data: {name: world, size: 4}, train: [adapter, tokens], lr: 1e-3, batch_size: 2}
evaluate: {name: world, size: 9}
"""
STUDY = "name: two\nbase: run.yaml\nfactors: {vision.adapter: [linear, mlp]}\n"

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(RUN)
    (tmp_path / "study.yaml").write_text(STUDY)
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["train", "study.yaml", "--out", "new"], "study.yaml is a study; `chiasm sweep` runs it"),
        (["sweep", "run.yaml", "--out", "new"], "run.yaml is a run; `chiasm train` runs it"),
        (["train", "run.yaml", "--out", "file"], "nothing can be written into"),
        (["train", "run.yaml", "--out", "file/new"], "nothing can be written into"),
        (["sweep", "study.yaml", "--out", "file"], "nothing can be written into"),
        (["sweep", "study.yaml", "--out", "file/new"], "nothing can be written into"),
        (["train", "empty", "--out", "new"], "empty cannot be read: Is a directory"),
        (["train", "run.yaml", "--out", "new", "--set", "cache"], "wanted NAME=VALUE"),
        (["evaluate", "empty"], "holds no run; wanted a folder that `chiasm train` wrote"),
        (["ask", "empty", "file", "What?"], "holds no run; wanted a folder that `chiasm train` wrote"),
        (["report", "empty"], "holds no study; wanted a folder that `chiasm sweep` wrote into"),
        (["report", "file"], "is a file"),
        (["plan", "run.yaml", "--workers", "0"], "Invalid value for '--workers'"),
        (["plan", "run.yaml", "--text", "-1"], "Invalid value for '--text'"),
        (["plan", "gone.yaml"], "gone.yaml' does not exist"),
        (["plugins", "encodr"], "no kind of component named 'encodr'. Kinds: encoder, fusion"),
        (["check", "encodr", "clip"], "no kind of component named 'encodr'. Kinds: encoder, fusion"),
        (["tran"], "No such command 'tran'. Did you mean 'train'?"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(place: Path, call: Call, monkeypatch, command, says):
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    code, out, err = call(*command)
    assert code == 2
    assert says in err
    assert not out
    assert sorted(place.rglob("*")) == before


def test_an_image_that_cannot_be_decoded_is_told_before_the_model_is_loaded(place: Path, call: Call):
    run = place / "one"
    weights = run / "stages" / "pretrain" / "parts.json"
    weights.parent.mkdir(parents=True)
    weights.touch()  # no weights: to load them would be another error
    (run / "run.json").write_text(json.dumps({"stages": [{"name": "pretrain"}]}))
    (place / "broken.png").write_bytes(b"x")
    code, _, err = call("ask", run, place / "broken.png", "What?")
    assert code == 2
    assert "broken.png' cannot be decoded" in err


def test_a_run_that_is_not_trained_to_its_end_is_told_with_its_status(place: Path, call: Call):
    run = place / "trials" / "one"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"stages": [{"name": "pretrain"}]}))
    (run / "manifest.json").write_text(json.dumps({"status": "running"}))
    for command in (["evaluate", run], ["ask", run, place / "file", "What?"]):
        code, _, err = call(*command)
        assert code == 2
        assert "is not trained to its end (running)" in err
    code, _, err = call("evaluate", place)
    assert code == 2
    assert str(place / "trials" / "NAME") in err
