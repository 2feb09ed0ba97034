"""What a report says of a whole study: fidelities, search, costs, interactions, and what has no result."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from chiasm_experiments.report import Report, write_report
from chiasm_experiments.report.additive import additive_fit
from chiasm_experiments.report.compose import PICTURES
from chiasm_experiments.report.costs import cost_of, fronts, joint_front
from chiasm_experiments.report.importance import MIN_TRIALS, importances
from chiasm_experiments.report.interactions import interactions
from chiasm_experiments.report.ranks import kendall, spearman
from chiasm_experiments.report.reading import load_study
from chiasm_experiments.report.study import Study
from chiasm_experiments.report.table import BenchmarkScores, load_scores

A, B, LR = "vision.adapter", "vision.fusion", "stages.finetune.lr"
IMAGES = 24


def entry(levels: Mapping[str, str], accuracy: float, seed: int = 0, **about: Any) -> dict[str, Any]:
    """One trial to be written: `status`, `fidelity`, `curve`, `rung`, and what else its manifest is to say."""
    return {"levels": dict(levels), "accuracy": accuracy, "seed": seed, "fidelity": "full", **about}


def write_study(folder: Path, factors: Mapping[str, Any], trials: Sequence[dict[str, Any]], **plan: Any) -> Path:
    """A folder as `chiasm sweep` leaves it, its questions scored near the accuracies that are given.

    A score is the accuracy, plus what the question is, plus a little noise of its own; never cut off at 0 or 1.
    """
    about = {f"t{i:03d}": {key: item[key] for key in ("levels", "seed", "fidelity")} for i, item in enumerate(trials)}
    description = {
        "name": "study", "question": "", "design": "grid", "factors": dict(factors), "seeds": [0], "added_seeds": [],
        "control": None, "objective": {"maximize": "accuracy", "minimize": []}, "fidelities": ["full"],
        "planned": None, "skipped": [], "notes": [], "trials": about, "warm_start": {}, "config": {},
    }  # fmt: skip
    (folder / "trials").mkdir(parents=True)
    (folder / "study.json").write_text(json.dumps(description | plan))
    for number, (name, item) in enumerate(zip(about, trials, strict=True)):
        status = item.get("status", "complete")
        if status == "waiting":
            continue
        trial = folder / "trials" / name
        trial.mkdir()
        levels, rest = item["levels"], {k: v for k, v in item.items() if k not in ("levels", "accuracy")}
        manifest = {"trial": name, "cell": levels, "status": status, "error": None, "curve": [], "rung": None,
                    "visual_tokens": 64, "parameters": {"trained": 1000, "frozen": 0}, "workers": 1,
                    "seconds": {"train": 10.0, "evaluate": 2.4}, "environment": {"gpu": "H100"}}  # fmt: skip
        (trial / "manifest.json").write_text(json.dumps(manifest | rest))
        if status == "complete":
            easy = 0.1 * np.random.default_rng(0).uniform(-1, 1, IMAGES)
            noise = 0.05 * np.random.default_rng([1, number]).uniform(-1, 1, IMAGES)
            pd.DataFrame(
                {
                    "benchmark": "world",
                    "split": "test",
                    "question_id": [f"q{i:02d}" for i in range(IMAGES)],
                    "cluster": [f"image{i}" for i in range(IMAGES)],
                    "skill": "colour",
                    "question": "?",
                    "reference": "red",
                    "response": "red",
                    "parsed": "red",
                    "score": item["accuracy"] + easy + noise,
                    "status": "scored",
                    "chance": 0.1,
                }
            ).to_parquet(trial / "questions.parquet")
    return folder


def means(report: Report, *keys: str) -> pd.Series[float]:
    return pd.read_parquet(report.results).groupby(list(keys))["score"].mean()


def loaded(folder: Path) -> tuple[Study, BenchmarkScores]:
    study = load_study(folder)
    return study, load_scores(study)[0]


def table(report: Report, caption: str) -> Any:
    return next(item for item in report.tables if item.caption == caption)


def section(report: Report, title: str) -> Any:
    return next(item for item in report.document.sections if item.title == title)


def titles(report: Report) -> list[str]:
    return [item.title for item in report.document.sections]


# --- fidelities --------------------------------------------------------------------------------------------------

SIX = [f"a{i}" for i in range(6)]


@pytest.fixture(scope="module")
def promoted(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Six cells at `small` with two seeds, five of them again at `whole` with one, in another order."""
    small = [entry({A: a}, 0.3 + 0.05 * i, s, fidelity="small") for s in (0, 1) for i, a in enumerate(SIX)]
    order = {"a5": 0.60, "a4": 0.65, "a3": 0.55, "a2": 0.50, "a1": 0.45}
    whole = [entry({A: a}, accuracy, fidelity="whole") for a, accuracy in order.items()]
    note = "fidelity small: stage 1 is skipped in 6 of 6 cells: no stage trains the connectors alone, and rankings"
    return write_report(
        write_study(
            tmp_path_factory.mktemp("promoted") / "study", {A: SIX}, [*small, *whole],
            fidelities=["small", "whole"], notes=[note], seeds=[0, 1],
        )
    )  # fmt: skip


