"""Turns results into the tables and sections that both renderers print; all text here is plain, never markup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from chiasm_experiments.report import format as fmt
from chiasm_experiments.report.cells import CellResult
from chiasm_experiments.report.effects import Analysis, Comparison, FactorEffect
from chiasm_experiments.report.statistics import Interval
from chiasm_experiments.report.study import Study

MAX_LEVELS_ALL_PAIRS = 6
MAX_CELLS = 60

Mark = Literal["", "control", "better", "worse", "undecided", "failed"]


@dataclass(frozen=True, slots=True)
class Column:
    """A column's heading; numbers are set to the right. `note` explains the heading in the HTML."""

    title: str
    numeric: bool = False
    note: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One printed row; `mark` says what kind it is, in words wherever colour says it too."""

    cells: tuple[str, ...]
    mark: Mark = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A table as it is printed."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert all(len(row.cells) == len(self.columns) for row in self.rows), self.caption


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with paragraphs, tables and, after them, figures by the names of their files."""

    title: str
    paragraphs: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[str, ...] = ()


def cells_table(study: Study, analysis: Analysis) -> Table:
    """A row for each cell, the most accurate first; of very many only those."""
    scores = analysis.scores
    with_control = analysis.control is not None
    columns = cell_columns(study)
    columns.append(Column("accuracy, %", True, "with its 95% interval over images and seeds"))
    if with_control:
        columns.append(Column("minus control", True, "points; against the control in the same cell"))
    columns.append(Column("minus chance", True, "points"))
    columns += [
        Column("visual tokens", True),
        Column("trained parameters", True),
        Column("train time", True, "mean over seeds"),
        Column("seeds", True),
        Column("questions", True, "those with a score in every seed"),
    ]
    rows = []
    for cell in shown_cells(analysis.cells, MAX_CELLS):
        values = cell_values(study, cell)
        values.append(fmt.accuracy(cell.accuracy))
        if with_control:
            values.append("control" if cell.is_control else fmt.difference(cell.minus_control))
        values += [fmt.difference(cell.minus_chance), *_cost(cell)]
        values += [str(cell.accuracy.seeds), fmt.count(cell.accuracy.questions)]
        rows.append(Row(tuple(values), "control" if cell.is_control else ""))
    chance = fmt.points(float(scores.chance.mean()))
    notes = [
        f"Chance on these questions is {chance} %. Differences are in percent points, paired by question. These "
        "intervals are not adjusted for the number of rows."
    ]
    if study.control is not None and not with_control:
        notes.append("No trial of the control has a score.")
    if len(rows) < len(analysis.cells):
        notes.append(
            f"Of {len(analysis.cells)} cells the {len(rows)} most accurate are shown, with the best control; "
            "results.parquet has all."
        )
    caption = f"{scores.name}: accuracy of every cell{study.where}"
    return Table(caption, tuple(columns), tuple(rows), tuple(notes))


def cell_columns(study: Study) -> list[Column]:
    """A column for each factor that tells one cell from another."""
    return [Column(study.short[path], path in study.ranges, note=path) for path in study.named] or [Column("cell")]


def cell_values(study: Study, cell: CellResult) -> list[str]:
    """What stands in these columns; the control is said to be one."""
    values = [study.value(cell.cell, path) for path in study.named] or [cell.label]
    if cell.is_control and study.control is not None:
        values[study.named.index(study.control.path) if study.control.path in study.named else 0] += " (control)"
    return values


def shown_cells(cells: Sequence[CellResult], most: int) -> list[CellResult]:
    """All cells, or with very many of them the most accurate; the best control is always among them."""
    if len(cells) <= most:
        return list(cells)
    control = [cell for cell in cells if cell.is_control][:1]
    return [cell for cell in cells if cell not in control][: most - len(control)] + control


