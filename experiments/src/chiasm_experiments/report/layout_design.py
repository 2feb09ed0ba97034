"""Tables of what a design supports beside single factors: interactions, main effects, fidelities, costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from chiasm_experiments.report import format as fmt
from chiasm_experiments.report.cells import CellResult, cell_key
from chiasm_experiments.report.costs import Front, cost_title
from chiasm_experiments.report.effects import Analysis
from chiasm_experiments.report.layout import Column, Row, Table, cell_columns, cell_values
from chiasm_experiments.report.ranks import MIN_CELLS, Correlation, RankAgreement
from chiasm_experiments.report.study import Study

MAX_INTERACTIONS = 15
MAX_OPEN = 6
_TIMES = "\N{MULTIPLICATION SIGN}"


def design_notes(study: Study, analysis: Analysis) -> tuple[str, ...]:
    """What the effects of this design are, and are not."""
    notes = {
        "one_factor": (
            "Each factor was varied alone from the base run: an effect is a difference to the base in one cell, with "
            "all other factors at the base. Whether it holds elsewhere, that is any interaction, cannot be estimated."
        ),
        "pairwise": (
            "Every two levels meet in some cell, but the cells of one level differ from those of another in other "
            "factors too. The comparisons use matched cells alone, often few or none; the additive model uses all "
            "cells and holds as far as effects add up."
        ),
        "cells": "The cells were listed by hand: levels are compared on matched cells alone.",
        "search": (
            "Cells were proposed by what earlier ones had scored: levels that looked good are tried more often and in "
            "better company. Comparisons use matched cells alone."
        ),
    }
    found = [notes[study.design]] if study.design in notes else []
    if study.several and study.fidelity != study.fidelities[0]:
        found.append(
            f"The cells at fidelity {study.fidelity} went on from {_before(study)} because they were accurate there; "
            "what holds among them need not hold among all cells."
        )
    seeing = [factor for factor in study.varied if factor in {effect.factor for effect in analysis.effects}]
    if not analysis.interactions and len(seeing) > 1 and study.design != "one_factor":
        found.append(
            "Interactions cannot be estimated here: no two levels of one factor and two of another have all four "
            "cells with a seed in common."
        )
    return tuple(found)


def interactions_table(study: Study, analysis: Analysis) -> Table | None:
    """The contrasts of two factors, of many those with the least p; None without any."""
    found = sorted(analysis.interactions, key=lambda item: item.difference.p_value)
    if not found:
        return None
    rows = [
        Row(
            (
                f"{study.short[item.factors[0]]}: {item.a[0]} \N{MINUS SIGN} {item.a[1]}",
                f"{study.short[item.factors[1]]}: {item.b[0]} rather than {item.b[1]}",
                fmt.difference(item.difference),
                fmt.p_value(item.difference.p_value),
                fmt.p_value(item.p_holm),
                _decided(item.difference.verdict) + (" \N{CHECK MARK}" if item.survives else ""),
                f"{item.difference.cells} {_TIMES} {item.difference.seeds}",
            ),
            "undecided" if item.difference.verdict == "undecided" else "better",
        )
        for item in found[:MAX_INTERACTIONS]
    ]
    notes = [
        "A difference of differences: by how many points the step in the first column is larger at the one level of "
        f"the other factor than at the other. Holm's adjustment is over {fmt.number(len(found), 'contrast')}. Its "
        "standard error is about twice that of a main effect, so that undecided is no evidence of none."
    ]
    if len(rows) < len(found):
        notes.append(f"Of {len(found)} contrasts those with the {len(rows)} least p are shown.")
    columns = (
        Column("step"), Column("at"), Column("difference of differences, points", True, "with its 95% interval"),
        Column("p", True), Column("p, Holm", True), Column("verdict"),
        Column(f"cells {_TIMES} seeds", True, "matched cells of the other factors"),
    )  # fmt: skip
    return Table(f"Interactions of two factors{study.where}", columns, tuple(rows), tuple(notes))


def additive_table(study: Study, analysis: Analysis) -> Table | None:
    """Main effects by least squares; None where the design needs none or has too few cells."""
    fit = analysis.additive
    if fit is None:
        return None
    rows = tuple(
        Row((study.short[item.factor], f"{item.level} \N{MINUS SIGN} {item.reference}", fmt.difference(item.difference),
             item.difference.verdict), item.difference.verdict)
        for item in fit.effects
    )  # fmt: skip
    notes = [
        f"Least squares on {fit.cells} cells, each the mean of {fmt.number(fit.seeds, 'seed')} that all of them have; "
        "the control is left out. The interval has the part of images and seeds, and the part of what the additive "
        f"model does not explain: {fmt.points(fit.residual_sd)} points between cells, with "
        f"{fmt.number(fit.freedom, 'degree')} of freedom. It is not adjusted for the number of rows."
    ]
    if fit.confounded:
        notes.append(f"Not to be told apart from other factors in these cells: {', '.join(fit.confounded)}.")
    columns = (Column("factor"), Column("levels"), Column("main effect, points", True), Column("verdict"))
    return Table(f"Main effects by the additive model{study.where}", columns, rows, tuple(notes))


def fidelity_table(study: Study) -> Table:
    """What was run at each fidelity, from the cheapest."""
    rows = []
    for name in study.fidelities:
        at = study.at(name)
        number = Counter(trial.status for trial in at.trials)
        begun = number["complete"] + number["pruned"] + number["failed"]
        note = study.unaligned(name)
        rows.append(
            Row(
                (
                    name,
                    str(len({cell_key(trial.cell) for trial in at.complete})),
                    str(len({trial.seed for trial in at.complete})),
                    *(str(number[status]) for status in ("complete", "pruned", "failed")),
                    str(max(study.listed.get(name, 0), len(at.trials)) - begun),
                    "trained" if note is None else "skipped",
                )
            )
        )
    columns = (
        Column("fidelity"), Column("cells", True, "with a complete trial"), Column("seeds", True),
        Column("complete", True), Column("pruned", True), Column("failed", True), Column("not finished", True),
        Column("stage 1", note="whether a stage trains the connectors alone, where it does in the whole run"),
    )  # fmt: skip
    return Table("Trials at each fidelity, from the cheapest", columns, tuple(rows))


def ranks_table(agreements: Sequence[RankAgreement]) -> Table | None:
    """Whether cheaper fidelities rank cells as dearer ones do; None where no cells are common."""
    if not agreements:
        return None
    rows = tuple(
        Row((item.benchmark, f"{item.cheap} and {item.dear}", str(item.cells),
             str(item.seeds[0]) if item.seeds[0] == item.seeds[1] else f"{item.seeds[0]} to {item.seeds[1]}",
             _correlation(item.spearman, item), _correlation(item.kendall, item),
             "the same" if item.same_best else "another"))
        for item in agreements
    )  # fmt: skip
    notes = (
        "Over the cells that both fidelities have, by the means of their seeds, the control left out. The 95% interval "
        "is over cells and inverts the test under a normal copula; it takes the cells as drawn at random. Cells that "
        "went on because they were accurate are alike, which lowers the agreement, and so does the noise of few seeds.",
    )
    columns = (
        Column("benchmark"), Column("fidelities"), Column("common cells", True), Column("seeds", True),
        Column("Spearman", True), Column("Kendall", True), Column("most accurate cell"),
    )  # fmt: skip
    return Table("Rank agreement of fidelities", columns, rows, notes)


def front_table(study: Study, analysis: Analysis, front: Front) -> Table:
    """The cells of one front of several, the cheapest first, and what each gains over the one before."""
    columns = [*cell_columns(study), Column(front.title, True), Column("accuracy, %", True)]
    columns += [Column("minus the next cheaper", True, "points, over common seeds and questions"), Column("verdict")]
    columns.append(Column("seeds", True))
    rows = []
    for step in front.steps:
        verdict = fmt.MISSING if step.gain is None else step.gain.verdict
        rows.append(
            Row(
                (
                    *cell_values(study, step.cell),
                    cost(front.name, step.cost),
                    fmt.accuracy(step.cell.accuracy),
                    fmt.difference(step.gain),
                    verdict,
                    str(step.cell.accuracy.seeds),
                ),
                "" if step.gain is None else step.gain.verdict,
            )
        )
    notes: tuple[str, ...] = ()
    if front.open:
        labels = "; ".join(cell.label for cell in front.open[:MAX_OPEN])
        more = f"; and {len(front.open) - MAX_OPEN} more" if len(front.open) > MAX_OPEN else ""
        notes = (f"Not on it by their means, yet not decidedly worse than what costs no more: {labels}{more}.",)
    caption = f"{analysis.scores.name}: Pareto front of accuracy and {front.title}{study.where}"
    return Table(caption, tuple(columns), tuple(rows), notes)


def dominating(study: Study, analysis: Analysis, front: Front) -> str:
    """A front of one cell in words."""
    (step,) = front.steps
    text = f"{step.cell.label} is the most accurate{study.where} on {analysis.scores.name}, and none costs less"
    text = f"{front.title[:1].upper()}{front.title[1:]}: {text} ({cost(front.name, step.cost)})"
    return f"{text}; {len(front.open)} others are not decidedly worse." if front.open else f"{text}."


def joint_table(study: Study, analysis: Analysis, fronts: Sequence[Front], cells: Sequence[CellResult]) -> Table:
    """The front of all objectives together."""
    by_name = {front.name: dict(zip(map(id, analysis.cells), front.costs, strict=True)) for front in fronts}
    names = [name for name in study.minimize if name in by_name]
    columns = [*cell_columns(study), Column("accuracy, %", True)]
    columns += [Column(cost_title(study, name), True) for name in names]
    columns.append(Column("seeds", True))
    rows = []
    for cell in cells:
        costs = [cost(name, by_name[name][id(cell)]) for name in names]
        rows.append(Row((*cell_values(study, cell), fmt.accuracy(cell.accuracy), *costs, str(cell.accuracy.seeds))))
    caption = f"{analysis.scores.name}: Pareto front of all objectives{study.where}"
    return Table(caption, tuple(columns), tuple(rows))


def cost(name: str, value: float | None) -> str:
    """One cost as it is printed."""
    if value is None:
        return fmt.MISSING
    match name:
        case "visual_tokens":
            return fmt.count(round(value))
        case "trained_parameters":
            return fmt.parameters(round(value))
        case "flops":
            return fmt.flops(value)
        case "train_seconds":
            return fmt.duration(value)
        case _:
            return f"{value:.3g} s"


def _correlation(found: Correlation | None, item: RankAgreement) -> str:
    if found is not None:
        return f"{fmt.coefficient(found.estimate)} [{fmt.coefficient(found.low)}, {fmt.coefficient(found.high)}]"
    return "too few cells to say" if item.cells < MIN_CELLS else "all cells are equal"


def _decided(verdict: str) -> str:
    return {"better": "larger", "worse": "smaller"}.get(verdict, verdict)


def _before(study: Study) -> str:
    return study.fidelities[study.fidelities.index(str(study.fidelity)) - 1]