def test_fidelities_are_told_apart_and_never_mixed(promoted: Report) -> None:
    found = means(promoted, "fidelity", A)
    assert (promoted.study.fidelity, [view.study.fidelity for view in promoted.cheaper]) == ("whole", ["small"])
    for name, (analysis,) in (("whole", promoted.analyses), ("small", promoted.cheaper[0].analyses)):
        assert len(analysis.cells) == (5 if name == "whole" else 6)
        for cell in analysis.cells:
            assert cell.accuracy.estimate == pytest.approx(found[name, cell.cell[A]], abs=1e-12)
        for item in analysis.effects[0].comparisons:
            difference = found[name, item.a] - found[name, item.b]
            assert item.difference.estimate == pytest.approx(difference, abs=1e-12)
    places = [titles(promoted).index(f"Every cell at fidelity {name}") for name in ("whole", "small")]
    assert places == sorted(places)
    assert promoted.document.summary[0].lead == "fidelity"
    assert "found at fidelity whole. small has tables below" in promoted.document.summary[0].text


def test_a_fidelity_without_stage_1_is_flagged(promoted: Report) -> None:
    assert any(text.startswith("Fidelity small: stage 1 is skipped in 6 of") for text in promoted.document.warnings)
    rows = [row.cells for row in table(promoted, "Trials at each fidelity, from the cheapest").rows]
    assert rows == [
        ("small", "6", "2", "12", "0", "0", "0", "skipped"),
        ("whole", "5", "1", "5", "0", "0", "0", "trained"),
    ]


def test_rank_agreement_is_scipys_over_the_means_of_common_cells(promoted: Report) -> None:
    found = means(promoted, "fidelity", A)
    common = sorted(found["whole"].index)
    x, y = ([found[name, a] for a in common] for name in ("small", "whole"))
    row = table(promoted, "Rank agreement of fidelities").rows[0].cells
    assert row[:4] == ("world", "small and whole", "5", "1 to 2")
    assert row[4].startswith(f"{stats.spearmanr(x, y).statistic:.2f} [")
    assert row[5].startswith(f"{stats.kendalltau(x, y).statistic:.2f} [")
    assert row[6] == "another"


def test_few_common_cells_say_nothing_of_ranks(tmp_path: Path) -> None:
    trials = [entry({A: a}, 0.3 + 0.1 * i, fidelity=f) for f in ("small", "whole") for i, a in enumerate(SIX[:4])]
    report = write_report(write_study(tmp_path / "s", {A: SIX[:4]}, trials, fidelities=["small", "whole"]))
    assert table(report, "Rank agreement of fidelities").rows[0].cells[4] == "too few cells to say"


