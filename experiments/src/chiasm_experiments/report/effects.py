"""Which levels are compared: every pair of a factor's levels on matched cells, and the strongest factor by skill."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from chiasm.errors import DataError
from chiasm_experiments.report.additive import AdditiveFit, additive_fit
from chiasm_experiments.report.cells import (
    SIGNIFICANCE,
    CellResult,
    ControlResult,
    cell_key,
    cell_results,
    control_result,
    runs_of,
)
from chiasm_experiments.report.interactions import Interaction, interactions
from chiasm_experiments.report.pairing import cell_interval, paired_difference
from chiasm_experiments.report.statistics import Interval, Verdict, holm
from chiasm_experiments.report.study import Study, Trial
from chiasm_experiments.report.table import BenchmarkScores

MAX_SKILL_COLUMNS = 6


@dataclass(frozen=True, slots=True)
class Comparison:
    """Level `a` minus level `b` of one factor; `p_holm` is adjusted over all pairs of the factor."""

    a: str
    b: str
    difference: Interval
    p_holm: float

    @property
    def verdict(self) -> Verdict:
        return self.difference.verdict

    @property
    def survives(self) -> bool:
        """Decided, and still so after Holm's adjustment."""
        return self.verdict != "undecided" and self.p_holm <= SIGNIFICANCE

    def reversed(self) -> Comparison:
        d = self.difference
        flipped = Interval(
            -d.estimate, -d.high, -d.low, d.se, d.p_value, d.seeds, d.questions, d.images, d.cells, d.excluded,
            d.runs_left_out,
        )  # fmt: skip
        return Comparison(self.b, self.a, flipped, self.p_holm)


@dataclass(frozen=True, slots=True)
class FactorEffect:
    """All comparisons of one factor.

    Args:
        levels: those with a score, in the order of the plan.
        control: the control's label where this is its factor.
        comparisons: later level minus earlier one, the control always subtracted; the whole Holm family.
        unmatched: pairs without a cell and seed in common.
        best: the level, other than the control, with the highest mean difference to the others; None with fewer than
            two of them that can be compared.
    """

    factor: str
    levels: tuple[str, ...]
    control: str | None
    comparisons: tuple[Comparison, ...]
    unmatched: tuple[tuple[str, str], ...]
    best: str | None

    def against(self, level: str) -> tuple[Comparison, ...]:
        """`level` minus each level it was compared with."""
        turned = (
            item if item.a == level else item.reversed() for item in self.comparisons if level in (item.a, item.b)
        )
        return tuple(turned)


@dataclass(frozen=True, slots=True)
class SkillTable:
    """Accuracy by skill for the levels of one factor (or for cells, where `factor` is None).

    Args:
        rows: for each skill its name, mean chance, number of questions and an interval for each column.
    """

    factor: str | None
    columns: tuple[str, ...]
    rows: tuple[tuple[str, float, int, tuple[Interval | None, ...]], ...]


@dataclass(frozen=True, slots=True)
class Analysis:
    """Everything that is computed for one benchmark at one fidelity.

    Args:
        interactions: where four cells of two factors differ in nothing else.
        additive: for pairwise designs, in which hardly any cells match.
        fidelity: at which all of it was run; None where the study knows of none.
    """

    scores: BenchmarkScores
    cells: tuple[CellResult, ...]
    control: ControlResult | None
    effects: tuple[FactorEffect, ...]
    skills: SkillTable
    interactions: tuple[Interaction, ...] = ()
    additive: AdditiveFit | None = None
    fidelity: str | None = None


def analyse(study: Study, scores: BenchmarkScores) -> Analysis:
    """Computes all intervals of one benchmark.

    Raises:
        DataError: two trials were asked different questions.
    """
    cells = cell_results(study, scores)
    effects = tuple(factor_effect(study, scores, factor) for factor in study.varied)
    effects = tuple(effect for effect in effects if len(effect.levels) > 1)
    return Analysis(
        scores=scores,
        cells=cells,
        control=control_result(study, scores, cells),
        effects=effects,
        skills=_skills(study, scores, cells, effects),
        interactions=interactions(study, scores),
        additive=additive_fit(study, scores) if study.design == "pairwise" else None,
        fidelity=study.fidelity,
    )


