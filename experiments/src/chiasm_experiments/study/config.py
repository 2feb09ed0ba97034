"""The configuration of a study: a base run, what varies, and where trials run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from chiasm.config import read_document
from chiasm.settings import Settings
from chiasm.yamlfile import Document, Location, Problem, load_yaml, problems_of
from chiasm_experiments.training.execution import Execution


class Resources(Execution):
    """What one trial takes, how many run at once, and how each is executed."""

    workers: int = Field(default=1, ge=1)
    """Processes of one trial."""
    cpus_per_worker: float = Field(default=1, gt=0)
    gpus_per_worker: float | Literal["auto"] = "auto"
    """auto: one where the cluster has GPUs, else none."""
    concurrent: int | Literal["auto"] = "auto"
    """Trials at once; auto: as many as the cluster holds."""
    retries: int = Field(default=2, ge=0)
    """How often a trial starts again after its worker died. An error of the trial itself is never retried."""

    @property
    def execution(self) -> Execution:
        """What concerns each trial alone."""
        return Execution.model_validate({name: getattr(self, name) for name in Execution.model_fields})


class StudyConfig(Settings):
    """One study."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Names the folder of results."""
    question: str = ""
    """What the study answers, in one sentence."""
    base: str | dict[str, Any]
    """A run: a path to its YAML file, or the run itself."""
    factors: dict[str, dict[str, Any]] = Field(min_length=1)
    """For each field of the run that varies its levels: a list, or a mapping of label to value."""
    design: Literal["grid"] = "grid"
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    """Each cell is repeated with every seed."""
    control: dict[str, str] = Field(default_factory=dict, max_length=1)
    """The level of one factor that sees no image, say `{vision.encoders: blind}`; it must score at chance."""
    objective: dict[Literal["maximize"], Literal["accuracy"]] = Field(default={"maximize": "accuracy"})
    resources: Resources = Resources()

    @field_validator("factors", mode="before")
    @classmethod
    def _label(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {path: _labelled(levels) for path, levels in value.items()}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for path, levels in self.factors.items():
            if not levels:
                raise ValueError(f"factor {path!r} has no level")
        for path, label in self.control.items():
            if label not in self.factors.get(path, {}):
                known = {path: list(levels) for path, levels in self.factors.items()}
                raise ValueError(f"control: no factor {path!r} with level {label!r}; factors: {known}")
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds: wanted different numbers from 0 up, given {list(self.seeds)}")
        return self


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
        return read_document(file)


def is_study(document: Document) -> bool:
    """Whether a YAML file holds a study and not a run."""
    return isinstance(document.data, dict) and "factors" in document.data


def level_location(document: Document, path: str, label: str, levels: dict[str, Any]) -> Location:
    """Where a level of a factor is written, for messages."""
    written = document.data["factors"][path]
    return ("factors", path, label if isinstance(written, dict) else list(levels).index(label))


def _parse(document: Document) -> StudyConfig:
    try:
        return StudyConfig.model_validate(document.data, context={"folder": document.folder()})
    except ValidationError as error:
        raise document.fail(problems_of(error, document.data, model=StudyConfig)) from None


def _labelled(levels: Any) -> Any:
    """Levels by label; levels given as a list are labelled by what they are."""
    if not isinstance(levels, list):
        return levels
    result: dict[str, Any] = {}
    for value in levels:
        label = _label_of(value)
        if label in result:
            raise ValueError(f"two levels are both called {label!r}; give labels: {{label: value, ...}}")
        result[label] = value
    return result


def _label_of(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(_label_of, value))
    if isinstance(value, dict):
        options = ",".join(f"{key}={item}" for key, item in value.items() if key != "name")
        return f"{value.get('name', '')}{f'({options})' if options else ''}"
    return str(value)
