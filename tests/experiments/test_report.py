"""The report of a study folder: its numbers, its words, and that it can be trusted as a file."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from chiasm.errors import DataError
from chiasm_experiments.report import Report, write_report
from chiasm_experiments.report import format as fmt
from chiasm_experiments.report.effects import FactorEffect
from chiasm_experiments.report.layout import MAX_LEVELS_ALL_PAIRS, effect_table
from chiasm_experiments.report.reading import load_study
from chiasm_experiments.report.render import to_markdown

ENCODERS, FUSION = "vision.encoders", "vision.fusion"
CHANCE = {"colour": 0.125, "count": 0.2, "existence": 0.5, "reading": 0.1}
GAIN = {"clip": 0.34, "dinov2": 0.36, "blind": 0.0, "single": 0.0, "sum": 0.10, "concat": 0.10}


def build(
    folder: Path,
    factors: Mapping[str, Sequence[str]],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    control: tuple[str, str] | None = (ENCODERS, "blind"),
    benchmarks: Sequence[str] = ("world",),
    images: int = 60,
    chance: Mapping[str, float] = CHANCE,
    gain: Callable[[Mapping[str, str]], float] | None = None,
    seed_sd: float = 0.02,
    name: str = "fusion",
    question: str = "Which fusion makes the best use of two encoders?",
    reject: Callable[[Mapping[str, str], int], bool] = lambda cell, seed: False,
) -> Path:
    """A study folder with one question of each skill for every image; everything follows from the arguments."""
    plan = {
        "name": name,
        "question": question,
        "factors": {path: list(labels) for path, labels in factors.items()},
        "seeds": list(seeds),
        "design": "grid",
        "control": None if control is None else {"path": control[0], "label": control[1]},
        "objective": "accuracy",
    }
    (folder / "trials").mkdir(parents=True)
    (folder / "study.json").write_text(json.dumps(plan))
    cells = [dict(zip(factors, labels, strict=True)) for labels in itertools.product(*factors.values())]
    for number, (cell, seed) in enumerate(itertools.product(cells, seeds)):
        if reject(cell, seed):
            continue
        lift = gain(cell) if gain is not None else sum(GAIN.get(label, 0.2) for label in cell.values())
        if control is not None and cell[control[0]] == control[1]:
            lift = 0.0
        else:
            lift += seed_sd * float(np.random.default_rng([seed, number]).normal())
        rows = [row for item in benchmarks for row in _rows(item, images, chance, lift, number)]
        trial = folder / "trials" / f"t{number:03d}"
        trial.mkdir()
        pd.DataFrame(rows).to_parquet(trial / "questions.parquet")
        (trial / "manifest.json").write_text(json.dumps(_manifest(trial.name, cell, seed)))
    return folder


def _rows(benchmark: str, images: int, chance: Mapping[str, float], lift: float, trial: int) -> list[dict[str, Any]]:
    # Easy and hard questions are so for every trial, which is what pairing lives from.
    hardness = np.random.default_rng([len(benchmark), images]).normal(0, 0.12, (images, 1))
    hardness = hardness + np.random.default_rng([images, 7]).normal(0, 0.15, (images, len(chance)))
    luck = np.random.default_rng([images, 11]).uniform(size=(images, len(chance)))
    own = np.random.default_rng([trial, 13]).uniform(size=(images, len(chance)))
    rows = []
    for image, (k, (skill, guess)) in itertools.product(range(images), enumerate(chance.items())):
        p = guess if lift == 0 else np.clip(guess + (1 - guess) * (lift + hardness[image, k]) * 1.4, 0.02, 0.98)
        draw = own[image, k] if lift == 0 or (image + k) % 3 == 0 else luck[image, k]
        unparsed = (image * 7 + k + trial) % 97 == 0
        right = bool(draw < p) and not unparsed
        rows.append(
            {
                "benchmark": benchmark,
                "split": "test",
                "question_id": f"{image:04d}-{skill}",
                "cluster": f"image-{image:04d}",
                "skill": skill,
                "question": f"What is the {skill}?",
                "reference": "yes",
                "response": "yes" if right else "no",
                "parsed": None if unparsed else "yes" if right else "no",
                "score": float(right),
                "status": "unparsed" if unparsed else "scored",
                "chance": guess,
            }
        )
    return rows


def _manifest(trial: str, cell: Mapping[str, str], seed: int, **changes: Any) -> dict[str, Any]:
    dense = "concat" in cell.values()
    return {
        "trial": trial,
        "cell": dict(cell),
        "seed": seed,
        "status": "complete",
        "error": None,
        "visual_tokens": 1152 if dense else 576,
        "parameters": {"trained": 21_000_000 + 4_200_000 * dense, "frozen": 7_400_000_000},
        "seconds": {"train": 400.0 + 30 * seed + 90 * dense, "evaluate": 61.0, "total": 480.0 + 30 * seed + 90 * dense},
        "scores": {"world": 0.5},
        "environment": {
            "git_revision": "44eb072",
            "command": ["chiasm", "sweep", "fusion.yaml"],
            "packages": {"torch": "2.9.0", "transformers": "5.1.0"},
        },
        **changes,
    }


def fail(folder: Path, trial: str, error: str) -> None:
    path = folder / "trials" / trial / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "status": "failed", "error": error}))
    (path.parent / "questions.parquet").unlink()


def edit(folder: Path, trial: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    path = folder / "trials" / trial / "questions.parquet"
    change(pd.read_parquet(path)).to_parquet(path)


FACTORS = {ENCODERS: ("blind", "clip", "dinov2"), FUSION: ("single", "sum", "concat")}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("built") / "study", FACTORS)


@pytest.fixture(scope="module")
def report(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    return write_report(Path(shutil.copytree(built, tmp_path_factory.mktemp("whole") / "study")))


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    """A copy of the whole study, to be spoilt."""
    return Path(shutil.copytree(built, tmp_path / "study"))


def effect(report: Report, factor: str, benchmark: int = 0) -> FactorEffect:
    return next(item for item in report.analyses[benchmark].effects if item.factor == factor)


def words(report: Report) -> str:
    return " ".join(f"{line.lead} {line.text}" for line in report.document.summary)


# --- numbers -----------------------------------------------------------------------------------------------------


def test_results_hold_every_question_of_every_trial(report: Report) -> None:
    table = pd.read_parquet(report.results)
    assert len(table) == report.rows == 27 * 60 * 4
    assert list(table.columns[-7:]) == ["study", "trial", "fidelity", "seed", "cell", ENCODERS, FUSION]
    one = table[table["trial"] == "t013"]
    assert set(one["cell"]) == {"encoders=clip, fusion=sum"}
    assert set(one["seed"]) == {1}
    assert set(one[ENCODERS]) == {"clip"}


def test_cells_are_the_means_of_the_long_table(report: Report) -> None:
    table = pd.read_parquet(report.results)
    means = table.groupby("cell")["score"].mean()
    cells = report.analyses[0].cells
    assert len(cells) == 9
    for cell in cells:
        assert cell.accuracy.estimate == pytest.approx(means[cell.label], abs=1e-12)
        assert cell.accuracy.low < cell.accuracy.estimate < cell.accuracy.high
        assert (cell.accuracy.seeds, cell.accuracy.questions, cell.accuracy.images) == (3, 240, 60)
    order = [cell.accuracy.estimate for cell in cells]
    assert order == sorted(order, reverse=True)
    chance = table["chance"].mean()
    assert cells[0].minus_chance.estimate == pytest.approx(means[cells[0].label] - chance, abs=1e-12)
    by_seed = table[table["cell"] == cells[0].label].groupby("seed")["score"].mean()
    assert cells[0].seed_sd == pytest.approx(by_seed.std(ddof=1), abs=1e-12)


def test_minus_control_is_against_the_same_cell_of_the_other_factors(report: Report) -> None:
    means = pd.read_parquet(report.results).groupby("cell")["score"].mean()
    for cell in report.analyses[0].cells:
        if cell.is_control:
            assert cell.minus_control is None
        else:
            blind = f"encoders=blind, fusion={cell.cell[FUSION]}"
            assert cell.minus_control is not None
            assert cell.minus_control.estimate == pytest.approx(means[cell.label] - means[blind], abs=1e-12)


def test_effects_average_matched_cells_and_leave_the_control_to_its_own_factor(report: Report) -> None:
    table = pd.read_parquet(report.results)
    seeing = table[table[ENCODERS] != "blind"].groupby(FUSION)["score"].mean()
    fusion = effect(report, FUSION)
    assert [(item.a, item.b) for item in fusion.comparisons] == [
        ("sum", "single"),
        ("concat", "single"),
        ("concat", "sum"),
    ]
    for item in fusion.comparisons:
        assert item.difference.estimate == pytest.approx(seeing[item.a] - seeing[item.b], abs=1e-12)
        assert (item.difference.cells, item.difference.seeds) == (2, 3)
    encoders = effect(report, ENCODERS)
    assert {item.b for item in encoders.comparisons if "blind" in (item.a, item.b)} == {"blind"}
    assert all(item.difference.cells == 3 for item in encoders.comparisons)
    assert encoders.best == "dinov2"


def test_holm_is_over_the_factor(report: Report) -> None:
    for item in report.analyses[0].effects:
        raw = np.array([c.difference.p_value for c in item.comparisons])
        # scipy has no Holm, so the definition: the largest over all smaller p of p times what is left.
        expected = [min(1.0, max(p * (raw >= p).sum() for p in raw[raw <= mine])) for mine in raw]
        assert [c.p_holm for c in item.comparisons] == pytest.approx(expected)


def test_skills_are_of_the_strongest_factor_and_have_their_own_chance(report: Report) -> None:
    skills = report.analyses[0].skills
    table = pd.read_parquet(report.results)
    assert skills.factor == FUSION
    assert skills.columns == ("single", "sum", "concat")
    seeing = table[table[ENCODERS] != "blind"]
    for skill, chance, questions, intervals in skills.rows:
        assert chance == pytest.approx(CHANCE[skill])
        assert questions == 60
        for level, interval in zip(skills.columns, intervals, strict=True):
            rows = seeing[(seeing["skill"] == skill) & (seeing[FUSION] == level)]
            assert interval is not None
            assert interval.estimate == pytest.approx(rows["score"].mean(), abs=1e-12)


def test_control_at_chance(report: Report) -> None:
    control = report.analyses[0].control
    assert control is not None
    assert control.verdict == "at chance"
    assert "blind, the image-blind arm, is at chance" in words(report)
    assert not any("leaks" in warning for warning in report.document.warnings)


def test_a_leaking_benchmark_is_warned_of_before_anything_else(folder: Path) -> None:
    def informed(frame: pd.DataFrame) -> pd.DataFrame:
        frame.loc[frame["skill"] == "existence", "score"] = 1.0
        return frame

    for number in range(9):
        edit(folder, f"t{number:03d}", informed)
    report = write_report(folder)
    control = report.analyses[0].control
    assert control is not None
    assert control.leaks
    assert "world leaks: the image-blind control blind scores above chance" in report.document.warnings[0]
    assert "above chance" in words(report)
    assert report.html.read_text().index("world leaks") < report.html.read_text().index("Every cell")


def test_seed_variance_widens_the_interval(tmp_path: Path, report: Report) -> None:
    noisy = write_report(build(tmp_path / "study", FACTORS, seed_sd=0.2))
    width = [item.analyses[0].cells[0].accuracy for item in (report, noisy)]
    assert width[1].high - width[1].low > 1.5 * (width[0].high - width[0].low)


# --- studies that are not whole ----------------------------------------------------------------------------------


def test_failed_and_unfinished_trials_are_counted_and_told(folder: Path) -> None:
    fail(folder, "t013", "OutOfMemoryError: 3 GiB | asked")
    (folder / "trials" / "t020" / "manifest.json").unlink()
    shutil.rmtree(folder / "trials" / "t026")
    (folder / "trials" / "t025" / "questions.parquet").unlink()
    report = write_report(folder)
    assert "23 of 27 planned complete, 2 failed, 2 not finished" in words(report)
    failures = next(table for table in report.tables if table.caption == "Trials without a result")
    assert [row.cells[0] for row in failures.rows] == ["t013", "t020", "t025"]
    assert failures.rows[0].cells[1:] == ("encoders=clip, fusion=sum", "1", "failed", "OutOfMemoryError: 3 GiB | asked")
    assert "questions.parquet is missing" in failures.rows[2].cells[4]
    assert r"OutOfMemoryError: 3 GiB \| asked" in report.markdown.read_text()


def test_trials_under_way_have_not_failed(folder: Path) -> None:
    for name, status in (("t013", "running"), ("t014", "stopped"), ("t020", "pruned"), ("t021", "failed")):
        manifest = folder / "trials" / name / "manifest.json"
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"status": status}))
    report = write_report(folder)
    assert "23 of 27 planned complete, 1 pruned, 1 failed, 2 not finished" in words(report)
    told = next(table for table in report.tables if table.caption == "Trials without a result")
    assert [row.cells[3] for row in told.rows] == ["unfinished", "unfinished", "failed"]
    pruned = next(table for table in report.tables if table.caption == "Pruned trials")
    assert [row.cells[:2] for row in pruned.rows] == [("encoders=dinov2, fusion=single", "2")]


def test_a_missing_run_is_filled_by_the_additive_model(folder: Path) -> None:
    fail(folder, "t013", "lost")  # clip, sum, seed 1
    report = write_report(folder)
    item = next(c for c in effect(report, FUSION).comparisons if (c.a, c.b) == ("sum", "single"))
    table = pd.read_parquet(report.results)
    means = table.groupby([FUSION, ENCODERS, "seed"])["score"].mean()
    d = (means["sum"] - means["single"]).drop("blind", errors="ignore").dropna()
    # With one run missing, the least-squares fit replaces it by cell mean + seed mean - mean of the complete part.
    filled = d["clip"].mean() + d["dinov2"][1] - d["dinov2"][[0, 2]].mean()
    assert item.difference.estimate == pytest.approx((d.sum() + filled) / 6, abs=1e-12)
    assert (item.difference.cells, item.difference.seeds, item.difference.runs_missing) == (2, 3, 1)
    assert "3, 1 missing" in report.markdown.read_text()
    assert "the additive model cell + seed" in report.markdown.read_text()


def test_levels_that_never_meet_are_not_compared(tmp_path: Path) -> None:
    def crossed(cell: Mapping[str, str], seed: int) -> bool:
        return (cell[ENCODERS] == "clip") != (cell[FUSION] == "single")

    factors = {ENCODERS: ("clip", "dinov2"), FUSION: ("single", "sum", "concat")}
    report = write_report(build(tmp_path / "study", factors, control=None, reject=crossed))
    assert effect(report, ENCODERS).comparisons == ()
    assert effect(report, ENCODERS).unmatched == (("dinov2", "clip"),)
    assert [(c.a, c.b) for c in effect(report, FUSION).comparisons] == [("concat", "sum")]
    assert "No two levels share a cell and a seed" in words(report)
    assert "hence not compared: dinov2 and clip" in report.markdown.read_text()


def test_one_seed_speaks_of_checkpoints_only(tmp_path: Path) -> None:
    report = write_report(build(tmp_path / "study", FACTORS, seeds=(7,)))
    assert any("variance between seeds is unknown" in warning for warning in report.document.warnings)
    assert report.analyses[0].cells[0].seed_sd is None
    table = pd.read_parquet(report.results)
    wide = table[table[ENCODERS] != "blind"].pivot_table(
        index=["question_id", "cluster"], columns=FUSION, values="score"
    )
    d = (wide["sum"] - wide["single"]).reset_index()
    sums = (d[0] - d[0].mean()).groupby(d["cluster"]).sum()
    half = stats.t.ppf(0.975, 59) * np.sqrt(60 / 59 * (sums**2).sum()) / len(d)
    item = effect(report, FUSION).comparisons[0].difference
    assert (item.low, item.high) == pytest.approx((d[0].mean() - half, d[0].mean() + half))


def test_two_seeds_are_said_to_be_few(tmp_path: Path) -> None:
    report = write_report(build(tmp_path / "study", FACTORS, seeds=(0, 1)))
    assert any("12.7" in warning for warning in report.document.warnings)


def test_nothing_complete_is_still_a_report(tmp_path: Path) -> None:
    folder = build(tmp_path / "study", {FUSION: ("single", "sum")}, control=None, seeds=(0,))
    fail(folder, "t000", "lost")
    shutil.rmtree(folder / "trials" / "t001")
    report = write_report(folder)
    assert report.rows == 0
    assert "0 of 2 planned complete, 1 failed, 1 not finished" in words(report)
    assert pd.read_parquet(report.results).empty


def test_one_cell_without_control(tmp_path: Path) -> None:
    report = write_report(build(tmp_path / "study", {FUSION: ("sum",)}, control=None))
    assert "nothing was varied" in words(report)
    assert report.analyses[0].effects == ()


def test_benchmarks_have_their_own_tables(tmp_path: Path) -> None:
    report = write_report(build(tmp_path / "study", FACTORS, benchmarks=("pope", "world"), images=30))
    assert [item.scores.name for item in report.analyses] == ["pope", "world"]
    titles = [section.title for section in report.document.sections]
    assert "Every cell on pope" in titles
    assert "Every cell on world" in titles
    assert "pope: fusion" in words(report)


def test_not_scored_is_left_out_on_both_sides_and_counted(folder: Path) -> None:
    def unjudged(frame: pd.DataFrame) -> pd.DataFrame:
        frame.loc[:9, "status"] = "not_scored"
        frame.loc[:9, "score"] = None
        return frame

    edit(folder, "t012", unjudged)  # clip, sum, seed 0
    report = write_report(folder)
    first, _, last = effect(report, FUSION).comparisons
    assert (first.difference.excluded, first.difference.questions) == (10, 230)
    assert last.difference.excluded == 10
    cell = next(item for item in report.analyses[0].cells if item.label == "encoders=clip, fusion=sum")
    assert cell.not_scored == pytest.approx(10 / 720)
    table = pd.read_parquet(report.results)
    unscored = set(table.loc[table["status"] == "not_scored", "question_id"])
    means = table[~table["question_id"].isin(unscored) & (table[ENCODERS] != "blind")].groupby(FUSION)["score"].mean()
    assert first.difference.estimate == pytest.approx(means["sum"] - means["single"], abs=1e-12)


def test_a_trial_without_any_score_is_named(folder: Path) -> None:
    edit(folder, "t012", lambda frame: frame.assign(status="not_scored", score=None))
    report = write_report(folder)
    assert "t012 has no score on this benchmark." in report.markdown.read_text()


# --- defects of the folder ---------------------------------------------------------------------------------------


def test_other_questions_are_an_error_that_names_them(folder: Path) -> None:
    edit(folder, "t004", lambda frame: frame.iloc[1:])
    with pytest.raises(
        DataError, match=r"trials t000 and t004 .* world: 1 only in t000 \['test/0000-colour'\], 0 only"
    ):
        write_report(folder)


def test_equal_ids_with_another_text_are_an_error(folder: Path) -> None:
    edit(folder, "t004", lambda frame: frame.assign(reference="no"))
    with pytest.raises(DataError, match="t000 and t004 differ in the column reference"):
        write_report(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: frame.assign(score=2.0), "score of question .* is not in"),
        (lambda frame: frame.assign(chance=np.nan), "chance of question .* is not in"),
        (lambda frame: pd.concat([frame, frame.head(1)]), "question test/0000-colour occurs twice"),
        (lambda frame: frame.drop(columns="cluster"), r"lacks the columns \['cluster'\]"),
    ],
)
def test_unusable_tables_are_errors(
    tmp_path: Path, change: Callable[[pd.DataFrame], pd.DataFrame], message: str
) -> None:
    folder = build(tmp_path / "study", {FUSION: ("single",)}, control=None, seeds=(0,), images=3)
    edit(folder, "t000", change)
    with pytest.raises(DataError, match=message):
        write_report(folder)


def test_two_complete_trials_of_one_point_are_an_error(tmp_path: Path) -> None:
    folder = build(tmp_path / "study", {FUSION: ("single", "sum")}, control=None, images=3)
    shutil.copytree(folder / "trials" / "t000", folder / "trials" / "t900")
    with pytest.raises(DataError, match="trials t000 and t900 are both complete"):
        load_study(folder)


def test_what_the_plan_says_of_trials_counts_and_fidelities_are_not_mixed(folder: Path) -> None:
    """Trials that an edit took out stay on disk, levels may have new names, and the best ran once more as a whole."""
    plan = json.loads((folder / "study.json").read_text())
    trials = {}
    for path in sorted((folder / "trials").iterdir()):
        manifest = json.loads((path / "manifest.json").read_text())
        levels = {factor: f"new {label}" for factor, label in manifest["cell"].items()}
        trials[path.name] = {"levels": levels, "seed": manifest["seed"], "fidelity": "small"}
    first, second, third = list(trials)[:3]
    shutil.copytree(folder / "trials" / first, folder / "trials" / "again")
    trials["again"] = trials[first] | {"fidelity": "whole"}
    del trials[second]
    factors = {factor: [f"new {label}" for label in labels] for factor, labels in plan["factors"].items()}
    change = {"factors": factors, "trials": trials, "fidelities": ["small", "whole"], "planned": None, "control": None}
    (folder / "study.json").write_text(json.dumps(plan | change))
    whole = load_study(folder)
    assert (whole.fidelity, whole.planned, [trial.folder.name for trial in whole.trials]) == ("whole", 1, ["again"])
    assert dict(whole.trials[0].cell) == trials[first]["levels"]
    assert "At fidelity whole (of small, whole): 1 of 1 planned complete" in write_report(folder).markdown.read_text()
    del trials["again"]
    (folder / "study.json").write_text(json.dumps(plan | change | {"trials": trials}))
    small = load_study(folder)
    names = [trial.folder.name for trial in small.trials]
    assert small.fidelity == "small"
    assert third in names
    assert second not in names
    assert "again" not in names
    assert small.planned == len(trials)


def test_a_control_that_is_no_level_is_an_error(tmp_path: Path) -> None:
    folder = build(tmp_path / "study", {FUSION: ("single", "sum")}, control=None, images=3)
    plan = json.loads((folder / "study.json").read_text())
    (folder / "study.json").write_text(json.dumps({**plan, "control": {"path": FUSION, "label": "blind"}}))
    with pytest.raises(DataError, match="is not a level"):
        write_report(folder)


def test_no_study_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no study; wanted a folder that `chiasm sweep` wrote into"):
        write_report(tmp_path)


def test_an_unreadable_manifest_is_a_failed_trial(tmp_path: Path) -> None:
    folder = build(tmp_path / "study", {FUSION: ("single", "sum")}, control=None, images=5)
    (folder / "trials" / "t000" / "manifest.json").write_text("{")
    report = write_report(folder)
    assert "5 of 6 planned complete, 1 failed" in words(report)


# --- the files ---------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Collects what a browser would fetch or run, the nesting, and the text."""

    VOID = frozenset({"meta", "img", "br", "hr", "link", "input"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_html_is_one_file_without_script_or_address(report: Report) -> None:
    text = report.html.read_text()
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed"}
    sources = [value for _, attrs in page.tags for key, value in attrs.items() if key in {"src", "href", "srcset"}]
    # accuracy, and accuracy against cost
    assert [source[:22] for source in sources if source] == ["data:image/png;base64,"] * 2
    assert "url(" not in text
    assert "@import" not in text
    assert not re.search(r"(?i)(?<!base64,)https?://", text)
    assert {"lang": "en"} in [attrs for tag, attrs in page.tags if tag == "html"]
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")
    assert (
        sum(tag == "caption" for tag, _ in page.tags)
        == sum(tag == "table" for tag, _ in page.tags)
        == len(report.tables)
    )


def test_markdown_and_html_print_the_same_tables(report: Report) -> None:
    html = re.sub(r"\s+", " ", " ".join(Page(report.html.read_text()).text))
    markdown = report.markdown.read_text().replace("\\", "")
    for table in report.tables:
        for cell in (cell for row in table.rows for cell in row.cells):
            assert cell in html
            assert cell.replace("<", "&lt;") in markdown


def test_the_answer_comes_first(report: Report) -> None:
    markdown = report.markdown.read_text()
    parts = ["# fusion", "*Which fusion", "## In short", "## Every cell", "## Effects", "## By skill", "## Figure",
             "## How it was computed", "## Seeds", "## Provenance"]  # fmt: skip
    places = [markdown.index(part) for part in parts]
    assert places == sorted(places)
    for factor in ("encoders", "fusion"):
        assert re.search(rf"- \*\*{factor}\*\*: (Undecided\. )?\w+ (leads|is best)", markdown)
    assert "27 of 27 planned complete, 0 failed, 0 not finished" in markdown


def test_provenance_is_from_the_manifests(report: Report) -> None:
    rows = {row.cells[0]: row.cells[1] for row in report.tables[-1].rows}
    assert rows["git_revision"] == "44eb072"
    assert rows["packages.torch"] == "2.9.0"
    assert rows["command"] == "chiasm sweep fusion.yaml"
    assert rows["time, evaluate"] == "27 min over 27 trials"


def test_a_stage_that_trials_share_is_counted_once_in_the_total(tmp_path: Path) -> None:
    folder = build(tmp_path / "study", {FUSION: ("single", "sum")}, control=None, images=5)
    path = folder / "trials" / "t000" / "manifest.json"
    manifest = json.loads(path.read_text())
    trials = [json.loads(file.read_text())["seconds"]["train"] for file in folder.glob("trials/*/manifest.json")]
    manifest["seconds"]["shared"] = 300.0
    path.write_text(json.dumps(manifest))
    rows = {row.cells[0]: row.cells[1] for row in write_report(folder).tables[-1].rows}
    assert rows["time, train"] == f"{round((sum(trials) - 300) / 60)} min over {len(trials)} trials"
    assert rows["time saved by shared stages"] == "300 s"


def test_mixed_revisions_are_warned_of(tmp_path: Path) -> None:
    folder = build(tmp_path / "study", {FUSION: ("single", "sum")}, control=None, images=5)
    path = folder / "trials" / "t000" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["environment"]["git_revision"] = "ffffff0"
    path.write_text(json.dumps(manifest))
    report = write_report(folder)
    assert any(warning.endswith("git_revision.") for warning in report.document.warnings)
    assert "44eb072 (5 trials); ffffff0 (1 trial)" in report.markdown.read_text()


def test_hostile_labels_are_text(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script>'
    odd = "a|b `c` *d* _e_ $x^$ [l](http://x.y)"
    factors = {"f.<b>": (evil, odd), FUSION: ("single", "sum")}
    name = "</title><img src=x onerror=alert(1)>"
    folder = build(
        tmp_path / "study", factors, control=("f.<b>", evil), name=name, question="<i>why</i>\n# so?", images=5
    )
    report = write_report(folder)
    page = Page(report.html.read_text())
    assert not {"script", "b", "i"} & {tag for tag, _ in page.tags}
    assert [attrs["src"][:5] for tag, attrs in page.tags if tag == "img" and attrs["src"]] == ["data:"]
    assert evil in "".join(page.text)
    markdown = report.markdown.read_text()
    assert "<" not in markdown
    assert r"a\|b \`c\` \*d\* \_e\_ \$x^\$ [l\](http:\//x.y)" in markdown
    assert "\n# so" not in markdown
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines() if line.startswith("|")]
    expected = [len(table.columns) + 1 for table in report.tables for _ in range(2 + len(table.rows))]
    assert widths == expected
    assert pd.read_parquet(report.results)["f.<b>"].isin([evil, odd]).all()


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    folder = build(tmp_path / "study", FACTORS, images=10)
    first = write_report(folder)
    before = [path.read_bytes() for path in (first.html, first.markdown, first.figure, first.results)]
    second = write_report(folder)
    assert before == [path.read_bytes() for path in (second.html, second.markdown, second.figure, second.results)]
    assert not list(folder.glob(".*"))


def test_many_levels_show_the_best_and_keep_the_family(tmp_path: Path) -> None:
    levels = tuple(f"level{i}" for i in range(MAX_LEVELS_ALL_PAIRS + 1))
    gains = {level: 0.1 * i for i, level in enumerate(levels)}
    folder = build(
        tmp_path / "study", {FUSION: levels}, control=None, images=20, seeds=(0,), gain=lambda cell: gains[cell[FUSION]]
    )
    item = effect(write_report(folder), FUSION)
    table = effect_table(item)
    assert len(item.comparisons) == 21
    assert len(table.rows) == 6
    assert "over 21 comparisons" in table.notes[0]
    assert "Of 21 comparisons" in table.notes[1]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.0"), (0.0312, "+3.1"), (-0.0312, "\N{MINUS SIGN}3.1"), (0.0001, "+0.0"), (-0.0001, "\N{MINUS SIGN}0.0")],
)
def test_signed_numbers_show_their_side(value: float, text: str) -> None:
    assert fmt.signed(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(8.41, "8.4 s"), (412.3, "412 s"), (1700.0, "28 min"), (6720.0, "1 h 52 min"), (None, fmt.MISSING)],
)
def test_durations(value: float | None, text: str) -> None:
    assert fmt.duration(value) == text


def test_markdown_needs_no_folder(report: Report) -> None:
    assert to_markdown(report.document) == report.markdown.read_text()