def effect_table(effect: FactorEffect, where: str = "") -> Table:
    """Every pair of levels, or with many levels those that concern the best one or the control."""
    shown = effect.comparisons
    notes = []
    if len(effect.levels) > MAX_LEVELS_ALL_PAIRS:
        shown = tuple(c for c in shown if effect.best in (c.a, c.b) or (effect.control or effect.best) in (c.a, c.b))
        notes.append(f"Of {len(effect.comparisons)} comparisons those with the best level or the control are shown.")
    notes.insert(
        0,
        f"Holm's adjustment is over {fmt.number(len(effect.comparisons), 'comparison')} of this factor. A verdict "
        "follows from the 95% interval; \N{CHECK MARK} marks those that survive the adjustment at 5%.",
    )
    if effect.unmatched:
        pairs = "; ".join(f"{a} and {b}" for a, b in effect.unmatched)
        notes.append(f"Without a common cell and seed, hence not compared: {pairs}.")
    if any(c.difference.runs_missing for c in shown):
        notes.append(
            "Where a cell lacks a seed, the additive model cell + seed, fitted to the runs there are, stands in."
        )
    for what, left_out in (
        ("Runs without a common cell or seed, left out", [(c, c.difference.runs_left_out) for c in shown]),
        ("Questions without a score in some run, left out on both sides", [(c, c.difference.excluded) for c in shown]),
    ):
        parts = [f"{c.a} and {c.b}: {fmt.count(number)}" for c, number in left_out if number]
        if parts:
            notes.append(f"{what}: {'; '.join(parts)}.")
    columns = (
        Column("comparison", note="the first level minus the second"),
        Column("difference, points", True, "with its 95% interval over images and seeds"),
        Column("p", True, "two-sided, by inverting the interval"),
        Column("p, Holm", True),
        Column("verdict"),
        Column("cells \N{MULTIPLICATION SIGN} seeds", True, "matched cells of the other factors"),
        Column("questions (images)", True),
    )
    return Table(
        f"Effect of {effect.factor}{where}", columns, tuple(_effect_row(c, effect) for c in shown), tuple(notes)
    )


def skills_table(study: Study, analysis: Analysis) -> Table:
    """Accuracy by skill, a column for each level of the strongest factor."""
    skills = analysis.skills
    by = "cell" if skills.factor is None else skills.factor
    columns = [Column("skill"), Column("questions", True), Column("chance, %", True)]
    control = study.control
    for name in skills.columns:
        blind = control is not None and skills.factor == control.path and name == control.label
        columns.append(Column(f"{name} (control)" if blind else name, True))
    rows = tuple(
        Row((skill, fmt.count(questions), fmt.points(chance), *map(fmt.accuracy, intervals)))
        for skill, chance, questions, intervals in skills.rows
    )
    notes = ["Intervals describe one skill each and are not adjusted for their number."]
    if skills.factor is not None and len(analysis.effects) > 1:
        notes.insert(0, f"{skills.factor} is the factor with the largest difference; the other factors are averaged.")
    caption = f"{analysis.scores.name}: accuracy by skill for each {by}{study.where}, %"
    return Table(caption, tuple(columns), rows, tuple(notes))


def quality_table(study: Study, analysis: Analysis) -> Table:
    """The spread between seeds and what could not be read or scored."""
    columns = (
        Column("cell"),
        Column("accuracy of each seed, %"),
        Column("SD of seeds, points", True),
        Column("unparsed", True, "answers from which nothing could be read; the benchmark's rule scores them"),
        Column("not scored", True, "left out, never counted as wrong"),
    )
    rows = []
    for cell in shown_cells(analysis.cells, MAX_CELLS):
        pairs = sorted(zip((trial.seed for trial in cell.trials), cell.seed_accuracies, strict=True))
        seeds = ", ".join(f"{fmt.points(value)} (seed {seed})" for seed, value in pairs)
        spread = "unknown" if cell.seed_sd is None else fmt.points(cell.seed_sd)
        values = (cell.label, seeds, spread, fmt.percent(cell.unparsed), fmt.percent(cell.not_scored))
        rows.append(Row(values, "control" if cell.is_control else ""))
    notes = [f"{trial.id} has no score on this benchmark." for trial in analysis.scores.dropped]
    return Table(f"{analysis.scores.name}: seeds and answers by cell{study.where}", columns, tuple(rows), tuple(notes))


