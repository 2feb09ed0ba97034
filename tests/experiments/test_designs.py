"""What each design tries: combinations counted by hand or by brute force, and what is left out with its reason."""

from __future__ import annotations

import copy
import itertools
import random

import pytest
import yaml

from chiasm.cost import SampleSize
from chiasm.errors import ConfigError
from chiasm.plan import plan_run
from chiasm_experiments.study.cells import Cell, Skipped, Trial, make_cell, make_cells, make_trials, refuse_invalid
from chiasm_experiments.study.config import Study, StudyConfig
from chiasm_experiments.study.designs import combinations_of, pairwise
from chiasm_experiments.study.space import Space

SHAPE = {"width": 32, "depth": 1, "heads": 2, "kv_heads": 1, "mlp_width": 32, "context_length": 256}
RUN = {
    "vision": {"encoders": ["blind"], "adapter": "mlp"},
    "llm": {"name": "causal", "shape": SHAPE},
    "stages": [
        {"name": "align", "data": {"name": "world", "size": 4}, "train": ["adapter"], "lr": 1e-3, "batch_size": 2},
        {"name": "tune", "data": [{"name": "world"}], "train": ["adapter", "llm"], "lr": 1e-3, "batch_size": 2},
    ],
    "evaluate": "world",
}
ONE, TWO = ["blind"], ["blind", "blind"]
DEPTHS = {"vision.adapter": ["mlp", "linear"], "vision.adapter.depth": [1, 2, 3]}
ONLY_MLP = {"vision.adapter.depth": {"vision.adapter": "mlp"}}


@pytest.fixture
def study(tmp_path):
    def make(factors, run=None, **settings) -> Study:
        path = tmp_path / "study.yaml"
        values = {"name": "s", "base": run or RUN, "factors": factors} | settings
        path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
        return Study(path)

    return make


def labels(study: Study, **options) -> list[str]:
    return [cell.label for cell in make_cells(study, **options).cells]


# grid, one factor, listed cells


def test_a_grid_is_every_combination_with_the_last_factor_changing_first(study):
    factors = {
        "vision.adapter": ["mlp", "linear"],
        "stages.align.lr": {"slow": 1e-4, "fast": 1e-2},
        "evaluation_batch_size": [3, 4],
    }
    wanted = itertools.product(
        ["mlp", "linear"], ["slow", "fast"], ["evaluation_batch_size=3", "evaluation_batch_size=4"]
    )
    assert labels(study(factors)) == [", ".join(item) for item in wanted]


def test_a_factor_varies_only_where_its_condition_holds(study):
    assert labels(study(DEPTHS, when=ONLY_MLP)) == ["mlp, depth=1", "mlp, depth=2", "mlp, depth=3", "linear"]


def test_conditions_on_conditions(study):
    factors = {
        "vision.fusion.align": ["pad", "interpolate"],
        "vision.fusion": ["concat_tokens", "project_sum"],
        "vision.encoders": {"one": ONE, "two": TWO},
    }
    when = {"vision.fusion": {"vision.encoders": ["two"]}, "vision.fusion.align": {"vision.fusion": ["project_sum"]}}
    cells = make_cells(study(factors, when=when)).cells
    found = [tuple(cell.levels[path] for path in reversed(factors)) for cell in cells]
    two = [("two", "project_sum", "pad"), ("two", "project_sum", "interpolate")]
    assert found == [("one", "base", "base"), ("two", "concat_tokens", "base"), *two]
    assert [cell.run.vision.fusion.name for cell in cells] == ["single", "concat_tokens", *["project_sum"] * 2]
    assert [cell.run.vision.fusion.options.get("align") for cell in cells] == [None, None, "pad", "interpolate"]


def test_conditions_look_at_what_stands_at_the_base_too(study):
    run = copy.deepcopy(RUN)
    run["vision"]["fusion"] = "project_sum"
    factors = {
        "vision.encoders": {"one": ONE, "two": TWO},
        "vision.fusion": ["concat_tokens", "project_sum"],
        "vision.fusion.layer_scalars": [True, False],
    }
    when = {
        "vision.fusion": {"vision.encoders": "two"},
        "vision.fusion.layer_scalars": {"vision.fusion": "project_sum"},
    }
    found = [list(cell.levels.values()) for cell in make_cells(study(factors, run, when=when)).cells]
    one = [["one", "project_sum", "True"], ["one", "project_sum", "False"]]
    two = [["two", "concat_tokens", "base"], ["two", "project_sum", "True"], ["two", "project_sum", "False"]]
    assert found == one + two