def test_the_interval_of_equal_orders_ends_where_they_are_rare() -> None:
    """At its lower end five cells are all in the same order in 2.5% of draws, counted here with other draws."""
    found = kendall(np.arange(5.0), np.arange(5.0))
    assert (found.estimate, found.high) == pytest.approx((1.0, 1.0))
    r = np.sin(np.pi / 2 * found.low)
    x, noise = np.random.default_rng(99).normal(size=(2, 60_000, 5))
    y = r * x + np.sqrt(1 - r * r) * noise
    assert (x.argsort(1) == y.argsort(1)).all(axis=1).mean() == pytest.approx(0.025, abs=0.006)
    assert spearman(np.arange(5.0), -np.arange(5.0)).low == -1.0


@pytest.mark.parametrize("n", [5, 6])
def test_intervals_of_rank_correlations_cover(n: int) -> None:
    rng = np.random.default_rng(n)
    order = np.arange(float(n))
    known: dict[float, tuple[float, float]] = {}
    for r in (0.0, 0.6, 0.9, 0.99):
        x, noise = rng.normal(size=(2, 1500, n))
        y = r * x + np.sqrt(1 - r * r) * noise
        truth, hits = 6 / np.pi * np.arcsin(r / 2), 0
        for one, other in zip(x, y, strict=True):
            ranks = stats.rankdata(other)[one.argsort()] - 1
            value = round(1 - 6 * float(((order - ranks) ** 2).sum()) / (n * (n * n - 1)), 9)
            if value not in known:  # the interval depends on the coefficient alone
                found = spearman(order, ranks)
                known[value] = (found.low, found.high)
            hits += known[value][0] <= truth <= known[value][1]
        assert hits / 1500 >= 0.94


# --- search ------------------------------------------------------------------------------------------------------


def search_trials(count: int = 36, added: bool = True) -> list[dict[str, Any]]:
    """A search over an adapter, a fusion without effect and a learning rate that is best at 1e-2."""
    rng = np.random.default_rng(5)
    trials = []
    for _ in range(count):
        lr, a, b = 10 ** rng.uniform(-4, -1), str(rng.choice(["mlp", "linear"])), str(rng.choice(["sum", "concat"]))
        accuracy = 0.5 + 0.2 * (a == "mlp") - 0.04 * (np.log10(lr) + 2) ** 2
        trials.append(entry({A: a, B: b, LR: repr(lr)}, float(accuracy)))
    if added:
        best = max(trials, key=lambda item: item["accuracy"])
        trials += [entry(best["levels"], best["accuracy"] - 0.004, seed) for seed in (1, 2)]
    point = {"rung": 0, "share": 0.25, "step": 5, "seconds": 1.0, "scores": [0.0], "accuracy": 0.21}
    levels = {A: "mlp", B: "sum", LR: "0.09"}
    trials[3] |= {"curve": [point | {"accuracy": 0.4}, {**point, "rung": 1, "share": 0.5, "accuracy": 0.5}]}
    trials.append(entry(levels, 0.0, status="pruned", rung=0, curve=[point]))
    trials.append(entry({**levels, LR: "0.08"}, 0.0, status="failed", error="RuntimeError: out of memory"))
    trials.append(entry({**levels, LR: "0.07"}, 0.0, status="waiting"))
    return trials


FACTORS = {A: ["mlp", "linear"], B: ["sum", "concat"], LR: {"low": 1e-4, "high": 1e-1, "log": True}}
LEFT_OUT = [
    {"levels": {A: "mlp", B: "sum", LR: str(lr)}, "fidelity": "full", "reasons": ["no such grid"], "by": "plan"}
    for lr in (1, 2)
] + [{"levels": {A: "linear", B: "sum"}, "fidelity": "full", "reasons": ["at_most"], "by": "constraint"}]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return write_report(
        write_study(
            tmp_path_factory.mktemp("searched") / "study", FACTORS, search_trials(), design="search", planned=39,
            seeds=[0, 1, 2], added_seeds=[1, 2], skipped=LEFT_OUT, warm_start={"earlier": 8},
        )
    )  # fmt: skip


def test_a_search_says_what_it_tried(searched: Report) -> None:
    (text,) = section(searched, "What was tried").paragraphs
    assert "41 trials of 38 cells were tried: 38 complete, 1 pruned, 1 failed, 1 not finished." in text
    assert "Of 36 cells with a result 1 has it from more than one seed" in text
    assert "3 combinations were skipped" in text
    assert "began with results of earlier (8 trials)" in text


