"""One cell of a study, and one that is left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from chiasm.config import RunConfig
from chiasm.plan import RunPlan
from chiasm_experiments.study.space import BASE

FULL = "full"
"""The fidelity of a study that names none."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination of levels at one fidelity.

    Args:
        levels: every factor to the label of its level, or the text of a range's number. A factor that does not vary in
            this cell has the level that equals what the run holds, else `base`.
        run: the complete run, with the base's seed and the fidelity's fields.
        plan: what planning it gave.
        fidelity: its name; `full` where the study has none.
    """

    levels: dict[str, str]
    run: RunConfig
    plan: RunPlan
    fidelity: str = FULL

    @property
    def label(self) -> str:
        """The levels in words."""
        return label_of_levels(self.levels)


@dataclass(frozen=True, slots=True)
class Skipped:
    """Levels that no trial has.

    Args:
        levels: as of a cell; of some factors alone where these can be in no cell.
        fidelity: at which they were judged.
        reasons: why, in words.
        by: `plan`: they cannot work; `constraint`: the study leaves them out.
    """

    levels: dict[str, str]
    fidelity: str
    reasons: tuple[str, ...]
    by: Literal["plan", "constraint"]

    @property
    def label(self) -> str:
        """The levels in words."""
        return label_of_levels(self.levels)


def label_of_levels(levels: Mapping[str, str]) -> str:
    """The levels that differ from the base run, in words; a number or switch is told with its field."""
    words = []
    for path, label in levels.items():
        if label != BASE:
            number = number_of(label)
            bare = number is not None or label in ("True", "False", "None")
            shown = f"{number:.4g}" if number is not None and len(label) > 8 else label
            words.append(f"{path.rpartition('.')[2]}={shown}" if bare else label)
    return ", ".join(words) or BASE


def number_of(value: Any) -> float | None:
    """A number or its text as a number, None for anything else."""
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
