"""What `chiasm plan` says of a study: cells of each fidelity, what is left out, totals, and when it exits with 1."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json

import pytest
import yaml
from click.testing import CliRunner

from chiasm.cost import SampleSize
from chiasm.errors import ConfigError
from chiasm.plan import plan_run
from chiasm_experiments.commands import plan
from chiasm_experiments.study.cells import make_cells, refuse_invalid
from chiasm_experiments.study.config import Study
from chiasm_experiments.study.overview import plan_study
from fake_pool import Bench

SHAPE = {"width": 32, "depth": 1, "heads": 2, "kv_heads": 1, "mlp_width": 32, "context_length": 512}
RUN = {
    "vision": {"encoders": ["blind"], "adapter": "mlp"},
    "llm": {"name": "causal", "shape": SHAPE},
    "stages": [
        {"name": "align", "data": {"name": "world", "size": 20}, "train": ["adapter"], "lr": 1e-3, "batch_size": 8},
        {
            "name": "tune",
            "data": {"name": "world", "size": 50},
            "train": ["adapter", "llm"],
            "lr": 1e-3,
            "batch_size": 4,
            "epochs": 2,
        },
    ],
    "evaluate": "world",
}
SAMPLES = {"align": 8 * round(20 / 8), "tune": 4 * round(50 * 2 / 4)}
"""In whole steps."""
ENCODERS = {"one": ["blind"], "two": ["blind", "blind"]}


@pytest.fixture
def write(tmp_path):
    def make(factors, run=None, **settings):
        path = tmp_path / "study.yaml"
        path.write_text(
            yaml.safe_dump({"name": "s", "base": run or RUN, "factors": factors} | settings, sort_keys=False)
        )
        return path

    return make


def run(*words) -> tuple[int, str]:
    done = CliRunner().invoke(plan, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout


def told(path) -> dict:
    return json.loads(run(path, "--json")[1])


def training(cell, *stages: str) -> float:
    """Operations of training stages of a cell."""
    flops = plan_run(cell.run, SampleSize()).cost.stages
    return sum(SAMPLES[stage] * flops[stage].flops for stage in stages)


def test_a_grid_is_told_with_its_totals(write):
    path = write(
        {"vision.adapter": ["mlp", "linear"], "stages.tune.lr": [1e-3, 1e-2]}, seeds=[0, 1, 2], question="Why?"
    )
    values = told(path)
    assert [(cell["label"], cell["valid"]) for cell in values["cells"]] == [
        (f"{adapter}, lr={lr}", True) for adapter in ("mlp", "linear") for lr in ("0.001", "0.01")
    ]
    assert values["factors"] == {"vision.adapter": ["mlp", "linear"], "stages.tune.lr": ["0.001", "0.01"]}
    assert (values["trials"], values["refused"], values["notes"]) == (12, None, [])
    mlp, linear = make_cells(Study(path)).cells[::2]
    # stage 1 is one for both rates, with each seed
    total = 3 * sum(training(cell, "align") + 2 * training(cell, "tune") for cell in (mlp, linear))
    assert values["train_flops"] == pytest.approx(total)
    code, text = run(path)
    assert code == 0
    assert text.startswith("s: 4 cells x 3 seeds = 12 trials\n  Why?\n")
    assert f"in all: 12 trials, {total:.3g} operations to train them" in text


def test_what_varies_where_and_what_is_left_out_are_told(write):
    factors = {
        "vision.encoders": ENCODERS,
        "vision.fusion": ["concat_tokens", "project_sum"],
        "vision.adapter": ["mlp"],
    }
    path = write(
        factors,
        when={"vision.fusion": {"vision.encoders": ["two"]}},
        constraints={"exclude": [{"vision.encoders": "two", "vision.fusion": "concat_tokens"}]},
    )
    code, text = run(path)
    assert code == 0
    assert "  vision.fusion: concat_tokens | project_sum; only where vision.encoders is two\n" in text
    reason = "constraints.exclude: vision.encoders is two and vision.fusion is concat_tokens"
    assert f"  two, concat_tokens, mlp: left out: {reason}\n" in text
    (left,) = told(path)["skipped"]
    assert left == {
        "label": "two, concat_tokens, mlp",
        "levels": {"vision.encoders": "two", "vision.fusion": "concat_tokens", "vision.adapter": "mlp"},
        "fidelity": "full",
        "by": "constraint",
        "reasons": [reason],
    }


@pytest.mark.parametrize(("settings", "refuses"), [({}, True), ({"invalid": "skip"}, False)])
def test_it_exits_with_1_where_a_sweep_would_refuse(write, settings, refuses):
    path = write({"vision.encoders": ENCODERS}, **settings)
    code, text = run(path)
    assert code == int(refuses)
    assert "  two: CANNOT WORK: vision.fusion: single takes one encoder, given 2" in text
    values = told(path)
    assert [(cell["label"], cell["valid"]) for cell in values["cells"]] == [("one", True), ("two", False)]
    assert "single takes one encoder" in values["cells"][1]["problems"][0]
    study = Study(path)
    with pytest.raises(ConfigError) if refuses else contextlib.nullcontext() as error:
        refuse_invalid(make_cells(study), study)
    assert values["refused"] == (str(error.value) if refuses else None)


def test_constraints_that_leave_nothing_are_an_error(write):
    with pytest.raises(ConfigError, match="the constraints of study 's' leave no cell"):
        run(write({"vision.adapter": ["mlp"]}, constraints={"at_most": {"flops": 1}}))


FIDELITIES = {"short": {"stages.align.data.size": 10, "stages.tune.steps": 5}, "whole": {}}


def test_each_fidelity_is_told_with_what_it_tries(write):
    factors = {"vision.adapter": ["mlp", "linear", "resampler"], "stages.tune.lr": [1e-3, 1e-2]}
    path = write(factors, fidelities=FIDELITIES, promote=0.4, seeds=[0, 1])
    values = told(path)
    assert [(f["name"], f["cells"], f["tried"], f["trials"]) for f in values["fidelities"]] == [
        ("short", 6, 6, 12),
        ("whole", 6, 3, 6),
    ]
    assert [cell["fidelity"] for cell in values["cells"]] == ["short"] * 6 + ["whole"] * 6
    assert values["trials"] == 18
    cells = make_cells(Study(path)).cells
    flops = [plan_run(cell.run, SampleSize()).cost.stages for cell in cells]
    short = 2 * sum(8 * flops[i]["align"].flops for i in (0, 2, 4)) + 2 * sum(5 * 4 * f["tune"].flops for f in flops)
    whole = 6 * sum(training(cell, "align", "tune") for cell in cells) / 6
    assert values["fidelities"][0]["train_flops"] == pytest.approx(short)
    assert values["fidelities"][1]["train_flops"] == pytest.approx(whole)
    text = run(path)[1]
    assert "fidelity short: stages.align.data.size 10, stages.tune.steps 5; 12 trials" in text
    assert "fidelity whole: the run as it is; the best 3 cells of the one before go on to it" in text
    assert "about" in text.splitlines()[-2]


def test_a_fidelity_that_skips_stage_1_or_saves_nothing_is_told(write):
    fidelities = {"long": {"stages.tune.epochs": 3}, "blunt": {"stages": RUN["stages"][1:]}, "whole": {}}
    path = write({"vision.adapter": ["mlp", "linear"]}, fidelities=fidelities)
    text = run(path)[1]
    assert "NOTE: fidelity blunt: stage 1 is skipped in 2 of 2 cells" in text
    assert "NOTE: fidelity long: a cell takes no less training than at blunt" in text
    assert len(told(path)["notes"]) == 2


def test_a_cell_that_works_at_the_first_fidelity_alone_is_refused(write):
    context = SHAPE | {"context_length": 512}
    run_ = copy.deepcopy(RUN)
    run_["llm"]["shape"] = SHAPE | {"context_length": 64}
    encoders = {side: [{"name": "blind", "grid": [side, side]}] for side in (4, 10)}
    fidelities = {"short": {"llm.shape": context, "stages.tune.steps": 1}, "whole": {}}
    path = write({"vision.encoders": encoders}, run_, fidelities=fidelities)
    code, text = run(path)
    assert code == 1
    assert "the context of 64 positions is too short for 100 visual tokens" in text
    assert [cell["valid"] for cell in told(path)["cells"]] == [True, True, True, False]


def test_a_search_is_told_by_what_it_draws_from(write):
    factors = {
        "vision.adapter": ["mlp", "linear"],
        "vision.adapter.depth": {"low": 1, "high": 6},
        "stages.tune.lr": {"low": 1e-4, "high": 1e-2, "log": True},
    }
    when = {"vision.adapter.depth": {"vision.adapter": "mlp"}}
    search = {"trials": 20, "sampler": "gp", "pruner": "median", "rungs": [0.25, 0.5]}
    path = write(factors, when=when, design="search", search=search, budget={"gpu_hours": 3})
    code, text = run(path)
    assert code == 0
    assert text.startswith("s: a search, 20 trials\n")
    for line in (
        "  vision.adapter.depth: whole numbers from 1 to 6; only where vision.adapter is mlp",
        "  stages.tune.lr: numbers from 0.0001 to 0.01, on a logarithmic scale",
        "  proposed by gp",
        "  asked at 0.25, 0.5 of the last stage; pruner: median",
        "  no trial starts after 3 GPU-hours",
    ):
        assert line in text.splitlines()
    values = told(path)
    cells = make_cells(Study(path)).cells
    mean = sum(training(cell, "align", "tune") for cell in cells) / len(cells)
    assert values["trials"] == 20
    assert values["train_flops"] == pytest.approx(20 * mean)
    assert values["factors"]["vision.adapter.depth"] == {"low": 1, "high": 6, "log": False}


def test_a_search_without_a_number_of_trials_ends_with_its_budget(write):
    path = write({"vision.adapter": ["mlp", "linear"]}, design="search", budget={"gpu_hours": 3})
    text = run(path)[1]
    assert text.startswith("s: a search, trials until the budget is spent\n")
    assert told(path)["train_flops"] is None


def test_a_large_search_is_told_by_its_ends(write):
    factors = {"vision.encoders": {i: [{"name": "blind", "grid": [i, i]}] for i in range(2, 10)}}
    factors |= {"vision.adapter": ["mlp", "linear"], "stages.tune.lr": [1e-3, 2e-3, 4e-3]}
    path = write(factors, design="search", search={"trials": 4})
    text = run(path)[1]
    assert "of 48 combinations that were planned 48 can work:" in text
    assert "    visual tokens: 4 to 81" in text
    assert len(text.splitlines()) < 30
    assert len(told(path)["cells"]) == 48


def test_data_that_is_not_here_leaves_the_total_open(write):
    values = copy.deepcopy(RUN)
    values["stages"][1]["data"] = {"name": "llava", "file": "gone.json"}
    path = write({"vision.adapter": ["mlp", "linear"]}, values)
    code, text = run(path)
    assert code == 0
    assert told(path)["train_flops"] is None
    (line,) = [line for line in text.splitlines() if "cannot be told" in line]
    assert "stage tune" in line
    assert "gone.json" in line
    values["stages"][1]["steps"] = 3  # then its size does not matter
    assert told(write({"vision.adapter": ["mlp", "linear"]}, values))["train_flops"] > 0


def test_gpu_memory_names_cells_that_take_more(write):
    path = write({"vision.adapter": ["mlp", "linear"]})
    text = run(path, "--gpu-memory", 1e-4)[1]
    found = [line for line in text.splitlines() if "is estimated to take" in line]
    assert len(found) == 4
    assert not [line for line in run(path)[1].splitlines() if "is estimated to take" in line]


def test_a_plan_is_the_same_twice(write):
    factors = {
        "vision.encoders": ENCODERS,
        "vision.fusion": ["concat_tokens", "project_sum", "single"],
        "evaluation_batch_size": [32, 1],
    }
    for design in ("grid", "one_factor", "pairwise"):
        path = write(factors, design=design, invalid="skip")
        assert told(path) == told(path)


def test_what_is_refused_at_any_fidelity_is_known_to_the_plan(write):
    path = write({"vision.adapter": ["mlp", "linear"]}, fidelities=FIDELITIES)
    whole = plan_study(Study(path), SampleSize())
    assert whole.refused is None
    assert [item.exact for item in whole.fidelities] == [True, False]
    assert all(a.each < b.each for a, b in itertools.pairwise(whole.fidelities))


@pytest.mark.parametrize("design", ["grid", "one_factor", "pairwise"])
def test_a_sweep_does_what_its_plan_says(tmp_path, design):
    bench = Bench(tmp_path).write(
        factors={
            "vision.encoders": ENCODERS,
            "vision.fusion": ["single", "concat_tokens", "project_sum"],
            "vision.fusion.align": ["pad", "interpolate"],
            "vision.adapter": ["mlp", "linear"],
        },
        when={"vision.fusion": {"vision.encoders": "two"}, "vision.fusion.align": {"vision.fusion": "project_sum"}},
        design=design,
        invalid="skip",
        fidelities={"blunt": {"stages.pretrain.train": ["adapter", "llm"]}, "whole": {"stages.pretrain.epochs": 9}},
    )
    values = told(bench.path)
    assert bench.sweep().complete == values["trials"]
    first = [about for about in bench.plan["trials"].values() if about["fidelity"] == "blunt"]
    planned = [cell["levels"] for cell in values["cells"] if cell["valid"] and cell["fidelity"] == "blunt"]
    for seed in (0, 1):
        ran = [about["levels"] for about in first if about["seed"] == seed]
        assert sorted(map(str, ran)) == sorted(map(str, planned))
    assert bench.plan["skipped"][0]["levels"] == values["skipped"][0]["levels"]
    assert "stage 1 is skipped" in values["notes"][0]
    assert bench.plan["notes"] == values["notes"]
    assert [line for line in bench.said if line.startswith("note: ")] == [f"note: {note}" for note in values["notes"]]
