"""How much of the spread of accuracies each factor accounts for, by two evaluators of Optuna side by side.

fANOVA (Hutter, Hoos and Leyton-Brown 2014) fits a forest to all trials and takes the share of its variance that a
factor explains alone; PED-ANOVA (Watanabe, Bansal and Hutter 2023) tells how the best trials' levels differ from all
trials'. The second gives a factor without effect a share of its own, so it is never shown alone. Both are computed
anew on cells drawn with replacement, which tells how far they depend on the cells that happened to be tried.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from chiasm_experiments.report.cells import cell_key
from chiasm_experiments.report.effects import Analysis
from chiasm_experiments.report.study import Study, Trial

MIN_TRIALS = 30
DRAWS = 40
TREES = 16
BEST = 5
"""Trials that PED-ANOVA looks at, at least."""

Shares = tuple[float, float, float]
"""Over all trials, and the 2.5% and 97.5% quantiles over the draws of cells."""


@dataclass(frozen=True, slots=True)
class Importance:
    """Of one factor; None where Optuna's evaluator says nothing of it."""

    factor: str
    fanova: Shares
    ped_anova: Shares


def importances(study: Study, analyses: Sequence[Analysis], seed: int = 0) -> tuple[Importance, ...]:
    """The factors by fANOVA, the most important first; empty with fewer than 30 complete trials or two factors.

    The value of a trial is its accuracy, the mean over benchmarks; trials of the control are left out.

    Args:
        study: seen at the fidelity of the analyses.
        analyses: of all benchmarks.
        seed: of the forest and the draws.
    """
    values = _values(study, analyses)
    trials = [trial for trial in study.complete if trial.folder.name in values]
    names = [path for path in study.named if len({trial.cell[path] for trial in trials}) > 1]
    if len(trials) < MIN_TRIALS or len(names) < 2:
        return ()
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(cell_key(trial.cell), []).append(trial)
    cells = list(groups.values())
    rng = np.random.default_rng(seed)
    draws = [
        [trial for place in rng.integers(len(cells), size=len(cells)) for trial in cells[place]] for _ in range(DRAWS)
    ]
    whole = _evaluate(study, trials, names, values, seed)
    others = [_evaluate(study, drawn, names, values, seed) for drawn in draws]
    found = [
        Importance(name, *(_spread(whole[k][name], [item[k].get(name, 0.0) for item in others]) for k in (0, 1)))
        for name in names
    ]
    return tuple(sorted(found, key=lambda item: -item.fanova[0]))


def _values(study: Study, analyses: Sequence[Analysis]) -> dict[str, float]:
    """By trial its accuracy over all benchmarks; without the control's trials."""
    found: dict[str, list[float]] = {}
    for analysis in analyses:
        for trial, scores in zip(analysis.scores.trials, analysis.scores.scores, strict=True):
            if not study.is_control(trial.cell):
                found.setdefault(trial.folder.name, []).append(float(np.nanmean(scores)))
    return {name: fmean(means) for name, means in found.items() if len(means) == len(analyses)}


def _evaluate(
    study: Study, trials: Sequence[Trial], names: Sequence[str], values: Mapping[str, float], seed: int
) -> tuple[dict[str, float], dict[str, float]]:
    """The shares of all factors by fANOVA and by PED-ANOVA."""
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator, get_param_importances

    varied = [name for name in names if len({trial.cell[name] for trial in trials}) > 1]
    encoded = {name: _encoded(study, trials, name) for name in varied}
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            record = optuna.create_study(direction="maximize")
            record.add_trials(
                optuna.create_trial(
                    value=values[trial.folder.name],
                    params={name: encoded[name][0][place] for name in varied},
                    distributions={name: encoded[name][1] for name in varied},
                )
                for place, trial in enumerate(trials)
            )
            best = min(max(0.1, BEST / len(trials)), 0.5)
            return tuple(  # type: ignore[return-value]
                {name: float(share) for name, share in get_param_importances(record, evaluator=evaluator).items()}
                for evaluator in (
                    FanovaImportanceEvaluator(n_trees=TREES, seed=seed),
                    PedAnovaImportanceEvaluator(target_quantile=best),
                )
            )
    finally:
        optuna.logging.set_verbosity(verbosity)


def _encoded(study: Study, trials: Sequence[Trial], name: str) -> tuple[list[str | float], object]:
    """A factor's values and Optuna's distribution of them; a number that does not vary in a cell is a level."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    numbers = [study.number(trial.cell, name) for trial in trials]
    if name in study.ranges and None not in numbers:
        known = [number for number in numbers if number is not None]
        numbers_of = study.ranges[name]
        low, high = min(numbers_of.low, *known), max(numbers_of.high, *known)
        return list(known), FloatDistribution(low, high, log=numbers_of.log)
    labels: list[str | float] = [trial.cell[name] for trial in trials]
    return labels, CategoricalDistribution(tuple(dict.fromkeys(map(str, labels))))


def _spread(whole: float, draws: Sequence[float]) -> Shares:
    low, high = np.quantile(draws, [0.025, 0.975])
    return whole, float(low), float(high)
