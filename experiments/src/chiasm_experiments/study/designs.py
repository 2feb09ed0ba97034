"""The designs: which combinations of levels a study tries, in which order.

Pure functions of the study's space; whether a combination can work is told by a callback.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from allpairspy import AllPairs

from chiasm.errors import ConfigError
from chiasm_experiments.study.settings import Range
from chiasm_experiments.study.space import Chosen, Fixed, Space, in_words, middle

MOST_CELLS = 20_000
"""A grid beyond it is refused: planning it alone takes hours."""
MOST_PLANNED = 256
"""Of a search with more combinations, so many are planned."""
TRIES = 256
"""Combinations tried for a pair of levels before it is said to be in none that works."""

Allowed = Callable[[Chosen], bool]
Missing = Callable[[Fixed], None]


def combinations_of(space: Space, allowed: Allowed, missing: Missing) -> Iterator[Chosen]:
    """The combinations of a study's design, always in the same order.

    Args:
        space: the factors.
        allowed: whether a combination can work and no constraint leaves it out; asked by the pairwise design alone.
        missing: told of two levels that meet in no allowed combination though their conditions let them; by it, too.

    Raises:
        ConfigError: a grid is beyond all bounds, or a listed cell names a level of a factor that does not vary there.
    """
    match space.config.design:
        case "grid":
            yield from _grid(space)
        case "one_factor":
            yield {}
            for path in space.order:
                if space.active(path, {}):
                    yield from space.combinations(among=[path])
        case "pairwise":
            yield from pairwise(space, allowed, missing)
        case "cells":
            yield from _listed(space)
        case "search":
            yield from _overview(space)


def _grid(space: Space) -> Iterator[Chosen]:
    for number, chosen in enumerate(space.combinations()):
        if number == MOST_CELLS:
            raise ConfigError(
                f"design: the grid of {space.config.name!r} has more than {MOST_CELLS:,} cells; "
                "take `pairwise`, `one_factor` or `search`, or fewer levels"
            )
        yield chosen


def _listed(space: Space) -> Iterator[Chosen]:
    for number, cell in enumerate(space.config.cells):
        effective = space.effective(dict(cell))
        for path, label in cell.items():
            if path not in effective and label != space.base[path]:
                raise ConfigError(
                    f"cells.{number}: {path!r} is {label!r}, but varies only where "
                    f"{in_words(space.config.when[path])}; leave it out, or change the others"
                )
        yield effective


def _overview(space: Space) -> Iterator[Chosen]:
    """Combinations for planning a search: all, or a spread sample that has every level of a factor equally often."""
    every = list(itertools.islice(space.combinations(), MOST_PLANNED + 1))
    if len(every) <= MOST_PLANNED:
        yield from every
        return
    from scipy.stats import qmc

    points = qmc.Sobol(len(space.order), seed=0).random_base2(MOST_PLANNED.bit_length() - 1)
    for point in points:
        at = dict(zip(space.order, point, strict=True))

        def pick(path: str, choices: Sequence[str] | Range, at: dict[str, float] = at) -> str | int | float:
            return middle(choices) if isinstance(choices, Range) else choices[int(at[path] * len(choices))]

        yield space.draw(pick)


def pairwise(space: Space, allowed: Allowed, missing: Missing) -> Iterator[Chosen]:
    """Few combinations in which every two levels of different factors meet that can; not to vary counts as a level.

    allpairspy proposes them. Where many combinations are not allowed it ends early, so what is then still missing is
    looked for by itself.
    """
    rows = {path: [*space.choices(path), *([None] if path in space.config.when else [])] for path in space.order}
    at_once = 2 if len(rows) > 1 else 1
    met: set[frozenset[Any]] = set()

    def meet(chosen: Chosen) -> Chosen:
        row = [(path, chosen.get(path)) for path in space.order]
        met.update(map(frozenset, itertools.combinations(row, at_once)))
        return chosen

    if at_once == 2:
        yield from map(meet, _proposed(space, rows, allowed))
    for paths in itertools.combinations(space.order, at_once):
        for levels in itertools.product(*(rows[path] for path in paths)):
            wanted = dict(zip(paths, levels, strict=True))
            if frozenset(wanted.items()) in met:
                continue
            starts = list(space.combinations(wanted, space.behind(paths)))
            found = _find(space, wanted, starts, allowed)
            if found is not None:
                yield meet(found)
            elif starts:
                missing(wanted)


def _proposed(space: Space, rows: dict[str, list[Any]], allowed: Allowed) -> list[Chosen]:
    """What allpairspy proposes. It goes through every combination below two levels that cannot meet, so where it is
    refused again and again such are looked for, and it starts anew without them."""
    barred: list[Fixed] = []
    while True:
        proposed: list[Chosen] = []
        taking = _Taking(space, allowed, barred)
        try:
            for row in AllPairs(list(rows.values()), filter_func=taking.take):
                proposed.append(_chosen(space.order, row))
        except _TooManyRefusedError:
            found = [pair for pair in taking.in_common() if _meet_nowhere(space, pair, allowed)]
            if found:
                barred += found
                continue
        return proposed


class _TooManyRefusedError(Exception):
    """`TRIES` combinations in a row were not allowed."""


class _Taking:
    """allpairspy's filter, which sees the first levels of a combination, then one more, and so on.

    Args:
        space: the factors.
        allowed: asked of whole combinations.
        barred: pairs of levels that are known to meet nowhere.
    """

    def __init__(self, space: Space, allowed: Allowed, barred: Sequence[Fixed]) -> None:
        self.space = space
        self.allowed = allowed
        self.barred = barred
        self.refused: list[dict[str, Any]] = []

    def take(self, row: Sequence[Any]) -> bool:
        """Whether a combination may begin so.

        Raises:
            _TooManyRefusedError: it is time to ask why.
        """
        paths = self.space.order[: len(row)]
        levels, chosen = dict(zip(paths, row, strict=True)), _chosen(paths, row)
        if self.space.active(paths[-1], chosen) != (row[-1] is not None):
            return False
        if self.space.excluded(chosen, paths) is not None or any(
            pair.items() <= levels.items() for pair in self.barred
        ):
            return False
        if len(row) < len(self.space.order):
            return True
        if self.allowed(chosen):
            self.refused = []
            return True
        self.refused.append(levels)
        if len(self.refused) == TRIES:
            raise _TooManyRefusedError
        return False

    def in_common(self) -> list[Fixed]:
        """The pairs of levels that all refused combinations have."""
        common = set.intersection(*(set(levels.items()) for levels in self.refused))
        return [dict(pair) for pair in itertools.combinations(sorted(common, key=str), 2)]


def _meet_nowhere(space: Space, pair: Fixed, allowed: Allowed) -> bool:
    return _find(space, pair, list(space.combinations(pair, space.behind(pair))), allowed) is None


def _chosen(paths: Sequence[str], row: Sequence[Any]) -> Chosen:
    return {path: value for path, value in zip(paths, row, strict=True) if value is not None}


def _find(space: Space, wanted: Fixed, starts: Sequence[Chosen], allowed: Allowed) -> Chosen | None:
    """An allowed combination with the wanted levels: of all if there are few, else of so many drawn at random.

    Args:
        space: the factors.
        wanted: levels that it has.
        starts: all ways to have them, with what they depend on decided.
        allowed: as `combinations_of` says.
    """
    decided = space.behind(wanted)
    below = (space.combinations({path: start.get(path) for path in decided}) for start in starts)
    every = list(itertools.islice(itertools.chain.from_iterable(below), TRIES + 1))
    if len(every) <= TRIES:
        return next(filter(allowed, every), None)
    draw = random.Random(0)
    for number in range(TRIES):
        chosen = dict(starts[number % len(starts)])
        for path in space.order:
            if path not in decided and space.active(path, chosen):
                chosen[path] = draw.choice(list(space.config.varied[path]))
        if allowed(chosen):
            return chosen
    return None