def test_conditions_that_depend_on_one_another_are_refused(study):
    factors = {"vision.adapter": ["mlp"], "evaluation_batch_size": [1], "system": ["x"]}
    when = {
        "vision.adapter": {"evaluation_batch_size": 1},
        "evaluation_batch_size": {"system": "x"},
        "system": {"vision.adapter": "mlp"},
    }
    with pytest.raises(
        ConfigError, match=r"when: vision\.adapter, evaluation_batch_size, system depend on one another"
    ):
        make_cells(study(factors, when=when))


def test_a_grid_beyond_all_bounds_is_refused(study):
    factors = {f"stages.{stage}.{name}": [1, 2, 3, 4, 5] for stage in ("align", "tune") for name in ("lr", "epochs")}
    factors |= {"evaluation_batch_size": [*range(1, 41)]}
    space = Space(study(factors).config, dict.fromkeys(factors, "base"))
    with pytest.raises(ConfigError, match="more than 20,000 cells; take `pairwise`"):
        list(combinations_of(space, lambda _: True, lambda _: None))


def test_one_factor_is_the_base_and_each_level_alone(study):
    factors = {"vision.adapter": ["linear", "mlp"], "stages.align.lr": [1e-4, 1e-3, 1e-2]}
    found = [list(cell.levels.values()) for cell in make_cells(study(factors, design="one_factor")).cells]
    # mlp and 0.001 are what the base run has: such a cell is the base, and runs once
    assert found == [["mlp", "0.001"], ["linear", "0.001"], ["mlp", "0.0001"], ["mlp", "0.01"]]


def test_one_factor_without_the_base_among_the_levels(study):
    factors = {"vision.adapter": ["linear"], "stages.align.lr": [1e-4]}
    found = [list(cell.levels.values()) for cell in make_cells(study(factors, design="one_factor")).cells]
    assert found == [["base", "base"], ["linear", "base"], ["base", "0.0001"]]
    assert labels(study(factors, design="one_factor"))[0] == "base"


def test_one_factor_says_which_factor_it_cannot_vary(study):
    run = copy.deepcopy(RUN)
    run["vision"]["adapter"] = "linear"
    made = make_cells(study(DEPTHS, run, when=ONLY_MLP, design="one_factor"))
    assert [cell.label for cell in made.cells] == ["linear", "mlp"]
    assert made.notes == (
        "fidelity full: vision.adapter.depth: 1, 2, 3 in no cell; see when, and what the base run has",
    )


def test_listed_cells_stand_at_the_base_where_they_name_nothing(study):
    cells = [{"vision.adapter": "linear"}, {"vision.adapter.depth": 3}, {"vision.adapter": "linear"}, {}]
    made = make_cells(study(DEPTHS, design="cells", cells=cells))
    found = [list(cell.levels.values()) for cell in made.cells]
    # an option of a part that was replaced is gone; of the mlp the base has depth 2, which is its default
    assert found == [["linear", "base"], ["mlp", "3"], ["mlp", "2"]]
    assert not made.notes


def test_a_listed_cell_that_varies_what_does_not_vary_there_is_refused(study):
    cells = [{"vision.adapter": "linear", "vision.adapter.depth": 3}]
    with pytest.raises(ConfigError, match=r"cells\.0: 'vision.adapter.depth' is '3', but varies only where vision"):
        make_cells(study(DEPTHS, when=ONLY_MLP, design="cells", cells=cells))


def test_levels_that_are_one_run_are_tried_once_and_named(study):
    levels = {"plain": "mlp", "written out": {"name": "mlp", "depth": 2}, "linear": "linear"}
    made = make_cells(study({"vision.adapter": levels}))
    assert [cell.label for cell in made.cells] == ["plain", "linear"]
    assert made.notes == ("fidelity full: written out is the same run as plain, which is tried once",)