def test_the_best_cells_are_told_with_seeds_and_judged_by_the_further_ones(searched: Report) -> None:
    found = means(searched, "cell", "seed").unstack()
    best = searched.analyses[0].cells
    rows = table(searched, "world: the best cells").rows
    assert len(rows) == 10
    repeated = found.dropna().index[0]
    place = next(i for i, cell in enumerate(best) if cell.label == repeated)
    assert rows[place].cells[-2] == "3"
    further = 100 * found.loc[repeated, [1, 2]].mean()
    assert rows[place].cells[-1].startswith(f"{further:.1f} [")
    assert rows[place].cells[-3].startswith(f"{100 * found.loc[repeated].mean():.1f} [")
    assert {row.cells[-1] for i, row in enumerate(rows) if i != place} == {"\N{EM DASH}"}


def test_a_winner_with_few_seeds_is_said_to_be_optimistic(tmp_path: Path) -> None:
    trials = search_trials(8, added=False)
    report = write_report(write_study(tmp_path / "one", FACTORS, trials, design="search"))
    (warning,) = [text for text in report.document.warnings if "winner's curse" in text]
    assert warning.startswith("The best of 10 cells is known from 1 seed (adapter=mlp")
    assert "chiasm sweep STUDY --add-seeds 2" in warning
    best = max(trials, key=lambda item: item["accuracy"])
    more = [*trials, *(entry(best["levels"], best["accuracy"], seed) for seed in (1, 2))]
    sure = write_report(write_study(tmp_path / "three", FACTORS, more, design="search"))
    assert not [text for text in sure.document.warnings if "winner's curse" in text]


def test_a_grid_of_which_nothing_was_chosen_is_not_warned_of(tmp_path: Path) -> None:
    report = write_report(write_study(tmp_path / "s", {A: ["x", "y"]}, [entry({A: a}, 0.5) for a in "xy"]))
    assert not [text for text in report.document.warnings if "winner's curse" in text]
    assert not {"What was tried", "Pruned", "Skipped", "Fidelities", "Learning curves"} & set(titles(report))


def test_pruned_failed_and_skipped_are_not_one(searched: Report) -> None:
    (pruned,) = table(searched, "Pruned trials").rows
    assert pruned.cells == ("adapter=mlp, fusion=sum, lr=0.09", "0", "0", "25.0 %", "21.0", "40.0")
    (failed,) = table(searched, "Trials without a result").rows
    assert failed.cells[-2:] == ("failed", "RuntimeError: out of memory")
    skipped = [row.cells for row in table(searched, "Combinations that were skipped").rows]
    assert skipped == [
        ("adapter=mlp, fusion=sum, lr=1; and 1 more", "cannot work", "no such grid"),
        ("adapter=linear, fusion=sum", "left out by a constraint", "at_most"),
    ]


def test_ranges_are_numbers_and_no_levels(searched: Report) -> None:
    assert LR not in {effect.factor for effect in searched.analyses[0].effects}
    wide = pd.read_parquet(searched.results).groupby("cell").agg(score=("score", "mean"), lr=(LR, "first"))
    wide = wide.assign(lr=wide["lr"].astype(float)).sort_values("lr")
    rows = table(searched, "world: accuracy over ranges of numbers").rows
    assert (
        rows[0]
        .cells[-1]
        .startswith(f"{stats.spearmanr(wide['lr'], wide['score']).statistic:.2f}".replace("-", "\N{MINUS SIGN}"))
    )
    for row, part in zip(rows, (wide[:12], wide[12:24], wide[24:]), strict=True):
        low, high = stats.ttest_1samp(part["score"], 0).confidence_interval(0.95)
        assert row.cells[1] == f"{part['lr'].min():.3g} to {part['lr'].max():.3g}"
        assert row.cells[2:4] == ("12", f"{100 * part['score'].mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]")


