"""From levels to a cell: the base run with fields replaced, planned, and held against the constraints."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, Literal

from chiasm.config import RunConfig
from chiasm.cost import SampleSize
from chiasm.errors import ConfigError
from chiasm.plan import RunPlan, plan_run
from chiasm.yamlfile import Problem
from chiasm_experiments.study.cell import FULL, Cell, Skipped, number_of
from chiasm_experiments.study.config import Levels, Study, level_location
from chiasm_experiments.study.fields import Replacement, content, replaced, value_at
from chiasm_experiments.study.settings import Planned, Range, label_of
from chiasm_experiments.study.space import BASE, Chosen, Space

GIB = 2**30
CONNECTORS = {"fusion", "adapter", "tokens"}
"""What a stage of alignment trains: nothing but what stands between the frozen encoders and language model."""
UNPLANNED = ("data", "lr", "betas", "weight_decay", "epochs", "steps", "schedule", "warmup", "clip_norm")
"""Fields of a stage that no plan depends on."""


def fidelities(study: Study) -> tuple[str, ...]:
    """The names of a study's fidelities, from the cheapest to the whole."""
    return tuple(study.config.fidelities) or (FULL,)


class Maker:
    """Makes the cells of a study at one fidelity; models that are alike are planned once.

    Args:
        study: as its file gives it.
        fidelity: its name; None: the first, which is the cheapest.
        sample: the sample whose cost each plan estimates; None leaves the estimate out where no constraint needs it.

    Raises:
        ConfigError: there is no such fidelity, or it replaces a factor.
    """

    def __init__(self, study: Study, fidelity: str | None = None, sample: SampleSize | None = None) -> None:
        known = fidelities(study)
        if fidelity is not None and fidelity not in known:
            raise ConfigError(f"no fidelity {fidelity!r} in study {study.config.name!r}; fidelities: {list(known)}")
        self.study = study
        self.config = study.config
        self.fidelity = fidelity or known[0]
        costly = self.config.constraints.at_most.keys() & {"flops", "gpu_gib"}
        self.sample = sample or (SampleSize() if costly else None)
        self.fields = self.config.fidelities.get(self.fidelity, {})
        self._plans: dict[str, RunPlan] = {}
        for path in self.fields.keys() & self.config.factors.keys():
            place = ("fidelities", self.fidelity, path)
            message = "this is a factor; at this fidelity its levels would all be one"
            raise study.document.fail([Problem(place, message)])

    @cached_property
    def space(self) -> Space:
        """The factors, with the labels of the base run's own values."""
        return Space(self.config, self._base_labels())

    def read(self, levels: Mapping[str, Any]) -> Chosen:
        """Levels as a combination; those of factors that do not vary in it are left out.

        Args:
            levels: the label of each named factor, a number or its text for a range.

        Raises:
            ConfigError: there is no such factor, level or number.
        """
        chosen: Chosen = {}
        for path, given in levels.items():
            known = self.config.factors.get(path)
            if known is None:
                raise ConfigError(f"no factor {path!r}; factors: {list(self.config.factors)}")
            label = label_of(given)
            if isinstance(known, Range):
                if label != BASE:
                    chosen[path] = _in_range(path, given, known)
            elif label in known:
                chosen[path] = label
            elif label != BASE:
                raise ConfigError(f"factor {path!r} has no level {label!r}; levels: {list(known)}")
        return self.space.effective(chosen)

    def make(self, chosen: Chosen) -> Cell | Skipped:
        """The cell of a combination, or why there is none.

        Raises:
            ConfigError: with these levels there is no run; with the file, line and field of each problem.
        """
        excluded = self.space.excluded(chosen, self.config.factors)
        if excluded is not None:
            return self.skipped(self._labels(chosen), (excluded,), "constraint")
        run = self.run(chosen)
        levels, plan = self._labels(chosen), self._plan(run)
        unscored = () if run.evaluate else ("evaluate: no benchmark would score it; name one, say `evaluate: [world]`",)
        if problems := (*plan.problems, *unscored):
            return self.skipped(levels, problems, "plan")
        if beyond := tuple(self._beyond(plan)):
            return self.skipped(levels, beyond, "constraint")
        return Cell(levels, run, plan, self.fidelity)

    def skipped(self, levels: dict[str, str], reasons: tuple[str, ...], by: Literal["plan", "constraint"]) -> Skipped:
        """Levels that are in no cell."""
        return Skipped(levels, self.fidelity, reasons, by)

    def broken(self, chosen: Chosen, error: ConfigError) -> Skipped:
        """A combination with which there is no run."""
        return self.skipped(self._labels(chosen), tuple(str(error).splitlines()), "plan")

    def run(self, chosen: Chosen, *, whole: bool = False) -> RunConfig:
        """The run of a combination, at this fidelity or as a whole.

        Raises:
            ConfigError: a problem of the run, with file, line and field.
        """
        document = self.study.document
        fields = {} if whole else self.fields
        return replaced(
            self.study.base,
            [
                *(self._level(path, value) for path, value in chosen.items()),
                *(Replacement(path, fields[path], document, ("fidelities", self.fidelity, path)) for path in fields),
            ],
        )

    def aligns(self, run: RunConfig) -> bool:
        """Whether a stage of a run trains connectors alone."""
        return any(set(stage.train) <= CONNECTORS for stage in run.stages)

    def skips_alignment(self, chosen: Chosen, run: RunConfig) -> bool:
        """Whether this fidelity takes away the stage that trains connectors alone."""
        if self.aligns(run) or not any(path.partition(".")[0] == "stages" for path in self.fields):
            return False
        try:
            return self.aligns(self.run(chosen, whole=True))
        except ConfigError:  # a run at this fidelity alone
            return False

    def _level(self, path: str, value: str | int | float) -> Replacement:
        levels = self.config.factors[path]
        if isinstance(levels, Range):
            return Replacement(path, value, self.study.document, ("factors", path))
        label = str(value)
        place = level_location(self.study.document, path, label, levels)
        return Replacement(path, levels[label], self.study.document, place)

    def _plan(self, run: RunConfig) -> RunPlan:
        values = run.model_dump(mode="json", include={"vision", "llm", "tokens", "system"})
        stages = [stage.model_dump(mode="json", exclude=set(UNPLANNED)) for stage in run.stages]
        key = json.dumps([values, stages], sort_keys=True)
        if key not in self._plans:
            self._plans[key] = plan_run(run, self.sample)
        return self._plans[key]

    def _beyond(self, plan: RunPlan) -> Iterator[str]:
        for name, most in self.config.constraints.at_most.items():
            value = planned(plan, name)
            if value is not None and value > most:
                yield f"constraints.at_most: {name} {most:g}, planned {value:,.6g}"

    def _labels(self, chosen: Chosen) -> dict[str, str]:
        return {path: self.space.label(path, chosen) for path in self.config.factors}

    def _base_labels(self) -> dict[str, str]:
        try:
            values = content(replaced(self.study.base, []))
        except ConfigError:  # it is complete with levels alone
            values = self.study.base.data
        return {path: self._label_at(path, values) for path in self.config.factors}

    def _label_at(self, path: str, values: Any) -> str:
        """The level that equals what stands at a factor's path in a run's values, else `base`."""
        levels = self.config.factors[path]
        if isinstance(levels, Range):
            return BASE
        try:
            held = value_at(values, path)
        except LookupError:
            pass
        else:
            for label in levels:
                if _canonical(held) == _canonical(self._level_values[path][label]):
                    return label
        if BASE in levels:
            place = level_location(self.study.document, path, BASE, levels)
            message = "the base run's own value is called `base`, and this level is another; rename it"
            raise self.study.document.fail([Problem(place, message)])
        return BASE

    @cached_property
    def _level_values(self) -> dict[str, Levels]:
        """Every level as a run holds it, with all its defaults."""
        return {
            path: {label: self._as_held(path, label) for label in levels} for path, levels in self.config.varied.items()
        }

    def _as_held(self, path: str, label: str) -> Any:
        try:
            return value_at(content(self.run({path: label}, whole=True)), path)
        except (ConfigError, LookupError):  # an option of what another factor's level brings
            return self.config.varied[path][label]


def planned(plan: RunPlan, name: Planned) -> float | None:
    """A quantity of a plan by the name that constraints have for it; None where it is not known."""
    match name:
        case "visual_tokens":
            return plan.visual_tokens
        case "parameters":
            return sum(plan.parameters.values())
        case "trained_parameters":
            return sum(plan.trained.values())
        case "flops":
            return None if plan.cost is None else plan.cost.inference
        case "gpu_gib":
            needed = [stage.gpu_bytes for stage in plan.cost.stages.values()] if plan.cost else [None]
            return None if None in needed else max(amount for amount in needed if amount is not None) / GIB


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _in_range(path: str, given: Any, known: Range) -> int | float:
    """A number, or its text, that a range holds.

    Raises:
        ConfigError: it does not.
    """
    value = number_of(given)
    if value is None or not known.low <= value <= known.high or (known.whole and value != int(value)):
        kind = "a whole number" if known.whole else "a number"
        raise ConfigError(f"factor {path!r}: wanted {kind} from {known.low} to {known.high}, given {given!r}")
    return int(value) if known.whole else value