# pairwise


def pairs(rows: list[dict[str, str | None]]) -> set[frozenset[tuple[str, str | None]]]:
    return {frozenset(pair) for row in rows for pair in itertools.combinations(row.items(), 2)}


def whole_grid(config: StudyConfig) -> list[dict[str, str | None]]:
    """By brute force: every choice of a level, or of none, that the conditions of all factors agree with."""
    rows = []
    for values in itertools.product(*([None, *levels] for levels in config.varied.values())):
        row = dict(zip(config.factors, values, strict=True))
        if all(
            (row[path] is not None) == all(row[other] in named for other, named in config.when.get(path, {}).items())
            for path in row
        ):
            rows.append(row)
    return rows


@pytest.mark.parametrize("seed", range(12))
def test_pairwise_has_every_pair_that_is_allowed(seed):
    draw = random.Random(seed)
    names = "abcdef"[: draw.randint(2, 6)]
    factors = {name: [f"{name}{i}" for i in range(draw.randint(1, 4))] for name in names}
    when = {}
    for place, name in enumerate(names[1:], 1):
        if draw.random() < 0.4:
            other = names[draw.randrange(place)]
            when[name] = {other: draw.sample(factors[other], draw.randint(1, len(factors[other])))}
    config = StudyConfig.model_validate(
        {"name": "s", "base": {}, "factors": factors, "when": when, "design": "pairwise"}
    )
    grid = whole_grid(config)
    barred = [draw.sample(sorted(draw.choice(grid).items(), key=str), min(2, len(names))) for _ in range(seed % 4)]

    def allowed(chosen):
        return not any(all(chosen.get(path) == level for path, level in pair) for pair in barred)

    space = Space(config, dict.fromkeys(factors, "base"))
    missing = []
    found = [{name: row.get(name) for name in names} for row in pairwise(space, allowed, missing.append)]
    possible = [row for row in grid if allowed(row)]
    assert pairs(found) == pairs(possible)
    assert all(row in possible for row in found)
    assert {frozenset(item.items()) for item in missing} == pairs(grid) - pairs(possible)
    assert len({str(row) for row in found}) == len(found) <= len(possible)
    again = [{name: row.get(name) for name in names} for row in pairwise(space, allowed, missing.append)]
    assert again == found


def test_pairwise_is_far_fewer_than_the_grid():
    factors = {name: [f"{name}{i}" for i in range(4)] for name in "abcdef"}
    config = StudyConfig.model_validate({"name": "s", "base": {}, "factors": factors, "design": "pairwise"})
    found = list(pairwise(Space(config, dict.fromkeys(factors, "base")), lambda _: True, lambda _: None))
    # 4 x 4 for any two is the least; the grid has 4096
    assert 16 <= len(found) <= 2 * 16


def test_pairwise_with_much_that_is_not_allowed_is_finished():
    """All that is not allowed lies above many factors, each combination of which would be looked at."""
    factors = {name: [f"{name}{i}" for i in range(4)] for name in "abcdefghij"}
    config = StudyConfig.model_validate({"name": "s", "base": {}, "factors": factors, "design": "pairwise"})
    asked = []

    def allowed(chosen):
        asked.append(chosen)
        return chosen["a"] != "a0" or chosen["b"] in ("b0", "b1")

    missing = []
    found = list(pairwise(Space(config, dict.fromkeys(factors, "base")), allowed, missing.append))
    assert missing == [{"a": "a0", "b": "b2"}, {"a": "a0", "b": "b3"}]
    pairs_found = pairs(found)
    assert len(pairs_found) == 45 * 16 - 2
    assert len(found) < 60
    assert len(asked) < 5000


def test_pairwise_with_one_factor_is_its_levels(study):
    assert labels(study({"vision.adapter": ["mlp", "linear"]}, design="pairwise")) == ["mlp", "linear"]


PAIRS = {
    "vision.encoders": {"one": ONE, "two": TWO},
    "vision.fusion": ["single", "concat_tokens", "project_sum"],
    "vision.adapter": ["mlp", "linear", "transformer"],
    "stages.align.lr": [1e-4, 1e-3, 1e-2],
}