def test_importance_is_by_two_evaluators_and_needs_enough_trials(searched: Report) -> None:
    found = {item.factor: item for item in importances(searched.study, searched.analyses)}
    assert next(iter(found)) == A
    assert found[A].fanova[0] > 0.5
    assert found[B].fanova[0] < 0.05
    assert sum(item.fanova[0] for item in found.values()) == pytest.approx(1)
    assert sum(item.ped_anova[0] for item in found.values()) == pytest.approx(1)
    assert all(item.fanova[1] <= item.fanova[2] for item in found.values())
    columns = [column.title for column in table(searched, "Importance of the factors").columns]
    assert columns == ["factor", "fANOVA", "PED-ANOVA"]
    few = replace(searched.study, every=searched.study.every[: MIN_TRIALS - 1])
    assert importances(few, searched.analyses) == ()


def test_figures_are_in_the_page_and_those_of_an_earlier_report_go(searched: Report) -> None:
    folder = searched.html.parent
    assert sorted(path.name for path in folder.glob("*.png")) == sorted(set(PICTURES) - {"report-cost.png"})
    assert searched.html.read_text().count("data:image/png;base64,") == 3
    assert "](report-curves.png)" in searched.markdown.read_text()
    (folder / "report-cost.png").write_bytes(b"")
    before = searched.html.read_bytes()
    again = write_report(folder)
    assert not (folder / "report-cost.png").exists()
    assert again.html.read_bytes() == before


# --- costs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def costly(tmp_path_factory: pytest.TempPathFactory) -> Report:
    rng = np.random.default_rng(8)
    trials = []
    for a, seed in itertools.product(SIX, (0, 1)):
        i = SIX.index(a)
        cost = {"visual_tokens": [16, 32, 32, 64, 64, 128][i], "answer_flops": [9e9, 8e9, 7e9, 6e9, 5e9, 4e9][i],
                "seconds": {"train": 10.0 * (i + 1) + seed, "evaluate": 2.4 * (i + 1)}, "workers": 2}  # fmt: skip
        trials.append(entry({A: a}, float([0.3, 0.5, 0.45, 0.52, 0.4, 0.6][i] + 0.005 * rng.normal()), seed, **cost))
    minimize = ["visual_tokens", "flops"]
    objective = {"maximize": "accuracy", "minimize": minimize}
    return write_report(
        write_study(tmp_path_factory.mktemp("costly") / "study", {A: SIX}, trials, objective=objective, seeds=[0, 1])
    )


def test_costs_are_as_the_manifests_say(costly: Report) -> None:
    trial = next(trial for trial in costly.study.complete if trial.cell[A] == "a2" and trial.seed == 1)
    assert cost_of(trial, "train_seconds") == 62.0  # two GPUs
    assert cost_of(trial, "latency") == pytest.approx(7.2 / IMAGES)
    assert cost_of(trial, "flops") == 7e9
    found = fronts(costly.study, costly.analyses[0])
    assert [front.name for front in found] == ["visual_tokens", "flops", "train_seconds", "latency"]
    assert [front.asked for front in found] == [True, True, False, False]
    assert found[2].title == "GPU seconds of training"


def test_a_front_is_what_nothing_beats_and_its_steps_are_differences(costly: Report) -> None:
    accuracy = means(costly, A)
    tokens, _, _, latency = fronts(costly.study, costly.analyses[0])
    for front, cost in ((tokens, [16, 32, 32, 64, 64, 128]), (latency, [1, 2, 3, 4, 5, 6])):
        points = {a: (cost[i], accuracy[a]) for i, a in enumerate(SIX)}
        on = [
            a for a, (c, s) in points.items()
            if not any(d <= c and t >= s and (d, t) != (c, s) for d, t in points.values())
        ]  # fmt: skip
        assert [step.cell.cell[A] for step in front.steps] == sorted(on, key=lambda a: points[a])
        for before, step in itertools.pairwise(front.steps):
            assert step.gain is not None
            difference = accuracy[step.cell.cell[A]] - accuracy[before.cell.cell[A]]
            assert step.gain.estimate == pytest.approx(difference, abs=1e-12)
            assert (step.gain.seeds, step.gain.questions) == (2, IMAGES)
    rows = table(costly, "world: Pareto front of accuracy and visual tokens").rows
    assert [row.cells[:2] for row in rows] == [("a0", "16"), ("a1", "32"), ("a3", "64"), ("a5", "128")]


