"""What to run next in a search: Optuna proposes cells, and the best of them go on to the next fidelity."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from chiasm.errors import ConfigError
from chiasm_experiments.study.cells import BASE, Cell, Skipped, Trial
from chiasm_experiments.study.config import Study, StudyConfig
from chiasm_experiments.study.folder import STUDY, TRIALS
from chiasm_experiments.study.objective import finite, front, mean_values, values_of
from chiasm_experiments.study.promotion import best, key_of, standings
from chiasm_experiments.study.record import (
    ADDED,
    FINISHED,
    LEVELS,
    REPEATED,
    SKIPPED,
    TRIAL,
    WARM,
    Record,
    content_of,
)
from chiasm_experiments.study.settings import Range
from chiasm_experiments.study.source import Makers, Say
from chiasm_experiments.training.files import MANIFEST, read_json

FRUITLESS, RANDOM_AFTER = 100, 20
"""So many proposals in a row that run nothing end a search; after the fewer of them cells are drawn at random."""


class Search:
    """Proposes the trials of a search.

    Args:
        study: as its file has it.
        makers: of its cells.
        say: takes lines for the user.
    """

    def __init__(self, study: Study, makers: Makers, say: Say) -> None:
        self.study = study
        self.config = study.config
        self.makers = makers
        self.say = say
        self.record: Record | None = None

    def begin(self, record: Record) -> None:
        """Takes the record, once the study's folder is open, and earlier studies' trials into it."""
        self.record = record
        with record.lock:
            for folder in self.config.warm_start:
                self._warm(folder)

    def plan(self) -> None:
        """What goes on to the next fidelity: by successive halving while results come, and at least one at the end."""
        record = self._record()
        if len(record.fidelities) == 1:
            return
        with record.lock:
            ended = self.spent
            for fidelity, following in itertools.pairwise(record.fidelities):
                cells = standings(record.latest(fidelity))
                ended = ended and all(cell.ended for cell in cells)
                known = {key_of(trial.user_attrs[LEVELS]) for trial in record.trials(following)}
                for levels in best(cells, self.config, at_least=int(ended and not known)):
                    if key_of(levels) not in known:
                        self._promote(levels, following)

    def propose(self) -> optuna.Trial | None:
        """A new trial, running and this driver's.

        The sampler is made anew for each, from the study's seed and the trial's number, so that a search that was
        interrupted proposes what it would have.
        """
        record = self._record()
        while True:
            with record.lock:
                study = record.studies[record.fidelities[0]]
                if self.spent or study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                    return None
                fruitless = self._fruitless(study)
                number = len(study.get_trials(deepcopy=False))
                study.sampler = make_sampler(self.config, number, at_random=fruitless >= RANDOM_AFTER)
                made = self._complete(record.hold(study.ask()))
            if made is not None:
                return made
            if fruitless + 1 == FRUITLESS:
                self.say(f"the search ends early: {FRUITLESS} proposals in a row were nothing new that can run")

    def resume(self, unfinished: optuna.Trial) -> optuna.Trial | None:
        """Ends what a driver that died began to propose."""
        if TRIAL in unfinished.user_attrs:
            return unfinished
        with self._record().lock:
            study = unfinished.study
            at_random = self._fruitless(study) >= RANDOM_AFTER
            study.sampler = make_sampler(self.config, unfinished.number, at_random=at_random)
            return self._complete(unfinished)

    def trial(self, frozen: FrozenTrial) -> Trial | None:
        """What one of Optuna's trials runs; None where the study has no such run any more."""
        trial = self.makers.trial(frozen)
        return trial if trial is not None and trial.seed in self.config.seeds else None

    def params(self, trial: Trial) -> dict[str, Any]:
        """The factors that vary in the trial's cell."""
        return dict(self.makers.at(trial.cell.fidelity).read(trial.cell.levels))

    def confirm(self, seeds: Sequence[int]) -> None:
        """Puts the best cells so far in line with further seeds, at the last fidelity that any was finished at."""
        record = self._record()
        with record.lock:
            for fidelity in reversed(record.fidelities):
                known = [(cell, values) for cell in standings(record.latest(fidelity)) if (values := cell.values)]
                if not known:
                    continue
                for place in front([values for _, values in known], self.config.objective):
                    made = self.makers.cell(known[place][0].levels, fidelity)
                    assert isinstance(made, Cell)
                    for seed in seeds:
                        trial = Trial(made, seed)
                        record.add(trial, self.params(trial), {ADDED: True})
                return
            raise ConfigError("--add-seeds: the search has no finished trial yet whose cell could get further seeds")

    def _complete(self, asked: optuna.Trial) -> optuna.Trial | None:
        """Asks the sampler for the levels, and gives the trial the next seed of its cell; None: it is not to be run."""
        record = self._record()
        maker = self.makers.at(record.fidelities[0])

        def suggest(path: str, choices: Sequence[str] | Range) -> str | int | float:
            value: str | int | float
            if not isinstance(choices, Range):
                value = asked.suggest_categorical(path, choices)
            elif choices.whole:
                value = asked.suggest_int(path, int(choices.low), int(choices.high), log=choices.log)
            else:
                value = asked.suggest_float(path, choices.low, choices.high, log=choices.log)
            return value

        chosen = maker.space.draw(suggest)
        try:
            cell = maker.make(chosen)
        except ConfigError as error:
            cell = maker.broken(chosen, error)
        if isinstance(cell, Skipped):
            record.end(asked, TrialState.FAIL, attributes={SKIPPED: list(cell.reasons), LEVELS: dict(cell.levels)})
            return None
        return self._repeat(asked, cell)

    def _repeat(self, asked: optuna.Trial, cell: Cell) -> optuna.Trial | None:
        record = self._record()
        latest = record.latest(cell.fidelity)
        earlier = {seed: latest.get(content_of(Trial(cell, seed).name)) for seed in self.config.seeds}
        failed = [trial for trial in earlier.values() if trial is not None and trial.state == TrialState.FAIL]
        free = [seed for seed, trial in earlier.items() if trial is None]
        if free and not failed:
            attributes = record.attributes(Trial(cell, free[0]))
            name = attributes.pop(TRIAL)
            for key, value in attributes.items():
                asked.set_user_attr(key, value)
            asked.set_user_attr(TRIAL, name)  # last: with it the proposal is whole
            return asked
        rows = [trial.values for trial in earlier.values() if trial is not None and trial.state == TrialState.COMPLETE]
        if rows and not failed:
            record.end(asked, TrialState.COMPLETE, mean_values(rows), {REPEATED: cell.label})
        else:
            why = "it failed before" if failed else "every seed of it was pruned, or runs"
            record.end(asked, TrialState.FAIL, attributes={SKIPPED: [why], LEVELS: dict(cell.levels)})
        return None

    @property
    def spent(self) -> bool:
        """Whether no further trial is to be proposed."""
        record, trials = self._record(), self.config.search.trials
        if self._fruitless(record.studies[record.fidelities[0]]) >= FRUITLESS:
            return True
        if trials is None:
            return False
        latest = record.latest(record.fidelities[0]).values()
        return sum(ADDED not in trial.user_attrs for trial in latest) >= trials

    @staticmethod
    def _fruitless(study: optuna.Study) -> int:
        """How many of the newest proposals ran nothing."""
        count = 0
        for trial in reversed(study.get_trials(deepcopy=False)):
            if trial.state in FINISHED and {SKIPPED, REPEATED} & trial.user_attrs.keys():
                count += 1
            elif TRIAL in trial.user_attrs or WARM in trial.user_attrs:
                break
        return count

    def _promote(self, levels: Mapping[str, str], following: str) -> None:
        record = self._record()
        cell = self.makers.cell(levels, following)
        if not isinstance(cell, Cell):
            reasons = "; ".join(cell.reasons) if cell is not None else "no such levels"
            self.say(f"not promoted to {following}, as it cannot run there: {', '.join(levels.values())}: {reasons}")
            return
        trial = Trial(cell, self.config.seeds[0])
        record.add(trial, self.params(trial))
        self.say(f"on to {following}: {cell.label}")

    def _warm(self, folder: Path) -> None:
        """Takes the finished trials of an earlier study whose levels this one has, too."""
        record, name = self._record(), folder.name
        if not (folder / STUDY).is_file():
            raise ConfigError(f"warm_start: {str(folder)!r} holds no study; name the folder of a study's results")
        description = read_json(folder / STUDY)
        study = record.studies[record.fidelities[0]]
        present = {trial.user_attrs.get(WARM) for trial in study.get_trials(deepcopy=False)}
        whole = (description.get("fidelities") or [None])[-1]
        count = fit = 0
        for trial, about in description.get("trials", {}).items():
            file = folder / TRIALS / trial / MANIFEST
            if (whole is not None and about.get("fidelity") != whole) or not file.is_file():
                continue
            manifest = read_json(file)
            if manifest.get("status") != "complete":
                continue
            count += 1
            found = self._known(about["levels"], description["factors"], manifest, folder / TRIALS / trial)
            if found is None:
                continue
            fit += 1
            params, values = found
            if f"{name}/{trial}" not in present:
                study.add_trial(
                    optuna.create_trial(
                        state=TrialState.COMPLETE,
                        values=values,
                        params=params,
                        distributions={path: record.distributions[path] for path in params},
                        user_attrs={WARM: f"{name}/{trial}"},
                    )
                )
        self.say(f"warm start: {fit} of {count} finished trials of {name} fit this search")

    def _known(
        self, levels: Mapping[str, str], factors: Mapping[str, Any], manifest: Mapping[str, Any], folder: Path
    ) -> tuple[dict[str, Any], list[float]] | None:
        """The parameters and values of an earlier trial in this search; None where it does not fit."""
        others = levels.keys() - self.config.factors.keys()
        if any(levels[path] != BASE and len(factors.get(path, ())) != 1 for path in others):
            return None  # it has a level of a factor that this study does not know
        maker = self.makers.at(self._record().fidelities[0])
        try:
            chosen = maker.read({path: label for path, label in levels.items() if path in self.config.factors})
            params = maker.space.draw(lambda path, choices: chosen[path])
            cell = maker.make(params)
        except (ConfigError, KeyError):
            return None
        if not isinstance(cell, Cell):
            return None
        values = values_of(self.config.objective, manifest, cell.plan, folder)
        return (params, values) if values is not None and finite(values) else None

    def _record(self) -> Record:
        assert self.record is not None
        return self.record


def make_sampler(config: StudyConfig, number: int, *, at_random: bool = False) -> BaseSampler:
    """Optuna's sampler for one proposal.

    Args:
        config: of the study.
        number: of the trial that is proposed.
        at_random: whatever the study asks for.
    """
    search, seed = config.search, config.search.seed + number
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        match "random" if at_random else search.sampler:
            case "tpe":
                return TPESampler(
                    n_startup_trials=search.startup, multivariate=True, group=True, constant_liar=True, seed=seed
                )
            case "gp":
                return GPSampler(n_startup_trials=search.startup, deterministic_objective=False, seed=seed)
            case "nsga2":
                return NSGAIISampler(population_size=max(2, search.startup), seed=seed)
    return RandomSampler(seed=seed)
