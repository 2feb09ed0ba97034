"""Configuration: every error names file, line and field; paths are relative to their file; YAML round trips."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from chiasm.config import RunConfig, load_run, resolve
from chiasm.errors import ConfigError
from chiasm.yamlfile import load_yaml

RUN = """\
vision:
  encoders: [{name: blind}]
  adapter: {name: mlp}
llm: {name: causal}
stages:
  - name: pretrain
    data: {name: world, task: captions, size: 8}
    train: [adapter, tokens]
    lr: 1e-3
    batch_size: 4
evaluate: world
"""


@pytest.fixture
def write(tmp_path):
    def make(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    return make


def test_a_run_loads_with_its_defaults_and_round_trips(write):
    run = load_run(write(RUN))
    assert run.stages[0].lr == 1e-3
    assert run.tokens.image == ("SOI", "EOI")
    assert run.vision.fusion.name == "single"
    assert run.evaluate[0].name == "world"
    assert RunConfig.model_validate(run.model_dump(mode="json")) == run


@pytest.mark.parametrize(
    ("old", "new", "line", "field", "says"),
    [
        ("name: mlp", "name: mpl", 3, "vision.adapter.name", "Did you mean 'mlp'?"),
        ("name: mlp", "name: mlp, dept: 2", 3, "vision.adapter.dept", "unknown field. Did you mean 'depth'?"),
        ("name: mlp", "name: mlp, depth: two", 3, "vision.adapter.depth", "given 'two'"),
        ("lr: 1e-3", "lr: fast", 9, "stages.0.lr", "given 'fast'"),
        ("lr: 1e-3", "lr: -1", 9, "stages.0.lr", "wanted greater than 0, given -1"),
        ("lr: 1e-3", "lr: {adapter: 1}", 6, "stages.0", "one rate for each of ['adapter', 'tokens']"),
        ("batch_size: 4", "batch_size: 0", 10, "stages.0.batch_size", "greater than 0"),
        ("batch_size: 4", "batchsize: 4", 10, "stages.0.batchsize", "Did you mean 'batch_size'?"),
        ("[adapter, tokens]", "[adaptor]", 8, "stages.0.train.0", "given 'adaptor'"),
        ("size: 8", "size: many", 7, "stages.0.data.size", "given 'many'"),
        ("name: world, task", "name: word, task", 7, "stages.0.data.name", "no dataset named 'word'"),
        ("llm: {name: causal}", "llm: {}", 4, "llm.name", "is missing"),
        ("evaluate: world", "evalute: world", 11, "evalute", "Did you mean 'evaluate'?"),
        ("evaluate: world", "tokens: {image: [SOI]}", 11, "tokens", "wanted [SOI, EOI] or []"),
        ("lr: 1e-3", "lr: .nan", 9, "stages.0.lr", "given nan"),
        ("lr: 1e-3", "lr: .inf", 9, "stages.0.lr", "wanted a finite number, given inf"),
        ("lr: 1e-3", "lr: true", 9, "stages.0.lr", "wanted a number, given True"),
        ("lr: 1e-3", "lr: 1e-3\n    epochs: .inf", 10, "stages.0.epochs", "wanted a finite number, given inf"),
        ("batch_size: 4", "batch_size: true", 10, "stages.0.batch_size", "wanted a number, given True"),
        ("size: 8", "size: true", 7, "stages.0.data.size", "wanted a number, given True"),
        ("[{name: blind}]", "blind", 2, "vision.encoders", "wanted a list, given 'blind'"),
        ("[{name: blind}]", "[]", 2, "vision.encoders", "wanted 1 or more entries, given []"),
        ("[{name: blind}]", "[null]", 2, "vision.encoders.0", "wanted a mapping of fields, given None"),
        ("evaluate: world", "seed: 99999999999", 11, "seed", "wanted less than 4294967296"),
        ("evaluate: world", "3: world", 11, "3", "wanted text as the name of a field, given 3"),
    ],
)
def test_errors_name_file_line_and_field(write, old, new, line, field, says):
    assert old in RUN
    path = write(RUN.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    message = str(caught.value)
    assert f"{path}:{line}: {field}: " in message
    assert says in message


@pytest.mark.parametrize(
    ("old", "new"), [("lr: 1e-3", "lr: fast"), ("name: blind", "name: 3"), ("[adapter, tokens]", "[adaptor]")]
)
def test_one_mistake_is_one_problem_however_deep_it_stands(write, old, new):
    path = write(RUN.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    assert str(caught.value).count(f"{path}:") == 1


def test_all_problems_are_told_at_once(write):
    text = RUN.replace("name: mlp", "name: mpl").replace("size: 8", "sze: 8")
    with pytest.raises(ConfigError) as caught:
        load_run(write(text))
    assert "vision.adapter.name" in str(caught.value)
    assert "stages.0.data.sze" in str(caught.value)


def test_a_missing_field_names_its_parent(write):
    with pytest.raises(ConfigError, match=r"run\.yaml:6: stages\.0\.lr: is missing and has no default"):
        load_run(write(RUN.replace("    lr: 1e-3\n", "")))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\na: 2\n", r"run\.yaml:2: a is given twice"),
        ("a: [1\nb: 2\n", r"run\.yaml:\d: this is not YAML"),
        ("- 1\n", "wanted a mapping of a run's fields"),
        ("a:\n\tb: 1\n", r"run\.yaml:2: this is not YAML: .* cannot start any token"),
        ("a: 1\nb: \x07\n", r"run\.yaml:2: this is not YAML: the character #x0007"),
        ("a: *b\n", r"run\.yaml:1: this is not YAML: found undefined alias 'b'"),
        ("a: 1\nb: &b\n  c: *b\n", r"run\.yaml:\d: an alias inside what it stands for"),
        ("a: &a [*a]\n", r"run\.yaml:1: an alias inside what it stands for"),
        ("a: " + "[" * 3000, r"run\.yaml: lists and mappings are nested too deeply"),
        ("a: 1\n? [b, c]\n: 2\n", r"run\.yaml:2: a list or a mapping as the name of a field"),
        ("a: !!int two\n", r"run\.yaml:1: 'two' is no int"),
        ("a: !!python/object/apply:os.getcwd []\n", r"run\.yaml:1: the tag .*os\.getcwd"),
        ("a: !mine 3\n", r"run\.yaml:1: this is not YAML: .*'!mine'"),
        ("a: {b: 1, b: 2}\n", r"run\.yaml:1: a\.b is given twice"),
    ],
)
def test_files_that_are_no_run(write, text, says):
    with pytest.raises(ConfigError, match=says):
        load_run(write(text))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.yaml cannot be read"):
        load_run(tmp_path / "nowhere.yaml")


def test_included_data_is_relative_to_its_own_file_and_errors_point_into_it(write):
    write("- {name: llava, file: data.json}\n- {name: world, task: captions, size: 3}\n", "recipes/stage1.yaml")
    text = RUN.replace("{name: world, task: captions, size: 8}", "recipes/stage1.yaml")
    path = write(text)
    run = load_run(path)
    file = resolve("dataset", run.stages[0].data[0])[1].file
    assert file == path.parent / "recipes" / "data.json"
    write("- {name: world, task: captions, siz: 3}\n", "recipes/stage1.yaml")
    with pytest.raises(ConfigError, match=r"stage1\.yaml:1: stages\.0\.data\.0\.siz: unknown field"):
        load_run(path)


def test_numbers_in_exponent_form_are_numbers(write):
    assert load_yaml(write("a: 1e-3\nb: 2E5\nc: 1.5e3\nd: 1e\n")).data == {"a": 1e-3, "b": 2e5, "c": 1.5e3, "d": "1e"}


def test_words_and_dates_are_text(write):
    """YAML 1.1 would read `cache: on` as true, and a study named by a day as a date."""
    found = load_yaml(write("a: on\nb: no\nc: 2024-01-31\nd: true\ne: [off, yes, False]\n")).data
    assert found == {"a": "on", "b": "no", "c": "2024-01-31", "d": True, "e": ["off", "yes", False]}


def test_merged_fields_may_be_replaced(write):
    text = "stages:\n- &one {name: a, lr: 1, steps: 2}\n- {<<: *one, name: b}\n- {name: c, <<: *one, lr: 3}\n- *one\n"
    document = load_yaml(write(text))
    one = {"name": "a", "lr": 1, "steps": 2}
    assert document.data == {"stages": [one, one | {"name": "b"}, one | {"name": "c", "lr": 3}, one]}
    assert document.lines["stages", 1, "name"][1] == 3
    assert document.lines["stages", 1, "lr"][1] == 2, "where the merged field was written"


def test_aliases_of_aliases_do_not_fill_the_memory(write):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    with pytest.raises(ConfigError, match="more than 100,000 values"):
        load_yaml(write("\n".join(lines)))


def test_a_folder_of_weights_is_made_absolute(write, tmp_path):
    (tmp_path / "weights").mkdir()
    for value in ("./weights", "weights"):
        run = load_run(write(RUN.replace("{name: causal}", f"{{name: causal, pretrained: {value}}}")))
        assert run.llm.options["pretrained"] == str(tmp_path / "weights")
    run = load_run(write(RUN.replace("{name: causal}", "{name: causal, pretrained: mistralai/Mistral-7B-v0.1}")))
    assert run.llm.options["pretrained"] == "mistralai/Mistral-7B-v0.1"