def test_a_pairwise_study_leaves_out_what_cannot_work(study):
    skipping = study(PAIRS, design="pairwise", invalid="skip")
    made = make_cells(skipping)
    every = make_cells(study(PAIRS)).cells
    assert pairs([cell.levels for cell in made.cells]) == pairs([cell.levels for cell in every])
    assert len(made.cells) < len(every) / 3
    (left,) = made.skipped
    assert (left.levels, left.by) == ({"vision.encoders": "two", "vision.fusion": "single"}, "plan")
    assert "single takes one encoder, given 2" in left.reasons[0]
    refuse_invalid(made, skipping)
    refusing = study(PAIRS, design="pairwise")
    with pytest.raises(ConfigError, match="two, single: in no cell; for example"):
        refuse_invalid(make_cells(refusing), refusing)


def test_a_level_that_never_works_is_named_once(study):
    factors = PAIRS | {"vision.encoders": {"two": TWO}}
    made = make_cells(study(factors, design="pairwise", invalid="skip"))
    assert [left.levels for left in made.skipped] == [{"vision.fusion": "single"}]


# constraints, and cells that cannot work


def test_exclude_leaves_out_cells_that_have_all_its_levels(study):
    factors = {"vision.adapter": ["mlp", "linear"], "stages.align.lr": [1e-4, 1e-3, 1e-2]}
    constraints = {"exclude": [{"vision.adapter": "linear", "stages.align.lr": [1e-4, 1e-2]}]}
    made = make_cells(study(factors, constraints=constraints))
    assert [list(cell.levels.values()) for cell in made.cells] == [
        *[["mlp", lr] for lr in ("0.0001", "0.001", "0.01")],
        ["linear", "0.001"],
    ]
    assert [(left.label, left.by) for left in made.skipped] == [
        ("linear, lr=0.0001", "constraint"),
        ("linear, lr=0.01", "constraint"),
    ]
    assert made.skipped[0].reasons == (
        "constraints.exclude: vision.adapter is linear and stages.align.lr is 0.0001 or 0.01",
    )


def test_exclude_looks_at_what_stands_at_the_base(study):
    factors = {"vision.adapter": ["mlp", "linear"], "evaluation_batch_size": [32, 1]}
    constraints = {"exclude": [{"vision.adapter": "mlp", "evaluation_batch_size": 1}]}
    assert labels(study(factors, constraints=constraints, design="one_factor")) == [
        "mlp, evaluation_batch_size=32",
        "linear, evaluation_batch_size=32",
    ]


@pytest.mark.parametrize("design", ["grid", "one_factor", "pairwise"])
def test_constraints_that_leave_nothing_are_an_error_that_says_so(study, design):
    constraints = {"at_most": {"visual_tokens": 15}}
    factors = {"vision.adapter": ["mlp", "linear"], "evaluation_batch_size": [32, 1]}
    with pytest.raises(ConfigError, match="leave no cell:\n.*visual_tokens 15, planned 16"):
        make_cells(study(factors, constraints=constraints, design=design))


def quantity(run, name: str) -> float:
    """Of a plan, told without the code under test."""
    plan = plan_run(run, SampleSize())
    return {
        "visual_tokens": plan.visual_tokens,
        "parameters": sum(plan.parameters.values()),
        "trained_parameters": sum(plan.trained.values()),
        "flops": plan.cost.inference,
        "gpu_gib": max(stage.gpu_bytes for stage in plan.cost.stages.values()) / 2**30,
    }[name]


@pytest.mark.parametrize("name", ["visual_tokens", "parameters", "trained_parameters", "flops", "gpu_gib"])
def test_at_most_holds_the_plan_of_each_cell_against_a_bound(study, name):
    factors = {"vision.encoders": {side: [{"name": "blind", "grid": [side, side]}] for side in (2, 4, 8)}}
    factors["vision.adapter"] = ["linear", {"name": "mlp", "depth": 3}]
    cells = make_cells(study(factors)).cells
    values = [quantity(cell.run, name) for cell in cells]
    bound = sorted(values)[2]
    assert bound < max(values)
    made = make_cells(study(factors, constraints={"at_most": {name: bound}}))
    assert [cell.label for cell in made.cells] == [
        cell.label for cell, value in zip(cells, values, strict=True) if value <= bound
    ]
    assert {left.by for left in made.skipped} == {"constraint"}


