"""The factors of a study and where each of them varies: what a design, a constraint or a search draws from.

Pure functions of the configuration; neither a run is made here nor planned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from chiasm.errors import ConfigError
from chiasm_experiments.study.config import StudyConfig
from chiasm_experiments.study.settings import Range

BASE = "base"
"""The label of the base run's own value where no level of the factor equals it."""

Chosen = dict[str, str | int | float]
"""The label, or the number of a range, of each factor that does not stand at the base."""
Fixed = Mapping[str, str | int | float | None]


@dataclass(frozen=True)
class Space:
    """The factors of a study and where they vary.

    Args:
        config: of the study.
        base: for each factor the label of the base run's value.
    """

    config: StudyConfig
    base: Mapping[str, str]

    @cached_property
    def order(self) -> tuple[str, ...]:
        """All factors as the file has them, each behind those that it depends on."""
        ordered: list[str] = []
        waiting = list(self.config.factors)
        while waiting:
            path = next((path for path in waiting if self._needed(path) <= set(ordered)), None)
            if path is None:
                raise ConfigError(f"when: {', '.join(waiting)} depend on one another; leave one condition out")
            waiting.remove(path)
            ordered.append(path)
        return tuple(ordered)

    def _needed(self, path: str) -> set[str]:
        """The factors that tell whether one varies."""
        needed = self.config.when.get(path, {}).keys()
        around = {other for other in self.config.factors if any(item.startswith(f"{other}.") for item in needed)}
        return needed | around - {path}

    def label(self, path: str, chosen: Chosen) -> str:
        """What a factor is in a combination, whether it varies there or stands at the base."""
        if path in chosen:
            return str(chosen[path])
        within = any(path.startswith(f"{other}.") and chosen[other] != self.base[other] for other in chosen)
        return BASE if within else self.base[path]  # of a part that was replaced the base's own options are gone

    def active(self, path: str, chosen: Chosen) -> bool:
        """Whether a factor varies, given those that it depends on."""
        needed = self.config.when.get(path, {})
        return all(self.label(other, chosen) in labels for other, labels in needed.items())

    def effective(self, chosen: Chosen) -> Chosen:
        """A combination without the factors that do not vary in it."""
        result: Chosen = {}
        for path in self.order:
            if path in chosen and self.active(path, result):
                result[path] = chosen[path]
        return result

    def draw(self, choose: Callable[[str, Sequence[str] | Range], str | int | float]) -> Chosen:
        """One combination, factor by factor; `choose` is asked only about those that vary.

        Args:
            choose: takes a factor and its labels or its range.
        """
        chosen: Chosen = {}
        for path in self.order:
            if self.active(path, chosen):
                chosen[path] = choose(path, self.choices(path))
        return chosen

    def choices(self, path: str) -> tuple[str, ...] | Range:
        """The labels of a factor, or its range."""
        levels = self.config.factors[path]
        return levels if isinstance(levels, Range) else tuple(levels)

    def combinations(self, fixed: Fixed | None = None, among: Sequence[str] | None = None) -> Iterator[Chosen]:
        """Every combination, the last factor changing first; ranges stand at their middle.

        Args:
            fixed: factors that have this level, or for None do not vary.
            among: some of the factors, each behind those that it depends on; None: all.
        """
        fixed, order = fixed or {}, self.order if among is None else among

        def extend(chosen: Chosen, place: int) -> Iterator[Chosen]:
            if place == len(order):
                yield chosen
                return
            path = order[place]
            if not self.active(path, chosen):
                if fixed.get(path) is None:
                    yield from extend(chosen, place + 1)
                return
            choices = self.choices(path)
            values: Sequence[str | int | float] = (middle(choices),) if isinstance(choices, Range) else choices
            for value in values:
                if path not in fixed or fixed[path] == value:
                    yield from extend({**chosen, path: value}, place + 1)

        return extend({}, 0)

    def behind(self, paths: Iterable[str]) -> tuple[str, ...]:
        """Factors with all that they depend on, in order."""
        found: set[str] = set()
        waiting = list(paths)
        while waiting:
            if (path := waiting.pop()) not in found:
                found.add(path)
                waiting += self._needed(path)
        return tuple(path for path in self.order if path in found)

    def excluded(self, chosen: Chosen, known: Iterable[str]) -> str | None:
        """The constraint in the study's words that leaves a combination out, None if there is none.

        Args:
            chosen: the combination.
            known: the factors that are decided.
        """
        known = set(known)
        for levels in self.config.constraints.exclude:
            if levels.keys() <= known and all(self.label(path, chosen) in labels for path, labels in levels.items()):
                return f"constraints.exclude: {in_words(levels)}"
        return None


def in_words(levels: Mapping[str, Sequence[str]]) -> str:
    """Levels of several factors, as in `vision.fusion is sva and vision.adapter is mlp or linear`."""
    return " and ".join(f"{path} is {' or '.join(labels)}" for path, labels in levels.items())


def middle(range_: Range) -> int | float:
    """The number in the middle of a range, on its own scale."""
    low, high = range_.low, range_.high
    value = math.sqrt(low * high) if range_.log else (low + high) / 2
    return round(value) if range_.whole else value