def failures_table(study: Study) -> Table | None:
    """Trials of all fidelities that failed or have not finished; None where there are none. Pruned ones have not."""
    rows = []
    for trial in study.every:
        if trial.status in ("failed", "unfinished"):
            what = study.label(trial.cell) if trial.cell else fmt.MISSING
            seed = str(trial.seed) if trial.cell else fmt.MISSING
            at = (trial.fidelity or fmt.MISSING,) if study.several else ()
            rows.append(Row((trial.id, what, *at, seed, trial.status, trial.error or fmt.MISSING), "failed"))
    at_ = (Column("fidelity"),) if study.several else ()
    columns = (Column("trial"), Column("cell"), *at_, Column("seed", True), Column("status"), Column("error"))
    return Table("Trials without a result", columns, tuple(rows)) if rows else None


def method(study: Study, analyses: Sequence[Analysis]) -> tuple[str, ...]:
    """How the intervals were computed, in four sentences, and what follows from the study's size."""
    seeds = sorted({cell.accuracy.seeds for analysis in analyses for cell in analysis.cells})
    images = sorted({cell.accuracy.images for analysis in analyses for cell in analysis.cells})
    df = (
        f" Here the seeds have {_span([s - 1 for s in seeds])} and the images {_span([g - 1 for g in images])} degrees "
        "of freedom."
        if seeds
        else ""
    )
    minus, squared = "\N{MINUS SIGN}", "\N{SUPERSCRIPT TWO}"
    how = (
        "A difference is the mean, over matched cells of the other factors, seeds and questions, of the paired "
        "difference on one question; a question without a score in some compared run is left out on both sides. "
        f"Its variance has an image part (sandwich form clustered by image with the factor G/(G{minus}1), CR1) and a "
        f"seed part (s{squared}/S of the S seed-level means), less what both contain (the seed-by-image residual; "
        "Cameron, Gelbach and Miller 2011). "
        f"The 95% interval multiplies each part by its own squared t quantile, with G{minus}1 and S{minus}1 degrees of "
        "freedom, and adds them (Banerjee 1960), because with few seeds it then still covers at least nominally, where "
        "Satterthwaite's approximation does not. "
        "Accuracies have the same variance in Wilson's form, which stays between 0 and 100; p-values invert the "
        "interval, and Holm's method adjusts them over all pairs of a factor's levels."
    )
    paragraphs = [how + df]
    if study.control is not None:
        paragraphs.append(
            f"Trials of the control ({study.control.path}={study.control.label}) take part in the comparisons of "
            f"{study.control.path} only, because an arm that cannot see would dilute every other effect."
        )
    if any(effect.best for analysis in analyses for effect in analysis.effects):
        paragraphs.append(
            "The best level of a factor is named after seeing the data: Holm's adjustment over all pairs allows for "
            "that choice, a single interval does not."
        )
    return tuple(paragraphs)


def _effect_row(item: Comparison, effect: FactorEffect) -> Row:
    d = item.difference
    first, second = item.a, f"{item.b} (control)" if item.b == effect.control else item.b
    return Row(
        (
            f"{first} \N{MINUS SIGN} {second}",
            fmt.difference(d),
            fmt.p_value(d.p_value),
            fmt.p_value(item.p_holm),
            f"{item.verdict} \N{CHECK MARK}" if item.survives else item.verdict,
            f"{d.cells} \N{MULTIPLICATION SIGN} {d.seeds}{f', {d.runs_missing} missing' if d.runs_missing else ''}",
            _sample(d),
        ),
        item.verdict,
    )


def _sample(interval: Interval) -> str:
    return f"{fmt.count(interval.questions)} ({fmt.count(interval.images)})"


def _cost(cell: CellResult) -> tuple[str, str, str]:
    """Tokens and parameters, which seeds share (a range where they do not), and the mean training time."""
    times = [trial.seconds["train"] for trial in cell.trials if "train" in trial.seconds]
    return (
        _range([trial.visual_tokens for trial in cell.trials if trial.visual_tokens is not None], fmt.count),
        _range([trial.trained for trial in cell.trials if trial.trained is not None], fmt.parameters),
        fmt.duration(sum(times) / len(times)) if times else fmt.MISSING,
    )


def _range(values: Sequence[int], form: object) -> str:
    assert callable(form)
    if not values:
        return fmt.MISSING
    low, high = min(values), max(values)
    return str(form(low)) if low == high else f"{form(low)}\N{EN DASH}{form(high)}"


def _span(values: Sequence[int]) -> str:
    return str(values[0]) if values[0] == values[-1] else f"{values[0]} to {values[-1]}"