def test_cells_that_cannot_work_are_skipped_where_the_study_says_so(study):
    factors = {"vision.encoders": {"one": ONE, "two": TWO}, "vision.adapter": ["mlp", "linear"]}
    skipping = study(factors, invalid="skip")
    made = make_cells(skipping)
    assert [cell.label for cell in made.cells] == ["one, mlp", "one, linear"]
    assert [(left.label, left.by) for left in made.skipped] == [("two, mlp", "plan"), ("two, linear", "plan")]
    refuse_invalid(made, skipping)
    with pytest.raises(ConfigError, match="two, mlp: vision.fusion: single takes one encoder"):
        refuse_invalid(make_cells(study(factors)), study(factors))
    nothing = study({"vision.encoders": {"two": TWO}}, invalid="skip")
    with pytest.raises(ConfigError, match="no cell that can work"):
        refuse_invalid(make_cells(nothing), nothing)


def test_levels_at_odds_with_each_other_are_no_mistake_and_a_wrong_level_is(study):
    factors = {"vision.image.views": ["whole", "tiles"], "vision.image.max_tiles": [4, 6]}
    made = make_cells(study(factors, invalid="skip"))
    assert [list(cell.levels.values()) for cell in made.cells] == [["whole", "4"], ["tiles", "4"], ["tiles", "6"]]
    assert "max_tiles: for `views: tiles`" in made.skipped[0].reasons[0]
    with pytest.raises(ConfigError, match=r"study\.yaml:\d+: vision\.image\.max_tiles: wanted .*given -1"):
        make_cells(study(factors | {"vision.image.max_tiles": [4, -1]}, invalid="skip"))


# fields


def test_a_level_may_be_a_whole_part_and_a_field_of_it_another_factor(study):
    factors = {
        "vision.adapter": ["linear", {"name": "avg_pool", "grid": [2, 2]}],
        "vision": {"small": {"encoders": [{"name": "blind", "grid": [2, 2]}]}, "large": {"encoders": ONE}},
    }
    cells = make_cells(study(factors)).cells
    # the part is put in first, whatever the order of the file
    assert [(c.run.vision.adapter.name, c.plan.visual_tokens) for c in cells] == [
        ("linear", 4), ("linear", 16), ("avg_pool", 4), ("avg_pool", 4),
    ]  # fmt: skip


def test_paths_lead_into_options_and_lists(study):
    run = copy.deepcopy(RUN)
    run["stages"][1]["data"] = [{"name": "world", "size": 6}, "world"]
    factors = {
        "vision.adapter.depth": [3],  # of a component that is a name alone
        "vision.encoders.blind.grid": [[3, 3]],  # of an entry of a list by its name
        "stages.align.data.size": [7],  # of the only data set
        "stages.1.data.1.size": [8],  # of one of several
        "evaluate.world.size": [9],  # of a single benchmark, by its name
    }
    run = make_cells(study(factors, run)).cells[0].run
    assert run.vision.adapter.options == {"depth": 3}
    assert run.vision.encoders[0].options == {"grid": [3, 3]}
    assert run.stages[0].data[0].options == {"size": 7}
    assert [ref.options for ref in run.stages[1].data] == [{"size": 6}, {"size": 8}]
    assert run.evaluate[0].options == {"size": 9}


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("stages.tune.data.size", "stages.1.data has no entry 'size'; entries: \\['world', 'world'\\]"),
        ("stages.tune.data.world.size", "several entries 'world'; name one by its index"),
        ("vision.encoders.3.grid", "vision.encoders has no entry '3'"),
        ("system.x", "system is 'hello' in the base run, so it has no field 'x'"),
        ("vision.image.views.x.y", "vision.image.views.x is .*|given {'x': {'y': 1}}"),
    ],
)
def test_paths_that_lead_nowhere_are_named_with_their_line(study, path, says):
    run = copy.deepcopy(RUN) | {"system": "hello"}
    run["stages"][1]["data"] = ["world", "world"]
    with pytest.raises(ConfigError, match=says) as error:
        make_cells(study({path: [1]}, run))
    assert "study.yaml:" in str(error.value)


