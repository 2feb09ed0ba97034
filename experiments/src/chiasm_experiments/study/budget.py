"""What a study may cost, and when it has cost that."""

from __future__ import annotations

from chiasm_experiments.study.record import COST, Record
from chiasm_experiments.study.settings import Budget


def spent_hours(record: Record) -> float:
    """GPU-hours of all trials so far; where trials have no GPU, CPU-hours. Those that run count when they end."""
    trials = [trial for study in record.studies.values() for trial in study.get_trials(deepcopy=False)]
    return record.spent_before + sum(float(trial.user_attrs.get(COST, 0.0)) for trial in trials)


def exceeded(budget: Budget, record: Record) -> str | None:
    """Why no further trial is to start; None while there is something left."""
    if budget == Budget():
        return None
    hours = spent_hours(record)
    if budget.gpu_hours is not None and hours >= budget.gpu_hours:
        return f"the budget of {budget.gpu_hours:g} GPU-hours is spent: {hours:.3g}"
    if budget.money is not None and budget.price_per_gpu_hour is not None:
        money = hours * budget.price_per_gpu_hour
        if money >= budget.money:
            return f"the budget of {budget.money:g} is spent: {money:.3g} for {hours:.3g} GPU-hours"
    return None
