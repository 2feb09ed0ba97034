"""The configuration of a study: a base run, what varies, which cells are tried, and where trials run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from chiasm.config import read_document
from chiasm.settings import FilePath, Settings
from chiasm.yamlfile import Document, Location, Problem, load_yaml, problems_of
from chiasm_experiments.study.settings import (
    Budget,
    Constraints,
    Label,
    Labels,
    Objective,
    Range,
    Resources,
    Search,
    Share,
    label_of,
)

Design = Literal["grid", "one_factor", "pairwise", "cells", "search"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Levels = dict[str, Any]
"""The values of a factor by their labels."""


class StudyConfig(Settings):
    """One study."""

    name: Name
    """Names the folder of results."""
    question: str = ""
    """What the study answers, in one sentence."""
    base: str | dict[str, Any]
    """A run: a path to its YAML file, or the run itself."""
    factors: dict[str, Range | Levels] = Field(min_length=1)
    """For each field of the run that varies its levels: a list, or a mapping of label to value; in a search also
    `{low: ..., high: ..., log: true}`."""
    when: dict[str, Annotated[dict[str, Labels], Field(min_length=1)]] = Field(default_factory=dict)
    """Factors that vary only where others have one of the named levels; elsewhere the base run's value stands."""
    design: Design = "grid"
    """grid: every combination. one_factor: the base run, and each factor varied alone from it. pairwise: few cells in
    which every two levels of different factors meet. cells: those that are listed. search: those that are proposed."""
    cells: tuple[dict[str, Label], ...] = ()
    """For `design: cells`: the levels of each; a factor that one does not name keeps the base run's value."""
    constraints: Constraints = Constraints()
    invalid: Literal["refuse", "skip"] = "refuse"
    """What is done about cells that cannot work; a search always skips them. The report names what was skipped."""
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    """Each cell is repeated with every seed. In a search the first is used, and the next ones for a cell that is
    proposed again."""
    control: dict[str, Label] = Field(default_factory=dict, max_length=1)
    """The level of one factor that sees no image, say `{vision.encoders: blind}`; it must score at chance."""
    objective: Objective = Objective()
    search: Search = Search()
    fidelities: dict[Name, dict[str, Any]] = Field(default_factory=dict)
    """By name, from the cheapest to the whole: fields of the run and their values there, say fewer samples or a smaller
    language model. Cells start at the first; the best go on to the next."""
    promote: Share = 1 / 3
    """The part of the cells of a fidelity that goes on to the next."""
    budget: Budget = Budget()
    warm_start: tuple[FilePath, ...] = ()
    """Folders of earlier studies, whose trials a search begins with where they fit."""
    storage: str | None = None
    """URL of a database for Optuna's record, say `postgresql://...`, for drivers on several machines; null: a journal
    in the study's folder."""
    max_failures: PositiveInt | None = 10
    """Trials that may fail before the study stops; null: any number."""
    resources: Resources = Resources()

    @field_validator("factors", mode="before")
    @classmethod
    def _label(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {path: _factor(levels) for path, levels in value.items()}

    @property
    def varied(self) -> dict[str, Levels]:
        """The factors that have levels."""
        return {path: levels for path, levels in self.factors.items() if not isinstance(levels, Range)}

    @property
    def ranges(self) -> dict[str, Range]:
        """The factors that have a range of numbers."""
        return {path: levels for path, levels in self.factors.items() if isinstance(levels, Range)}

    @property
    def pruner(self) -> str:
        """How trials are pruned; those of other designs than a search only where it is asked for."""
        return self.search.pruner if self.design == "search" or "pruner" in self.search.model_fields_set else "none"

    @property
    def rungs(self) -> tuple[float, ...]:
        """Where trials are asked questions on the way; a grid's only where it is asked for, as for learning curves."""
        wanted = self.pruner != "none" or "rungs" in self.search.model_fields_set
        return self.search.rungs if wanted else ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for path, levels in self.varied.items():
            if not levels:
                raise ValueError(f"factor {path!r} has no level")
        for path, label in self.control.items():
            self._require_levels("control", {path: (label,)})
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0 or max(self.seeds) >= 2**32:
            raise ValueError(f"seeds: wanted different numbers from 0 up to 2^32 - 1, given {list(self.seeds)}")
        if "seed" in self.factors:
            raise ValueError("factor 'seed': seeds are repetitions, no factor; give them as `seeds: [0, 1, 2]`")
        return self

    @model_validator(mode="after")
    def _of_the_design(self) -> Self:
        if self.ranges and self.design != "search":
            path = next(iter(self.ranges))
            raise ValueError(f"factor {path!r} is a range, which only `design: search` draws from; give it levels")
        if bool(self.cells) != (self.design == "cells"):
            raise ValueError("cells: lists what `design: cells` tries; give both, or neither")
        set_ = self.model_fields_set
        proposing = {f"search.{name}" for name in self.search.model_fields_set - {"pruner", "rungs", "rung_questions"}}
        if self.design != "search" and (wrong := sorted(set_ & {"warm_start"} | proposing)):
            raise ValueError(f"{', '.join(wrong)}: for `design: search`, given `design: {self.design}`")
        if self.design == "search" and self.search.trials is None and self.budget == Budget():
            raise ValueError("search: it needs an end; give `search: {trials: ...}`, or a budget")
        if len(self.fidelities) == 1:
            raise ValueError("fidelities: wanted at least two, from the cheapest to the whole, given one")
        if "promote" in set_ and not self.fidelities:
            raise ValueError("promote: there are no fidelities to promote between")
        return self

    @model_validator(mode="after")
    def _names_known_levels(self) -> Self:
        for cell in self.cells:
            self._require_levels("cells", {path: (label,) for path, label in cell.items()})
        for excluded in self.constraints.exclude:
            self._require_levels("constraints.exclude", excluded)
        for path, needed in self.when.items():
            if path not in self.factors:
                raise ValueError(f"when: no factor {path!r}; factors: {list(self.factors)}")
            self._require_levels(f"when.{path}", needed)
            if path in needed or any(self.when.get(other, {}).keys() & {path} for other in needed):
                raise ValueError(f"when: {path!r} depends on itself")
        return self

    def _require_levels(self, where: str, wanted: dict[str, tuple[str, ...]]) -> None:
        for path, labels in wanted.items():
            for label in labels:
                if label not in self.varied.get(path, {}):
                    known = {factor: list(levels) for factor, levels in self.varied.items()}
                    raise ValueError(f"{where}: no factor {path!r} with level {label!r}; factors: {known}")


class Study:
    """A study as read from its file, with the document of its base run, into which levels are put.

    Args:
        path: the YAML file.

    Raises:
        ConfigError: all problems, each with file, line and field.
    """

    def __init__(self, path: Path) -> None:
        self.document = load_yaml(Path(path).absolute())
        self.config = _parse(self.document)
        self.base = self._base()

    def _base(self) -> Document:
        base = self.config.base
        if isinstance(base, dict):
            lines = {at[1:]: line for at, line in self.document.lines.items() if at[:1] == ("base",) and len(at) > 1}
            return Document(base, lines, self.document.path)
        folder = self.document.folder() or Path.cwd()
        file = folder / Path(base).expanduser()
        if not file.is_file():
            raise self.document.fail([Problem(("base",), f"the run {str(file)!r} does not exist")])
        document = read_document(file)
        if is_study(document) or not isinstance(document.data, dict):
            held = "a study" if is_study(document) else "no mapping of a run's fields"
            raise self.document.fail([Problem(("base",), f"wanted the file of a run, {str(file)!r} holds {held}")])
        return document


def is_study(document: Document) -> bool:
    """Whether a YAML file holds a study and not a run."""
    return isinstance(document.data, dict) and "factors" in document.data


def level_location(document: Document, path: str, label: str, levels: Levels) -> Location:
    """Where a level of a factor is written, for messages."""
    written = document.data["factors"][path]
    return ("factors", path, label if isinstance(written, dict) else list(levels).index(label))


def _parse(document: Document) -> StudyConfig:
    try:
        return StudyConfig.model_validate(document.data, context={"folder": document.folder()})
    except ValidationError as error:
        raise document.fail(problems_of(error, document.data, model=StudyConfig)) from None


def _factor(levels: Any) -> Any:
    """Levels by label; levels given as a list are labelled by what they are. A range stays one."""
    if isinstance(levels, dict) and {"low", "high"} <= levels.keys() <= {"low", "high", "log"}:
        return Range.model_validate(levels)
    if not isinstance(levels, list | dict):
        return levels
    result: Levels = {}
    for given, value in levels.items() if isinstance(levels, dict) else zip(levels, levels, strict=True):
        label = label_of(given)
        if label in result:
            raise ValueError(f"two levels are both called {label!r}; give labels: {{label: value, ...}}")
        result[label] = value
    return result