def test_cells_that_noise_alone_keeps_off_the_front_are_named(tmp_path: Path) -> None:
    trials = [
        entry({A: a}, accuracy, seed, visual_tokens=n)
        for a, accuracy, n in (("x", 0.3, 10), ("near", 0.499, 21), ("y", 0.5, 20), ("far", 0.2, 22))
        for seed in (0, 1, 2)
    ]
    report = write_report(write_study(tmp_path / "s", {A: ["x", "near", "y", "far"]}, trials))
    (tokens,) = [front for front in fronts(report.study, report.analyses[0]) if front.name == "visual_tokens"]
    assert [step.cell.cell[A] for step in tokens.steps] == ["x", "y"]
    assert [cell.cell[A] for cell in tokens.open] == ["near"]


def test_the_joint_front_is_over_all_objectives(costly: Report) -> None:
    accuracy, tokens = means(costly, A), [16, 32, 32, 64, 64, 128]
    points = {a: (tokens[i], 9 - i, -accuracy[a]) for i, a in enumerate(SIX)}
    on = {
        a for a, mine in points.items()
        if not any(all(p <= q for p, q in zip(other, mine, strict=True)) and other != mine for other in points.values())
    }  # fmt: skip
    assert {cell.cell[A] for cell in joint_front(costly.study, costly.analyses[0])} == on
    assert len(table(costly, "world: Pareto front of all objectives").rows) == len(on)


# --- designs -----------------------------------------------------------------------------------------------------


