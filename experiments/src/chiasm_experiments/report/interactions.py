"""Whether the effect of one factor depends on another: differences of differences on matched cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from chiasm.errors import DataError
from chiasm_experiments.report.cells import SIGNIFICANCE, cell_key
from chiasm_experiments.report.pairing import Runs, contrast
from chiasm_experiments.report.statistics import Interval, holm
from chiasm_experiments.report.study import Study, Trial
from chiasm_experiments.report.table import BenchmarkScores


@dataclass(frozen=True, slots=True)
class Interaction:
    """By how much the step from `a[1]` to `a[0]` of one factor is larger at `b[0]` of another than at `b[1]`.

    Args:
        factors: the two.
        a: two levels of the first factor.
        b: two levels of the second.
        difference: (a0 b0 - a1 b0) - (a0 b1 - a1 b1), over matched cells of all other factors, seeds and questions.
        p_holm: adjusted over all contrasts of all pairs of factors.
    """

    factors: tuple[str, str]
    a: tuple[str, str]
    b: tuple[str, str]
    difference: Interval
    p_holm: float

    @property
    def survives(self) -> bool:
        """Decided, and still so after Holm's adjustment."""
        return self.difference.verdict != "undecided" and self.p_holm <= SIGNIFICANCE


def interactions(study: Study, scores: BenchmarkScores) -> tuple[Interaction, ...]:
    """Every two levels of one factor with every two of another, where some cells have all four combinations.

    The control takes no part: what it does not see has no effect there, so that every other effect would interact.
    """
    trials = [trial for trial in scores.trials if not study.is_control(trial.cell)]
    found = []
    for first, second in combinations(study.varied, 2):
        runs = _by_levels(study, scores, trials, first, second)
        for a1, a0 in combinations(_order(study, first, {a for a, _ in runs}), 2):
            for b1, b0 in combinations(_order(study, second, {b for _, b in runs}), 2):
                corners = ((1.0, (a0, b0)), (-1.0, (a1, b0)), (-1.0, (a0, b1)), (1.0, (a1, b1)))
                if all(corner in runs for _, corner in corners):
                    try:
                        difference = contrast([(sign, runs[corner]) for sign, corner in corners])
                    except DataError:  # the four corners share no cell and seed
                        continue
                    found.append(((first, second), (a0, a1), (b0, b1), difference))
    adjusted = holm([difference.p_value for *_, difference in found])
    return tuple(Interaction(*item, float(p)) for item, p in zip(found, adjusted, strict=True))


def _order(study: Study, factor: str, levels: set[str]) -> list[str]:
    return sorted(levels, key=study.factors[factor].index)


def _by_levels(
    study: Study, scores: BenchmarkScores, trials: Sequence[Trial], first: str, second: str
) -> dict[tuple[str, str], Runs]:
    """The runs of each two levels, keyed by their cell without the two factors."""
    groups: dict[tuple[str, str], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.cell[first], trial.cell[second]), []).append(trial)
    found = {}
    for levels, own in groups.items():
        rest = [{path: label for path, label in trial.cell.items() if path not in (first, second)} for trial in own]
        name = f"{study.short[first]}={levels[0]}, {study.short[second]}={levels[1]}"
        found[levels] = scores.runs(own, [cell_key(cell) for cell in rest], name)
    return found