def test_two_paths_to_one_field_are_refused(study):
    with pytest.raises(ConfigError, match=r"the same field as 'stages\.align\.lr'"):
        make_cells(study({"stages.align.lr": [1, 2], "stages.0.lr": [1, 2]}))


def test_a_level_called_base_must_be_the_bases(study):
    assert labels(study({"vision.adapter": {"base": "mlp", "new": "linear"}}, design="one_factor")) == ["base", "new"]
    with pytest.raises(ConfigError, match=r"study\.yaml:\d+: .*is called `base`, and this level is another"):
        make_cells(study({"vision.adapter": {"base": "linear"}}))


def test_labels_may_hold_anything(study):
    odd = {"ViT-L/14 @ 336": "mlp", "../up": {"name": "mlp", "depth": 3}, "日本": "linear", "a|b, c=d": "resampler"}
    loaded = study({"vision.adapter": odd}, seeds=[0])
    trials = make_trials(loaded, make_cells(loaded))
    assert [trial.cell.levels["vision.adapter"] for trial in trials] == list(odd)
    slugs = ["vit-l-14-336", "up", "cell", "a-b-c-d"]
    assert [trial.name.rsplit("-", 2)[0] for trial in trials] == slugs


def test_labels_that_yaml_reads_as_numbers_or_switches(study):
    factors = {"vision.adapter.depth": {1: 1, 2: 2}, "vision.adapter.bias": [True, False]}
    when = {"vision.adapter.bias": {"vision.adapter.depth": [2]}}
    made = labels(study(factors, when=when, constraints={"exclude": [{"vision.adapter.bias": False}]}))
    assert made == ["depth=1, bias=True", "depth=2, bias=True"]


# search


def test_ranges_are_for_a_search_alone(study):
    factors = {"stages.align.lr": {"low": 1e-4, "high": 1e-2}}
    with pytest.raises(ConfigError, match="'stages.align.lr' is a range, which only `design: search` draws from"):
        study(factors)


SEARCH = {"design": "search", "search": {"trials": 4}}
RANGES = {
    "vision.adapter": ["mlp", "linear"],
    "vision.adapter.depth": {"low": 1, "high": 6},
    "stages.align.lr": {"low": 1e-4, "high": 1e-2, "log": True},
}


def test_a_search_is_planned_with_ranges_at_their_middle(study):
    cells = make_cells(study(RANGES, when=ONLY_MLP, **SEARCH)).cells
    assert [list(cell.levels.values()) for cell in cells] == [["mlp", "4", "0.001"], ["linear", "base", "0.001"]]
    assert [cell.run.vision.adapter.options for cell in cells] == [{"depth": 4}, {}]
    assert cells[0].run.stages[0].lr == pytest.approx(1e-3)


def test_cells_from_levels_and_back(study):
    loaded = study(RANGES, when=ONLY_MLP, **SEARCH)
    cell = make_cell(loaded, {"vision.adapter": "mlp", "vision.adapter.depth": 5, "stages.align.lr": 0.0012345678901})
    assert isinstance(cell, Cell)
    assert (cell.run.vision.adapter.options, cell.run.stages[0].lr) == ({"depth": 5}, 0.0012345678901)
    assert cell.label == "mlp, depth=5, lr=0.001235"
    again = make_cell(loaded, cell.levels)
    assert isinstance(again, Cell)
    assert (again.levels, again.run) == (cell.levels, cell.run)
    # what does not vary with a linear adapter is left aside, as samplers of a fixed space propose it too
    linear = make_cell(loaded, {"vision.adapter": "linear", "vision.adapter.depth": 5})
    assert isinstance(linear, Cell)
    assert linear.levels == {"vision.adapter": "linear", "vision.adapter.depth": "base", "stages.align.lr": "base"}
    assert make_cell(loaded, linear.levels).levels == linear.levels