def test_an_interaction_is_a_t_test_of_differences_of_differences(tmp_path: Path) -> None:
    accuracy = {("p", "x"): 0.5, ("q", "x"): 0.6, ("p", "y"): 0.5, ("q", "y"): 0.45}
    trials = [entry({A: a, B: b}, value) for (a, b), value in accuracy.items()]
    report = write_report(write_study(tmp_path / "s", {A: ["p", "q"], B: ["x", "y"]}, trials))
    (item,) = report.analyses[0].interactions
    wide = pd.read_parquet(report.results).pivot_table(index="question_id", columns=[A, B], values="score")
    d = (wide["q", "y"] - wide["p", "y"]) - (wide["q", "x"] - wide["p", "x"])
    theirs = stats.ttest_1samp(d, 0)
    assert (item.a, item.b) == (("q", "p"), ("y", "x"))
    assert item.difference.estimate == pytest.approx(d.mean(), abs=1e-12)
    assert (item.difference.low, item.difference.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    assert item.difference.p_value == pytest.approx(theirs.pvalue, rel=1e-5)
    row = table(report, "Interactions of two factors").rows[0].cells
    assert row[:2] == ("adapter: q \N{MINUS SIGN} p", "fusion: y rather than x")
    assert row[5].startswith("smaller")


def test_one_factor_is_about_the_base_and_has_no_interaction(tmp_path: Path) -> None:
    cells = [("base", "base"), ("mlp", "base"), ("deep", "base"), ("base", "sum")]
    trials = [entry({A: a, B: b}, 0.4 + 0.1 * i, s) for s in (0, 1) for i, (a, b) in enumerate(cells)]
    factors = {A: ["mlp", "deep", "base"], B: ["sum", "base"]}
    report = write_report(write_study(tmp_path / "s", factors, trials, design="one_factor", seeds=[0, 1]))
    found = means(report, A, B)
    first = report.analyses[0].effects[0]
    assert [(item.a, item.b) for item in first.comparisons] == [("mlp", "base"), ("deep", "base"), ("deep", "mlp")]
    for item in first.comparisons:
        assert item.difference.estimate == pytest.approx(found[item.a, "base"] - found[item.b, "base"], abs=1e-12)
        assert item.difference.cells == 1
    (note,) = section(report, "Effects of the factors").paragraphs
    assert "any interaction, cannot be estimated" in note
    assert report.analyses[0].interactions == ()


PAIRS = [("p", "x", "k"), ("p", "y", "m"), ("q", "x", "m"), ("q", "y", "k"), ("p", "x", "m"), ("q", "y", "m")]
THREE = {A: ["p", "q"], B: ["x", "y"], "llm": ["k", "m"]}


def test_main_effects_are_those_of_least_squares(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    accuracy = dict(zip(PAIRS, rng.uniform(0.4, 0.6, 6), strict=True))
    trials = [entry(dict(zip(THREE, c, strict=True)), float(accuracy[c]), s) for s in (0, 1, 2) for c in PAIRS]
    report = write_report(write_study(tmp_path / "s", THREE, trials, design="pairwise", seeds=[0, 1, 2]))
    fit = report.analyses[0].additive
    assert fit is not None
    found = means(report, *THREE)
    x = np.array([[1, a == "q", b == "y", c == "m"] for a, b, c in PAIRS], dtype=float)
    y = np.array([found[cell] for cell in PAIRS])
    beta, rss, rank, _ = np.linalg.lstsq(x, y, rcond=None)
    assert [item.difference.estimate for item in fit.effects] == pytest.approx(beta[1:], abs=1e-12)
    assert (fit.freedom, fit.cells, fit.seeds) == (6 - rank, 6, 3)
    assert fit.residual_sd == pytest.approx(np.sqrt(rss[0] / 2))
    # the model's part of the interval alone is the textbook's; images and seeds can only add to it
    for k, item in enumerate(fit.effects, start=1):
        half = stats.t.ppf(0.975, 2) * np.sqrt(rss[0] / 2 * np.linalg.inv(x.T @ x)[k, k])
        assert item.difference.high - item.difference.estimate > half
    assert "Main effects by the additive model" in report.markdown.read_text()


def test_what_cells_cannot_tell_apart_is_said(tmp_path: Path) -> None:
    cells = [("p", "x", "k"), ("q", "y", "k"), ("p", "x", "m"), ("q", "y", "m")]
    trials = [entry(dict(zip(THREE, cell, strict=True)), 0.5) for cell in cells]
    fit = additive_fit(*loaded(write_study(tmp_path / "s", THREE, trials, design="pairwise")))
    assert fit is not None
    assert fit.confounded == (A, B)
    assert [item.factor for item in fit.effects] == ["llm"]


@pytest.mark.parametrize("interaction", [0.0, 0.1])
def test_main_effects_cover_what_a_random_cell_adds(tmp_path: Path, interaction: float) -> None:
    """Interactions drawn for each cell: the interval covers the main effect, which noise alone would not."""
    trials = [entry(dict(zip(THREE, c, strict=True)), 0.5, s) for s in (0, 1) for c in PAIRS]
    study, scores = loaded(write_study(tmp_path / "s", THREE, trials, design="pairwise", seeds=[0, 1]))
    rng = np.random.default_rng(7)
    hits = []
    for _ in range(300):
        own = {cell: interaction * rng.normal() for cell in PAIRS}
        lift = [0.5 + 0.03 * (t.cell[A] == "q") + own[tuple(t.cell.values())] for t in scores.trials]
        noise = 0.05 * rng.normal(size=scores.scores.shape)
        fit = additive_fit(study, replace(scores, scores=np.array(lift)[:, None] + noise))
        assert fit is not None
        difference = fit.effects[0].difference
        hits.append(difference.low <= 0.03 <= difference.high)
    assert np.mean(hits) >= 0.93


def test_interactions_need_four_cells(tmp_path: Path) -> None:
    trials = [entry({A: a, B: b}, 0.5) for a, b in (("p", "x"), ("q", "x"), ("p", "y"))]
    folder = write_study(tmp_path / "s", {A: ["p", "q"], B: ["x", "y"]}, trials)
    assert interactions(*loaded(folder)) == ()
    assert any(
        "cannot be estimated here" in text
        for item in write_report(folder).document.sections
        for text in item.paragraphs
    )