def factor_effect(study: Study, scores: BenchmarkScores, factor: str) -> FactorEffect:
    """Compares every pair of levels.

    Control trials take part in the control's own factor only: an arm that cannot see is indifferent to, say, the
    adapter, and would dilute every other factor's effect.
    """
    by_level = _levels(study, scores, factor)
    control = study.control.label if study.control is not None and study.control.path == factor else None
    base = _base(study, scores, factor) if study.design == "one_factor" else None
    order = sorted(by_level, key=lambda level: (level != control, level != base, study.factors[factor].index(level)))
    found: list[tuple[str, str, Interval]] = []
    unmatched = []
    for b, a in combinations(order, 2):
        try:
            difference = paired_difference(
                runs_of(scores, by_level[a], factor, f"{factor}={a}"),
                runs_of(scores, by_level[b], factor, f"{factor}={b}"),
            )
        except DataError:  # the questions are equal by now, so no cell or no score is in common
            unmatched.append((a, b))
        else:
            found.append((a, b, difference))
    adjusted = holm([difference.p_value for *_, difference in found])
    comparisons = tuple(
        Comparison(a, b, difference, float(p)) for (a, b, difference), p in zip(found, adjusted, strict=True)
    )
    effect = FactorEffect(factor, tuple(order), control, comparisons, tuple(unmatched), None)
    return FactorEffect(factor, effect.levels, control, comparisons, effect.unmatched, _best(effect))


def _base(study: Study, scores: BenchmarkScores, factor: str) -> str | None:
    """In a one-factor design the level at which this factor stands while others vary; None where no other does."""
    cells = {cell_key(trial.cell): trial.cell[factor] for trial in scores.trials}
    (level, count), *_ = Counter(cells.values()).most_common(1)
    return level if count > 1 else None


def _levels(study: Study, scores: BenchmarkScores, factor: str) -> dict[str, list[Trial]]:
    own = study.control is not None and study.control.path == factor
    by_level: dict[str, list[Trial]] = {}
    for trial in scores.trials:
        if own or not study.is_control(trial.cell):
            by_level.setdefault(trial.cell[factor], []).append(trial)
    return by_level


def _best(effect: FactorEffect) -> str | None:
    means = {}
    for level in effect.levels:
        if level != effect.control:
            others = [item.difference.estimate for item in effect.against(level) if item.b != effect.control]
            if others:
                means[level] = float(np.mean(others))
    return max(means, key=lambda level: means[level]) if means else None


def _skills(
    study: Study, scores: BenchmarkScores, cells: Sequence[CellResult], effects: Sequence[FactorEffect]
) -> SkillTable:
    """By level of the factor with the largest effect, on the runs that all its levels have; else by cell."""
    groups: dict[str, list[Trial]] = {}
    strongest = max(effects, key=_strength, default=None)
    factor = None if strongest is None else strongest.factor
    if strongest is not None and factor is not None:
        by_level = _levels(study, scores, factor)
        runs = {level: runs_of(scores, by_level[level], factor, level) for level in strongest.levels}
        common = set.intersection(*(set(item.keys) for item in runs.values()))
        for level in strongest.levels:
            keys = runs[level].keys
            groups[level] = [trial for trial, key in zip(by_level[level], keys, strict=True) if key in common]
        if not common or len(groups) > MAX_SKILL_COLUMNS:
            factor = None
    if factor is None:
        shown = [cell for cell in cells if not cell.is_control][: MAX_SKILL_COLUMNS - 1]
        shown += [cell for cell in cells if cell.is_control][:1]
        groups = {cell.label: list(cell.trials) for cell in shown}
    rows = []
    for skill in sorted(set(scores.skills)):
        mask = scores.skills == skill
        intervals = tuple(_interval(scores, trials, factor, mask) for trials in groups.values())
        rows.append((str(skill), float(scores.chance[mask].mean()), int(mask.sum()), intervals))
    return SkillTable(factor, tuple(groups), tuple(rows))


def _strength(effect: FactorEffect) -> tuple[bool, float]:
    """Factors with two real levels first: that anything beats an image-blind arm is no finding."""
    real = [abs(item.difference.estimate) for item in effect.comparisons if item.b != effect.control]
    return bool(real), max(real, default=max((abs(i.difference.estimate) for i in effect.comparisons), default=0.0))


def _interval(
    scores: BenchmarkScores, trials: Sequence[Trial], factor: str | None, mask: np.typing.NDArray[np.bool_]
) -> Interval | None:
    try:
        return cell_interval(runs_of(scores, trials, factor, "skill", mask))
    except DataError:
        return None
