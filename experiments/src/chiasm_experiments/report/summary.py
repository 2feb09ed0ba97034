"""The answer in a few sentences, and the warnings that belong beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from chiasm_experiments.report import format as fmt
from chiasm_experiments.report.cells import ControlResult, cell_key
from chiasm_experiments.report.effects import Analysis, Comparison, FactorEffect
from chiasm_experiments.report.study import Study

FEW_IMAGES = 20


@dataclass(frozen=True, slots=True)
class Line:
    """One sentence or a few, after a lead that names what they are about."""

    lead: str
    text: str


def summary(study: Study, analyses: Sequence[Analysis]) -> tuple[Line, ...]:
    """For each factor its best level or `undecided`, then the control, then how much of the plan this rests on.

    All of it is said of one fidelity, that of the study as it is given.
    """
    lines = []
    for analysis in analyses:
        where = f"{analysis.scores.name}: " if len(analyses) > 1 else ""
        if study.design == "search" and analysis.cells and not analysis.cells[0].is_control:
            lines.append(Line(f"{where}best cell", _best(study, analysis)))
        lines += [
            Line(where + study.short[effect.factor], _factor(effect))
            for effect in analysis.effects
            # what a search proposes seldom matches; that nothing does is said once, in its section
            if effect.comparisons or study.design != "search"
        ]
        if not analysis.effects and analysis.cells and study.design != "search":
            best = analysis.cells[0]
            lines.append(Line(where + best.label, f"Scores {fmt.accuracy(best.accuracy)}; nothing was varied."))
        if analysis.control is not None:
            lines.append(Line(f"{where}control", _control(analysis.control, analysis)))
    lines.append(Line("trials", _trials(study, analyses)))
    if study.several:
        lines.insert(0, Line("fidelity", _fidelity(study)))
    return tuple(lines)


def warnings(study: Study, analyses: Sequence[Analysis]) -> tuple[str, ...]:
    """What a reader must know before believing a number."""
    found = []
    for analysis in analyses:
        name, control = analysis.scores.name, analysis.control
        if control is not None and control.leaks:
            cells = f" (above chance: {'; '.join(control.above)})" if control.above else ""
            found.append(
                f"{name} leaks: the image-blind control {control.label} scores above chance, "
                f"{fmt.difference(control.minus_chance)} points{cells}. Part of every accuracy below is gained without "
                "seeing; read the differences to the control, not the accuracies."
            )
        elif control is not None and control.verdict == "below chance":
            found.append(
                f"The control {control.label} scores below chance on {name}, {fmt.difference(control.minus_chance)} "
                "points: look at its unparsed answers before reading differences to it."
            )
        elif control is not None and control.checkpoints.low > 0:
            found.append(
                f"A leak of {name} is not excluded: over images alone the control's checkpoints score above chance, "
                f"{fmt.difference(control.checkpoints)} points; over seeds the interval includes 0."
            )
        found += _thin(analysis)
    if study.control is not None and analyses and all(analysis.control is None for analysis in analyses):
        found.append(f"No trial of the control {study.control.label} has a score, so leaks cannot be seen.")
    return tuple(found)


def _best(study: Study, analysis: Analysis) -> str:
    best = analysis.cells[0]
    seeds = fmt.number(len(best.trials), "seed")
    return f"{best.label} scores {fmt.accuracy(best.accuracy)} % with {seeds}, the most of {len(analysis.cells)} cells."


def _fidelity(study: Study) -> str:
    others = [name for name in study.finished if name != study.fidelity]
    text = f"All that follows was found at fidelity {study.fidelity}"
    if study.fidelity != study.fidelities[-1]:
        text += f", and nothing is complete at {study.fidelities[-1]} yet"
    return (
        f"{text}. {', '.join(others)} {'has' if len(others) == 1 else 'have'} tables below." if others else f"{text}."
    )


def _thin(analysis: Analysis) -> list[str]:
    name, found = analysis.scores.name, []
    if analysis.scores.images < FEW_IMAGES:
        images = fmt.number(analysis.scores.images, "image")
        found.append(f"{name} has only {images}: intervals by cluster are rough below {FEW_IMAGES}.")
    seeds = {cell.accuracy.seeds for cell in analysis.cells}
    if seeds == {1}:
        found.append(
            f"One seed on {name}: the variance between seeds is unknown. Every interval and verdict is about these "
            "checkpoints only, not about the components; train at least three seeds to compare components."
        )
    elif 1 in seeds:
        found.append(f"Some cells have one seed on {name}: their intervals leave out the variance between seeds.")
    if 2 in seeds:
        few = f"Two seeds on {name}" if max(seeds) == 2 else f"Some cells have two seeds on {name}; these"
        found.append(
            f"{few} say little about the variance between seeds: their standard error is multiplied by 12.7 in an "
            "interval; with three seeds by 4.3, with five by 2.8."
        )
    return found


def _factor(effect: FactorEffect) -> str:
    if not effect.comparisons:
        return "No two levels share a cell and a seed, so nothing can be compared."
    if effect.best is None:
        return _versus_control(effect)
    others = [item for item in effect.against(effect.best) if item.b != effect.control]
    closest = min(others, key=lambda item: (item.difference.estimate, item.b))
    if all(item.verdict == "better" for item in others):
        weak = "" if all(item.survives for item in others) else _not_after_holm(effect)
        rest = "" if len(others) == 1 else ", the closest"
        return f"{effect.best} is best, {_by(closest)} against {closest.b}{rest}{weak}."
    worse = [item for item in others if item.verdict == "worse"]
    if worse:  # possible only where pairs of levels match on different cells
        return (
            f"Undecided. {effect.best} has the highest mean difference to the other levels, yet on the cells that it "
            f"shares with {worse[0].b} it is worse by {_by(worse[0].reversed())}."
        )
    open_ = (item for item in others if item.verdict == "undecided")
    near, *more = sorted(open_, key=lambda item: item.difference.estimate)
    text = f"Undecided. {effect.best} leads {near.b} by {_by(near)}, an interval that includes 0"
    text += f" (as does its lead over {' and '.join(item.b for item in more)})" if more else ""
    beaten = [item for item in others if item.verdict == "better"]
    if beaten:
        least = min(beaten, key=lambda item: item.difference.estimate)
        names = ", ".join(item.b for item in beaten)
        text += f"; it is better than {names} ({'at least ' if len(beaten) > 1 else ''}{_by(least)})"
    return f"{text}."


def _versus_control(effect: FactorEffect) -> str:
    item = effect.comparisons[0]
    word = {"better": "better than", "worse": "worse than", "undecided": "not separated from"}[item.verdict]
    return f"{item.a} is {word} the control {item.b}: {_by(item)}."


def _not_after_holm(effect: FactorEffect) -> str:
    return f" (not all of it survives Holm's adjustment for {fmt.number(len(effect.comparisons), 'comparison')})"


def _by(item: Comparison) -> str:
    return f"{fmt.difference(item.difference)} points"


def _control(control: ControlResult, analysis: Analysis) -> str:
    text = (
        f"{control.label}, the image-blind arm, is {control.verdict}: {fmt.accuracy(control.accuracy)} %, "
        f"{fmt.difference(control.minus_chance)} points from chance"
    )
    if control.verdict == "at chance" and np.isfinite(control.minus_chance.high):
        text += f"; a leak of more than {fmt.points(max(control.minus_chance.high, 0.0))} points is ruled out"
    best = next((cell for cell in analysis.cells if cell.minus_control is not None), None)
    if best is not None:
        gain = fmt.difference(best.minus_control)
        text += f". The most accurate cell ({best.label}) is {gain} points from its control"
    return f"{text}."


def _trials(study: Study, analyses: Sequence[Analysis]) -> str:
    number = Counter(trial.status for trial in study.trials)
    done = len(study.complete)
    if study.planned is None:
        text = f"{done} complete"
        waiting = number["unfinished"]
    else:
        text = f"{done} of {study.planned} planned complete"
        ended = [trial for trial in study.trials if trial.cell and trial.status != "unfinished"]
        waiting = study.planned - len({(cell_key(trial.cell), trial.seed) for trial in ended})
    text += f", {number['pruned']} pruned" if number["pruned"] else ""
    text += f", {number['failed']} failed, {max(waiting, 0)} not finished"
    text += "" if done == study.planned else "; cells without a trial are missing from every table"
    asked = [
        f"{fmt.number(len(item.questions), 'question')} on {fmt.number(item.images, 'image')} of {item.name}"
        for item in (analysis.scores for analysis in analyses)
    ]
    seeds = fmt.number(len({trial.seed for trial in study.complete}), "seed")
    if len(study.fidelities) > 1:
        text = f"At fidelity {study.fidelity} (of {', '.join(study.fidelities)}): {text}"
    return f"{text}. {seeds}; {'; '.join(asked)}." if asked else f"{text}."