@pytest.mark.parametrize(
    ("levels", "says"),
    [
        ({"vision.adaptor": "mlp"}, "no factor 'vision.adaptor'; factors: "),
        ({"vision.adapter": "mpl"}, "no level 'mpl'; levels: \\['mlp', 'linear'\\]"),
        ({"vision.adapter.depth": 7}, "wanted a whole number from 1 to 6, given 7"),
        ({"vision.adapter.depth": 1.5}, "wanted a whole number from 1 to 6, given 1.5"),
        ({"stages.align.lr": "fast"}, "wanted a number from 0.0001 to 0.01, given 'fast'"),
    ],
)
def test_levels_that_a_study_has_not_are_refused(study, levels, says):
    with pytest.raises(ConfigError, match=says):
        make_cell(study(RANGES, **SEARCH), levels)


def test_a_cell_that_cannot_work_is_told_and_not_raised(study):
    factors = {"vision.encoders": {"one": ONE, "two": TWO}, "vision.image.max_tiles": [4, 6]}
    loaded = study(
        factors, constraints={"exclude": [{"vision.image.max_tiles": 6, "vision.encoders": "two"}]}, **SEARCH
    )
    for levels, by in (
        ({"vision.encoders": "two"}, "plan"),
        ({"vision.image.max_tiles": 6}, "plan"),
        ({"vision.encoders": "two", "vision.image.max_tiles": "6"}, "constraint"),
    ):
        left = make_cell(loaded, levels)
        assert isinstance(left, Skipped)
        assert left.by == by
    refuse_invalid(make_cells(loaded), loaded)  # a search proposes something else


def test_a_large_search_is_planned_by_a_spread_sample(study):
    factors = {
        f"stages.{stage}.{name}": [i / 10 for i in range(1, 6)]
        for stage in ("align", "tune")
        for name in ("lr", "epochs")
    }
    factors["vision.adapter"] = ["mlp", "linear"]
    cells = make_cells(study(factors, **SEARCH)).cells
    assert 200 < len(cells) <= 256 < 5**4 * 2
    for path, levels in factors.items():
        counts = [sum(cell.levels[path] == str(level) for cell in cells) for level in levels]
        assert max(counts) < 1.3 * min(counts)


# fidelities


def test_a_fidelity_replaces_fields_of_every_cell(study):
    fidelities = {"short": {"stages.align.data.size": 2, "llm.shape.width": 16}, "whole": {}}
    loaded = study({"vision.adapter": ["mlp", "linear"]}, fidelities=fidelities)
    short, whole = make_cells(loaded), make_cells(loaded, fidelity="whole")
    assert {cell.fidelity for cell in short.cells} == {"short"}
    assert [cell.run.stages[0].data[0].options["size"] for cell in (*short.cells, *whole.cells)] == [2, 2, 4, 4]
    assert [cell.run.llm.options["shape"]["width"] for cell in (*short.cells, *whole.cells)] == [16, 16, 32, 32]
    assert [cell.levels for cell in short.cells] == [cell.levels for cell in whole.cells]
    plain = study({"vision.adapter": ["mlp", "linear"]})
    # the whole is the run as it is: its results are found again by what was run
    assert [Trial(c, 0).name for c in whole.cells] == [Trial(c, 0).name for c in make_cells(plain).cells]
    assert not {Trial(c, 0).name for c in whole.cells} & {Trial(c, 0).name for c in short.cells}


