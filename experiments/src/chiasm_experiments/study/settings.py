"""The settings of a study, group by group: what is sought, how cells are proposed, what it may cost, where it runs."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from chiasm.settings import Settings
from chiasm_experiments.training.execution import Execution

Cost = Literal["visual_tokens", "flops", "latency", "trained_parameters"]
"""What a study can hold down: visual tokens of an image, operations of an answer, seconds of an answered question
(measured), parameters that some stage trains."""
Planned = Literal["visual_tokens", "flops", "trained_parameters", "parameters", "gpu_gib"]
"""What a plan knows of a cell before anything runs."""
Share = Annotated[float, Field(gt=0, lt=1)]


def label_of(value: Any) -> str:
    """What a value is called where no label is given."""
    if isinstance(value, list | tuple):
        return "+".join(map(label_of, value))
    if isinstance(value, dict):
        options = ",".join(f"{key}={item}" for key, item in value.items() if key != "name")
        return f"{value.get('name', '')}{f'({options})' if options else ''}"
    return str(value)


Label = Annotated[str, BeforeValidator(label_of)]
"""Of a level; one that was labelled by its value, say a number, may be written as that."""
Labels = Annotated[
    tuple[Label, ...],
    Field(min_length=1),
    BeforeValidator(lambda value: value if isinstance(value, list | tuple) else [value]),
]
"""One, or several of which any will do."""


class Range(Settings):
    """Numbers between two ends, for a search: whole ones where both ends are."""

    low: int | float
    high: int | float
    log: bool = False
    """Drawn on a logarithmic scale."""

    @property
    def whole(self) -> bool:
        """Whether its numbers are integers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"wanted low below high, given {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"log: wanted low above 0, given {self.low}")
        return self


class Resources(Execution):
    """What one trial takes, how many run at once, and how each is executed."""

    workers: int = Field(default=1, ge=1)
    """Processes of one trial."""
    cpus_per_worker: float = Field(default=1, gt=0)
    gpus_per_worker: float | Literal["auto"] = "auto"
    """auto: none where the cluster has no GPU; a whole one for several workers; and for one worker a whole one until a
    trial of its kind was measured, then a share where that trial left the GPU idle."""
    trials_per_gpu: PositiveInt = 4
    """The most that auto puts on one GPU."""
    concurrent: int | Literal["auto"] = "auto"
    """Trials at once; auto: as many as the cluster holds."""
    retries: int = Field(default=2, ge=0)
    """How often a trial starts again after its worker died. An error of the trial itself is never retried."""
    stall_seconds: PositiveFloat = 1800
    """A trial that takes no step for so long is ended as failed."""
    trial_seconds: PositiveFloat | None = None
    """A trial that takes longer in all is ended as failed; null: no limit."""

    @property
    def execution(self) -> Execution:
        """What concerns each trial alone."""
        return Execution.model_validate({name: getattr(self, name) for name in Execution.model_fields})


class Constraints(Settings):
    """Cells that are left out although they could work."""

    exclude: tuple[Annotated[dict[str, Labels], Field(min_length=1)], ...] = ()
    """Each names levels of some factors, one or a list; cells that have all of them are left out."""
    at_most: dict[Planned, PositiveFloat] = Field(default_factory=dict)
    """Cells whose plan has more are left out; `gpu_gib` is of a step on one GPU."""


class Objective(Settings):
    """What is sought: accuracy as high, and costs as low as can be; with costs the answer is a Pareto front."""

    maximize: Literal["accuracy"] = "accuracy"
    """The mean over benchmarks of their mean score."""
    minimize: tuple[Cost, ...] = ()

    @field_validator("minimize", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class Search(Settings):
    """How a search proposes cells, and how it stops those that fall behind."""

    sampler: Literal["tpe", "gp", "nsga2", "random"] = "tpe"
    pruner: Literal["none", "median", "hyperband", "wilcoxon"] = "hyperband"
    """At each rung: below the median of others; in the worse part of a bracket of Hyperband; or worse, by a Wilcoxon
    test over the same questions, than the best trial was."""
    trials: PositiveInt | None = None
    """How many are proposed; null: until the budget is spent."""
    startup: PositiveInt = 10
    """Trials that are drawn at random before the sampler, and before the median, has a say."""
    rungs: tuple[Share, ...] = (0.125, 0.25, 0.5)
    """Shares of the last stage's steps after which a trial is asked questions and may be pruned."""
    rung_questions: PositiveInt = 100
    """Questions of each benchmark that are asked at a rung: the same in every trial."""
    seed: NonNegativeInt = 0
    """Of the sampler."""

    @field_validator("rungs", mode="after")
    @classmethod
    def _rising(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if list(value) != sorted(set(value)):
            raise ValueError(f"wanted shares that rise, given {list(value)}")
        return value


class Budget(Settings):
    """When a study stops starting trials; what runs is finished."""

    gpu_hours: PositiveFloat | None = None
    """GPUs of each trial times its hours; where trials have no GPU, its workers' CPUs count instead."""
    money: PositiveFloat | None = None
    price_per_gpu_hour: PositiveFloat | None = None

    @model_validator(mode="after")
    def _priced(self) -> Self:
        if (self.money is None) != (self.price_per_gpu_hour is None):
            raise ValueError("money and price_per_gpu_hour: give both, or neither")
        return self
