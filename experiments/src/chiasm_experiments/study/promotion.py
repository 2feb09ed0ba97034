"""From one fidelity to the next: which cells go on, by what is known of them so far."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optuna.trial import FrozenTrial, TrialState

from chiasm_experiments.study.cells import promoted
from chiasm_experiments.study.config import StudyConfig
from chiasm_experiments.study.objective import mean_values, ranked
from chiasm_experiments.study.record import LEVELS, OPEN, WARM


def key_of(levels: Mapping[str, str]) -> str:
    """An identity of a cell at all fidelities."""
    return json.dumps(levels, sort_keys=True)


@dataclass(frozen=True, slots=True)
class Standing:
    """A cell at one fidelity.

    Args:
        levels: of the cell.
        trials: its newest trial for each seed.
    """

    levels: dict[str, str]
    trials: tuple[FrozenTrial, ...]

    @property
    def ended(self) -> bool:
        """Whether nothing of it waits or runs."""
        return not any(trial.state in OPEN for trial in self.trials)

    @property
    def values(self) -> list[float] | None:
        """The mean of each objective over the seeds that were finished; None without one."""
        rows = [trial.values for trial in self.trials if trial.state == TrialState.COMPLETE]
        return mean_values(rows) if rows else None


def standings(trials: Mapping[str, FrozenTrial]) -> list[Standing]:
    """The cells of some trials, in the order in which they were added.

    Args:
        trials: the newest of each run, at one fidelity.
    """
    cells: dict[str, list[FrozenTrial]] = {}
    for trial in trials.values():
        if WARM not in trial.user_attrs:
            cells.setdefault(key_of(trial.user_attrs[LEVELS]), []).append(trial)
    return [Standing(dict(own[0].user_attrs[LEVELS]), tuple(own)) for own in cells.values()]


def best(cells: Sequence[Standing], config: StudyConfig, *, at_least: int) -> list[dict[str, str]]:
    """The levels of the cells that go on, the best first, and behind them the controls that belong to them.

    The control competes with nobody: it goes along with the cells that differ from it in the control's factor alone, or
    where none does, the best of its kind goes.

    Args:
        cells: of one fidelity.
        config: of the study.
        at_least: how many go on where the share of those that ended is less.
    """
    controls = {key_of(cell.levels): cell for cell in cells if _is_control(cell.levels, config)}
    others = [cell for cell in cells if key_of(cell.levels) not in controls and cell.ended]
    count = promoted(len(others), config.promote) if at_least else int(len(others) * config.promote + 1e-9)
    chosen = [cell.levels for cell in _ranked(others, config)[: max(count, at_least)]]
    if not controls or not chosen:
        return chosen
    twins = [key_of({**levels, **config.control}) for levels in chosen]
    along = [controls[key].levels for key in dict.fromkeys(twins) if key in controls]
    if not along:
        along = [cell.levels for cell in _ranked([c for c in controls.values() if c.ended], config)[:1]]
    return [*chosen, *along]


def _ranked(cells: Sequence[Standing], config: StudyConfig) -> list[Standing]:
    known = [(cell, values) for cell in cells if (values := cell.values) is not None]
    return [known[place][0] for place in ranked([values for _, values in known], config.objective)]


def _is_control(levels: Mapping[str, str], config: StudyConfig) -> bool:
    return bool(config.control) and all(levels.get(path) == label for path, label in config.control.items())