def test_a_fidelity_goes_around_and_into_factors(study):
    fidelities = {"small": {"llm": RUN["llm"], "vision.encoders.0.grid": [2, 2]}, "whole": {}}
    factors = {"llm.shape.width": [16, 64], "vision.encoders": {"a": ONE, "b": [{"name": "blind", "width": 8}]}}
    cells = make_cells(study(factors, fidelities=fidelities, design="one_factor")).cells
    assert [cell.levels["vision.encoders"] for cell in cells] == ["a", "a", "a", "b"]
    assert {cell.plan.visual_tokens for cell in cells} == {4}
    assert [cell.run.llm.options["shape"]["width"] for cell in cells] == [32, 16, 64, 32]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"stages.align.data.sizes": 2},
            r"study\.yaml:\d+: stages\.0\.data.*sizes: unknown field. Did you mean 'size'",
        ),
        ({"stages.first.lr": 2}, r"study\.yaml:\d+: fidelities\.short\.stages\.first\.lr: stages has no entry 'first'"),
        ({"visoin.image.views": "whole"}, r"study\.yaml:\d+: visoin: unknown field. Did you mean 'vision'"),
        ({"stages.align.lr": -1}, r"study\.yaml:\d+: stages\.0\.lr: wanted .*given -1"),
        (
            {"vision.adapter": "mlp"},
            r"fidelities\.short\.vision\.adapter: this is a factor; at this fidelity its levels",
        ),
    ],
)
def test_fields_of_a_fidelity_are_checked_as_levels_are(study, fields, says):
    loaded = study({"vision.adapter": ["mlp", "linear"]}, fidelities={"short": fields, "whole": {}})
    with pytest.raises(ConfigError, match=says) as error:
        make_cells(loaded)
    line = int(str(error.value).split("study.yaml:")[1].split(":")[0])
    text = loaded.document.path.read_text().splitlines()[line - 1]
    assert next(iter(fields)) in text


def test_an_unknown_fidelity_is_refused(study):
    loaded = study({"vision.adapter": ["mlp"]}, fidelities={"short": {"stages.align.epochs": 0.5}, "whole": {}})
    with pytest.raises(ConfigError, match=r"no fidelity 'long' in study 's'; fidelities: \['short', 'whole'\]"):
        make_cells(loaded, fidelity="long")


@pytest.mark.parametrize(
    ("fields", "skips"),
    [
        ({"stages.align.data.size": 2}, False),
        ({"stages.align.train": ["adapter", "llm"]}, True),
        ({"stages": [RUN["stages"][1]]}, True),
    ],
)
def test_a_stage_1_that_a_fidelity_skips_is_never_silent(study, fields, skips):
    loaded = study({"vision.adapter": ["mlp", "linear"]}, fidelities={"short": fields, "whole": {}})
    told = [note for note in make_cells(loaded).notes if "stage 1 is skipped in 2 of 2 cells" in note]
    assert len(told) == skips
    assert not make_cells(loaded, fidelity="whole").notes


# trials


def test_seeds_are_blocks_in_which_what_is_shared_stands_together(study):
    factors = {
        "stages.tune.lr": [1e-3, 1e-2],
        "vision.encoders": {"a": ONE, "b": [{"name": "blind", "width": 8}]},
        "vision.adapter": ["mlp", "linear"],
    }
    loaded = study(factors, seeds=[5, 3])
    made = make_cells(loaded)
    trials = make_trials(loaded, made)
    assert [trial.seed for trial in trials] == [5] * 8 + [3] * 8
    assert sorted(t.cell.label for t in trials[:8]) == sorted(cell.label for cell in made.cells)
    assert [t.cell.levels for t in trials[:8]] == [t.cell.levels for t in trials[8:]]
    order = [tuple(trial.cell.levels[path] for path in factors) for trial in trials[:8]]
    # frozen parts first, then a stage 1 in common, whose adapter it is; its trials differ in stage 2 alone
    assert order == [
        (lr, encoder, adapter) for encoder in "ab" for adapter in ("mlp", "linear") for lr in ("0.001", "0.01")
    ]


def test_equal_models_are_planned_once_and_planned_the_same(study, monkeypatch):
    from chiasm_experiments.study import maker

    planned = []

    def count(run, sample):
        planned.append(run)
        return plan_run(run, sample)

    monkeypatch.setattr(maker, "plan_run", count)
    factors = {
        "vision.adapter": ["mlp", "linear"],
        "stages.align.lr": [1e-4, 1e-3, 1e-2],
        "stages.tune.epochs": [1, 2],
        "stages.tune.data.0.size": [4, 8],
    }
    cells = make_cells(study(factors), SampleSize()).cells
    assert (len(cells), len(planned)) == (24, 2)
    for cell in cells:
        assert cell.plan.summary() == plan_run(cell.run, SampleSize()).summary()
