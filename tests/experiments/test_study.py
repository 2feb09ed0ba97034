"""Studies before they run: cells, labels, seeds, and errors that stop them before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from chiasm.config import load_run
from chiasm.errors import ChiasmError, ConfigError
from chiasm_experiments.study.cells import make_cells, make_trials, refuse_invalid
from chiasm_experiments.study.config import Study
from chiasm_experiments.study.sweep import start_ray, sweep

RUN = {
    "vision": {"encoders": ["blind"], "adapter": "mlp"},
    "llm": {"name": "causal", "shape": {"width": 32, "depth": 1, "heads": 2, "kv_heads": 1, "mlp_width": 32}},
    "stages": [
        {
            "name": "pretrain",
            "data": {"name": "world", "task": "captions", "size": 4},
            "train": ["adapter"],
            "lr": 1e-3,
            "batch_size": 2,
        }
    ],
    "evaluate": [{"name": "world", "size": 4}],
}
STUDY = {
    "name": "tiny",
    "base": "run.yaml",
    "factors": {"vision.adapter": ["mlp", "linear"], "stages.pretrain.lr": {"slow": 1e-4, "fast": 1e-2}},
    "seeds": [3, 5],
}


@pytest.fixture
def write(tmp_path):
    def make(study=None, run=None):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(run or RUN, sort_keys=False))
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(STUDY | (study or {}), sort_keys=False))
        return path

    return make


def test_a_grid_has_every_combination_and_seeds_are_blocks(write):
    study = Study(write())
    made = make_cells(study)
    cells = made.cells
    assert [cell.label for cell in cells] == ["mlp, slow", "mlp, fast", "linear, slow", "linear, fast"]
    assert [cell.run.stages[0].lr for cell in cells] == [1e-4, 1e-2] * 2
    trials = make_trials(study, made)
    assert [trial.seed for trial in trials] == [3] * 4 + [5] * 4
    assert [trial.run.seed for trial in trials] == [3] * 4 + [5] * 4
    assert len({trial.name for trial in trials}) == 8
    assert all(cell.plan.valid for cell in cells), [cell.plan.problems for cell in cells]


def trial_names(study: Study) -> set[str]:
    return {trial.name for trial in make_trials(study, make_cells(study))}


def test_names_follow_content(write):
    names = trial_names(Study(write()))
    changed = json.loads(json.dumps(RUN))
    changed["stages"][0]["batch_size"] = 4
    assert not names & trial_names(Study(write(run=changed)))


def test_levels_are_labelled_by_what_they_are(write):
    levels = ["mlp", {"name": "mlp", "depth": 3}]
    study = Study(write({"factors": {"vision.adapter": levels, "vision.encoders": [["blind", "blind"], ["blind"]]}}))
    assert list(study.config.factors["vision.adapter"]) == ["mlp", "mlp(depth=3)"]
    assert list(study.config.factors["vision.encoders"]) == ["blind+blind", "blind"]


def test_fields_that_the_base_leaves_to_defaults_can_vary(write):
    study = Study(write({"factors": {"vision.image.resize": ["pad", "squash"]}}))
    assert [cell.run.vision.image.resize for cell in make_cells(study).cells] == ["pad", "squash"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"factors": {"vision.adapter": ["mlp", "lniear"]}}, r"study\.yaml:\d+: vision\.adapter.*mean 'linear'"),
        ({"factors": {"vision.adaptor": ["mlp"]}}, r"vision\.adaptor: unknown field\. Did you mean 'adapter'"),
        ({"factors": {"stages.first.lr": [1]}}, r"stages has no entry 'first'; entries: \['pretrain'\]"),
        ({"factors": {"stages.pretrain.lr": ["fast"]}}, r"study\.yaml:\d+: stages\.0\.lr: .*given 'fast'"),
        ({"factors": {"seed.x": [1]}, "base": RUN | {"seed": 1}}, "seed is 1 in the base run, so it has no field 'x'"),
        ({"factors": {"vision.adapter": []}}, "'vision.adapter' has no level"),
        ({"factors": {"vision.adapter": ["mlp", "mlp"]}}, "two levels are both called 'mlp'"),
        ({"factor": {}}, r"study\.yaml:\d+: factor: unknown field\. Did you mean 'factors'"),
        ({"base": "gone.yaml"}, r"study\.yaml:2: base: the run .*gone\.yaml' does not exist"),
        ({"control": {"vision.adapter": "blind"}}, "no factor 'vision.adapter' with level 'blind'"),
        ({"base": "study.yaml"}, r"study\.yaml:2: base: wanted the file of a run, .*study\.yaml' holds a study"),
        ({"seeds": [1, 1]}, "wanted different numbers"),
        ({"seeds": [2**32]}, "wanted different numbers"),
        ({"factors": {"seed": [0, 1]}}, "factor 'seed': seeds are repetitions"),
        ({"name": "a/b"}, r"study\.yaml:1: name: "),
    ],
)
def test_wrong_studies_are_refused_with_their_place(write, change, says):
    with pytest.raises(ConfigError, match=says):
        make_cells(Study(write(change)))


@pytest.mark.parametrize(
    ("factors", "says"),
    [
        ({"vision.encoders": [["blind"], ["blind", "blind"]]}, "blind\\+blind: vision.fusion: "),
        (
            {
                "vision.encoders": [[{"name": "blind", "grid": [4, 4]}, {"name": "blind", "grid": [2, 2]}]],
                "vision.fusion": ["concat_channels"],
            },
            "vision.fusion: .*4.*2",
        ),
        ({"llm.shape.context_length": [16]}, "the context of 16 positions is too short for 16 visual tokens"),
        ({"llm.pretrained": ["./nowhere"]}, "llm: .*nowhere"),
    ],
)
def test_cells_that_cannot_work_stop_the_study_before_it_starts(write, tmp_path, factors, says):
    run = json.loads(json.dumps(RUN))
    if "llm.pretrained" in factors:
        del run["llm"]["shape"]
    path = write({"factors": factors}, run)
    with pytest.raises(ConfigError, match=says):
        refuse_invalid(make_cells(Study(path)), Study(path))
    with pytest.raises(ConfigError, match=says):
        sweep(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_study_that_nothing_would_score_stops_before_it_starts(write, tmp_path):
    path = write(run={key: value for key, value in RUN.items() if key != "evaluate"})
    with pytest.raises(ConfigError, match="evaluate: no benchmark would score it"):
        sweep(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_data_stops_the_study_before_it_starts(write, tmp_path):
    run = json.loads(json.dumps(RUN))
    run["stages"][0]["data"] = {"name": "llava", "file": "gone.json"}
    with pytest.raises(ChiasmError, match=r"gone\.json' cannot be read"):
        sweep(write(run=run), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_study_is_left_alone(write, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match="is not empty and holds no study"):
        sweep(write(), out)
    (out / "thesis.tex").unlink()
    earlier = {"name": "tiny", "seeds": [1]}
    (out / "study.json").write_text(json.dumps(earlier))
    with pytest.raises(ConfigError, match="study of an earlier version.*--fresh"):
        sweep(write(), out)
    assert json.loads((out / "study.json").read_text()) == earlier


def test_without_an_address_ray_is_started_here_whatever_cluster_was_here_before(monkeypatch):
    import ray

    calls = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: calls.append(options.get("address")))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    start_ray(print)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    start_ray(print)
    assert calls == ["local", None]  # None: Ray reads the variable


ROOT = Path(__file__).parents[2] / "experiments"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_parses(path):
    assert load_run(path).stages
