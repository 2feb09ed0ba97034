"""Puts the results in the order in which a reader needs them; a section is there only where it has something to say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

from chiasm_experiments.report import format as fmt
from chiasm_experiments.report.costs import Front, fronts, joint_front
from chiasm_experiments.report.effects import Analysis
from chiasm_experiments.report.figure import alt_text, draw
from chiasm_experiments.report.figure_study import curved, draw_costs, draw_curves, draw_ranges
from chiasm_experiments.report.importance import importances
from chiasm_experiments.report.layout import (
    Section,
    Table,
    cells_table,
    effect_table,
    failures_table,
    method,
    quality_table,
    skills_table,
)
from chiasm_experiments.report.layout_design import (
    additive_table,
    design_notes,
    dominating,
    fidelity_table,
    front_table,
    interactions_table,
    joint_table,
    ranks_table,
)
from chiasm_experiments.report.layout_search import (
    best_table,
    curse,
    importance_table,
    pruned_table,
    range_table,
    skipped_table,
    tried,
)
from chiasm_experiments.report.provenance import mixed_code, provenance_table
from chiasm_experiments.report.ranges import range_results
from chiasm_experiments.report.ranks import RankAgreement, rank_agreement
from chiasm_experiments.report.render import Document
from chiasm_experiments.report.study import Study
from chiasm_experiments.report.summary import summary, warnings

FIGURE, COSTS, RANGES, CURVES = "report.png", "report-cost.png", "report-ranges.png", "report-curves.png"
PICTURES = (FIGURE, COSTS, RANGES, CURVES)


@dataclass(frozen=True)
class View:
    """A study at one fidelity with the results of each benchmark there."""

    study: Study
    analyses: tuple[Analysis, ...]

    def on(self, analysis: Analysis) -> str:
        """What a title adds, so that it says of which benchmark and at which fidelity it speaks."""
        benchmark = f" on {analysis.scores.name}" if len(self.analyses) > 1 else ""
        return benchmark + self.study.where


@dataclass(frozen=True)
class Composed:
    """A document, and what draws each of its figures, by the name of its file."""

    document: Document
    pictures: Mapping[str, Callable[[Path], None]]


def compose(main: View, cheaper: Sequence[View] = ()) -> Composed:
    """The document of a study.

    Args:
        main: at the fidelity that the summary speaks of.
        cheaper: at the others with a complete trial, the most expensive first.
    """
    study, analyses = main.study, main.analyses
    pictures: dict[str, Callable[[Path], None]] = {FIGURE: partial(draw, study, analyses)}
    words = {FIGURE: alt_text(study, analyses)}
    sections = [*_tried(main), *(section for view in (main, *cheaper) for section in _results(view))]
    sections.append(Section("Figure", figures=(FIGURE,)))
    costs = [(analysis, front) for analysis in analyses for front in fronts(study, analysis)]
    if costs:
        pictures[COSTS] = partial(draw_costs, study, costs)
        words[COSTS] = (
            "Accuracy of each cell with its 95% interval against each cost in which cells differ; those on the Pareto "
            "front are dark and joined by steps. The same numbers stand in the tables."
        )
        sections.append(_costs(main, costs))
    ranges = [(analysis, item) for analysis in analyses for item in range_results(study, analysis)]
    if ranges:
        pictures[RANGES] = partial(draw_ranges, study, ranges)
        words[RANGES] = "Accuracy of each cell against its value of each range; larger dots have more seeds."
        own = {id(analysis): [item for other, item in ranges if other is analysis] for analysis in analyses}
        found = (range_table(study, analysis, own[id(analysis)]) for analysis in analyses)
        sections.append(Section(f"Ranges of numbers{study.where}", tables=_there(found), figures=(RANGES,)))
    sections += _all_fidelities(main, cheaper)
    if curved(study):
        pictures[CURVES] = partial(draw_curves, study)
        words[CURVES] = (
            "Accuracy at the rungs of each trial against the share of its last stage; pruned ones end there."
        )
        sections.append(Section("Learning curves", (_CURVES,), figures=(CURVES,)))
    sections += _left_out(study)
    sections.append(Section("How it was computed", paragraphs=method(study, analyses)))
    quality = tuple(quality_table(view.study, item) for view in (main, *cheaper) for item in view.analyses)
    if quality:
        sections.append(Section("Seeds, unparsed and not scored", tables=quality))
    failures = failures_table(study)
    if failures is not None:
        sections.append(Section("Failures", tables=(failures,)))
    sections.append(Section("Provenance", tables=(provenance_table(study),)))
    document = Document(
        title=study.name,
        question=study.question,
        facts=_facts(study, analyses),
        summary=summary(study, analyses),
        warnings=(*warnings(study, analyses), *_more_warnings(study, analyses)),
        sections=tuple(sections),
        figures=words,
    )
    return Composed(document, pictures)


_CURVES = (
    "Accuracy at a rung is on the rung's questions, the same in every trial but fewer than at the end, so that a curve "
    "compares with other curves and not with the tables. A point has no interval of its own."
)


def agreements(main: View, cheaper: Sequence[View]) -> tuple[RankAgreement, ...]:
    """Of every two fidelities on every benchmark that both have."""
    found = []
    for dear, cheap in combinations((main, *cheaper), 2):
        by_name = {analysis.scores.name: analysis for analysis in cheap.analyses}
        for analysis in dear.analyses:
            if analysis.scores.name in by_name:
                found.append(rank_agreement(by_name[analysis.scores.name], analysis))
    return tuple(item for item in found if item is not None)


def _tried(view: View) -> Iterator[Section]:
    study = view.study
    if study.design == "search":
        tables = tuple(best_table(study, analysis) for analysis in view.analyses if analysis.cells)
        yield Section("What was tried", (tried(study),), tables)


def _results(view: View) -> Iterator[Section]:
    study = view.study
    for analysis in view.analyses:
        yield Section(f"Every cell{view.on(analysis)}", tables=(cells_table(study, analysis),))
        # in a search hardly any cells match, which is said once and not pair by pair
        shown = [effect for effect in analysis.effects if effect.comparisons or study.design != "search"]
        tables = [effect_table(effect, study.where) for effect in shown]
        tables += _there((additive_table(study, analysis), interactions_table(study, analysis)))
        notes = design_notes(study, analysis)
        unmatched = [effect.factor for effect in analysis.effects if effect not in shown]
        if unmatched:
            notes += (f"No two levels of these factors share a cell and a seed: {', '.join(unmatched)}.",)
        if analysis.effects:
            yield Section(f"Effects of the factors{view.on(analysis)}", notes, tuple(tables))
        yield Section(f"By skill{view.on(analysis)}", tables=(skills_table(study, analysis),))


def _costs(view: View, found: Sequence[tuple[Analysis, Front]]) -> Section:
    study, tables, words = view.study, [], []
    for analysis in view.analyses:
        own = [front for other, front in found if other is analysis]
        joint = joint_front(study, analysis)
        if joint:
            tables.append(joint_table(study, analysis, own, joint))
        asked = [front for front in own if front.asked]
        tables += [front_table(study, analysis, front) for front in asked if len(front.steps) > 1]
        words += [dominating(study, analysis, front) for front in asked if len(front.steps) == 1]
    text = (
        "On a front no other cell is both cheaper and more accurate by its mean. Which cells are on it was found from "
        "these very accuracies: where the gain over the next cheaper cell is undecided, the dearer one may not belong. "
        "A cell's cost is the mean over its seeds. Seconds are as they were measured: trials that shared a GPU, ran on "
        "different ones or found features cached took other times for the same work."
    )
    return Section(f"Accuracy against cost{study.where}", (text, *words), tuple(tables), (COSTS,))


def _all_fidelities(main: View, cheaper: Sequence[View]) -> Iterator[Section]:
    study = main.study
    if study.design not in ("one_factor", "cells"):
        views = (main, *cheaper)
        tables = _there(importance_table(view.study, importances(view.study, view.analyses)) for view in views)
        if tables:
            yield Section("Importance of the factors", tables=tables)
    if study.several:
        found = (fidelity_table(study), ranks_table(agreements(main, cheaper)))
        yield Section("Fidelities", tables=_there(found))


def _left_out(study: Study) -> Iterator[Section]:
    pruned, skipped = pruned_table(study), skipped_table(study)
    if pruned is not None:
        yield Section("Pruned", tables=(pruned,))
    if skipped is not None:
        yield Section("Skipped", tables=(skipped,))
    if study.notes:
        yield Section("Notes of the plan", study.notes)


def _more_warnings(study: Study, analyses: Sequence[Analysis]) -> Iterator[str]:
    optimistic = curse(study, analyses)
    if optimistic is not None:
        yield optimistic
    for name in study.fidelities:
        note = study.unaligned(name)
        if note is not None:
            yield f"{note[:1].upper()}{note[1:]}."
    mixed = mixed_code(study)
    if mixed:
        yield f"Complete trials ran with different code, a rival explanation of any difference: {', '.join(mixed)}."


def _facts(study: Study, analyses: Sequence[Analysis]) -> tuple[tuple[str, str], ...]:
    done = len(study.complete)
    facts = [("trials", f"{done}" if study.planned is None else f"{done} of {study.planned}")]
    if study.several:
        facts.insert(0, ("fidelity", f"{study.fidelity}, of {', '.join(study.fidelities)}"))
    facts.append(("seeds", str(len({trial.seed for trial in study.complete}))))
    if len(analyses) == 1:
        scores = analyses[0].scores
        facts += [("questions", fmt.count(len(scores.questions))), ("images", fmt.count(scores.images))]
        facts.append(("chance", fmt.percent(float(scores.chance.mean()))))
    elif analyses:
        facts.append(("benchmarks", str(len(analyses))))
    return tuple(facts)


def _there(tables: Iterator[Table | None] | Sequence[Table | None]) -> tuple[Table, ...]:
    return tuple(table for table in tables if table is not None)
