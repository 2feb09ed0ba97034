"""What to run next where cells are listed: each with every seed, and the best of them again at the next fidelity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import optuna
from optuna.trial import FrozenTrial

from chiasm.cost import SampleSize
from chiasm.errors import ConfigError
from chiasm_experiments.study.cells import Cell, Skipped, Trial
from chiasm_experiments.study.config import Study
from chiasm_experiments.study.maker import Maker
from chiasm_experiments.study.promotion import best, key_of, standings
from chiasm_experiments.study.record import FIDELITY, LEVELS, OPEN, SEED, TRIAL, Record, content_of

Say = Callable[[str], None]


class Source(Protocol):
    """Says what to run next; called by one driver at a time for each of its methods that add trials."""

    def plan(self) -> None:
        """Puts in line what the results so far call for."""

    def propose(self) -> optuna.Trial | None:
        """A new trial, running and this driver's; None where none is to be proposed now."""
        ...

    def resume(self, unfinished: optuna.Trial) -> optuna.Trial | None:
        """Ends what a driver that died began to propose; None where it came to nothing."""
        ...

    def trial(self, frozen: FrozenTrial) -> Trial | None:
        """What one of Optuna's trials runs; None where the study has no such run any more."""
        ...

    def params(self, trial: Trial) -> dict[str, Any]:
        """A trial's factors as Optuna has them."""
        ...


class Makers:
    """Cells from their levels, at every fidelity.

    Args:
        study: as its file has it.
    """

    sample = SampleSize()

    def __init__(self, study: Study) -> None:
        self.study = study
        self._makers: dict[str, Maker] = {}
        self._cells: dict[tuple[str, str], Cell | Skipped] = {}

    def at(self, fidelity: str) -> Maker:
        """The maker of a fidelity."""
        if fidelity not in self._makers:
            self._makers[fidelity] = Maker(self.study, fidelity, self.sample)
        return self._makers[fidelity]

    def cell(self, levels: Mapping[str, str], fidelity: str) -> Cell | Skipped | None:
        """The cell of some levels; None where the study has not got these levels."""
        key = (key_of(levels), fidelity)
        if key not in self._cells:
            maker = self.at(fidelity)
            try:
                chosen = maker.read(levels)
            except ConfigError:
                return None
            try:
                self._cells[key] = maker.make(chosen)
            except ConfigError as error:
                self._cells[key] = maker.broken(chosen, error)
        return self._cells[key]

    def trial(self, frozen: FrozenTrial) -> Trial | None:
        """What one of Optuna's trials runs; None where the study has no such run any more."""
        attributes = frozen.user_attrs
        if attributes[FIDELITY] not in self.study.config.fidelities and self.study.config.fidelities:
            return None
        cell = self.cell(attributes[LEVELS], attributes[FIDELITY])
        if not isinstance(cell, Cell):
            return None
        trial = Trial(cell, attributes[SEED])
        return trial if content_of(trial.name) == content_of(attributes[TRIAL]) else None


class Listed:
    """The trials of a design that lists them.

    Args:
        planned: for each fidelity what it would be to run every cell at it, in order.
        say: takes lines for the user.
    """

    def __init__(self, planned: Mapping[str, Sequence[Trial]], say: Say) -> None:
        self.planned = {fidelity: list(trials) for fidelity, trials in planned.items()}
        self.say = say
        self.by_content = {content_of(trial.name): trial for trials in planned.values() for trial in trials}
        self.record: Record | None = None

    def begin(self, record: Record) -> None:
        """Takes the record, once the study's folder is open."""
        self.record = record

    def plan(self) -> None:
        """The first fidelity's trials, and those of the next ones as soon as all before have ended."""
        record = self._record()
        with record.lock:
            wanted: Sequence[Trial] = self.planned[record.fidelities[0]]
            for place, fidelity in enumerate(record.fidelities):
                latest = record.latest(fidelity)
                for trial in wanted:
                    if content_of(trial.name) not in latest:
                        record.add(trial, self.params(trial))
                        latest[content_of(trial.name)] = record.trials(fidelity)[-1]
                if place + 1 == len(record.fidelities) or any(trial.state in OPEN for trial in latest.values()):
                    return
                wanted = self._promoted(fidelity, record.fidelities[place + 1])

    def _promoted(self, fidelity: str, following: str) -> list[Trial]:
        record = self._record()
        levels = best(standings(record.latest(fidelity)), record.config, at_least=1)
        keys = {key_of(item) for item in levels}
        chosen = [trial for trial in self.planned[following] if key_of(trial.cell.levels) in keys]
        known = record.latest(following)
        if any(content_of(trial.name) not in known for trial in chosen):
            cells = dict.fromkeys(trial.cell.label for trial in chosen)
            self.say(f"fidelity {fidelity} is finished; on to {following}: {'; '.join(cells)}")
        return chosen

    def propose(self) -> optuna.Trial | None:
        """Nothing: all that there is was listed."""
        return None

    def resume(self, unfinished: optuna.Trial) -> optuna.Trial | None:
        """Nothing is ever half proposed."""
        return unfinished

    def trial(self, frozen: FrozenTrial) -> Trial | None:
        """What one of Optuna's trials runs."""
        return self.by_content.get(content_of(frozen.user_attrs[TRIAL]))

    def params(self, trial: Trial) -> dict[str, Any]:
        """Every factor, with the base run's own value as a level."""
        return dict(trial.cell.levels)

    def _record(self) -> Record:
        assert self.record is not None
        return self.record
