"""How a run is executed: where its time and memory go. Nothing here changes what is learned beyond rounding."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeInt, ValidationError, field_validator

from chiasm.errors import ConfigError
from chiasm.settings import FilePath, Settings

Choice = Literal["auto", "on", "off"]
Logger = Literal["tensorboard", "mlflow", "wandb"]


class Execution(Settings):
    """How one run is executed; a study gives these fields in `resources`."""

    loader_workers: NonNegativeInt | Literal["auto"] = "auto"
    """Processes that make samples ready ahead of the model; auto: none on the CPU, up to 8 beside a GPU."""
    checkpoint_seconds: float = Field(default=600, ge=0)
    """Between checkpoints within a stage; 0: after every step."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """Over several workers. ddp: each holds the whole model. fsdp: each holds a shard of what learns and of the
    language model (FSDP2). auto: ddp where a worker's memory holds it."""
    cache: Choice = "auto"
    """Features of frozen encoders on the disk, shared by all runs of a machine. auto: measured whether it pays."""
    cache_folder: FilePath | None = None
    """null: $CHIASM_CACHE, else `chiasm` in the user's folder of caches."""
    cache_gib: float = Field(default=100, gt=0)
    """Of the folder; what was not used for longest is dropped."""
    pack: Choice = "auto"
    """The samples of a forward pass as one row without padding, none of which sees another. auto: where the language
    model offers it, on a GPU."""
    compile: Choice = "auto"
    """The language model, and encoders without kept features, by `torch.compile`. auto: on a GPU, where the run is long
    enough to earn it back."""
    activation_checkpointing: Choice = "auto"
    """Blocks of the language model computed again in the backward pass. auto: where memory would not hold them."""
    stages_folder: FilePath | None = None
    """Results of stages, shared with all runs that name the same folder; a stage whose model, data and settings are
    equal is trained once. null: a study shares in its own folder what its trials have in common."""
    loggers: Literal["auto"] | tuple[Logger, ...] = "auto"
    """Who is told the metrics of every step, beside metrics.jsonl. auto: tensorboard, mlflow where MLFLOW_TRACKING_URI
    is set, and wandb where WANDB_PROJECT is. On the command line with commas, `none` for nobody."""
    profile: int = Field(default=0, ge=0)
    """Steps of the first stage to trace with torch's profiler, after its first few; 0: none."""

    @field_validator("loggers", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "auto":
            return [] if value == "none" else value.split(",")
        return value

    def loaders(self, device: torch.device) -> int:
        """The number of loader processes beside a device."""
        if self.loader_workers != "auto":
            return self.loader_workers
        return max(1, min(8, len(os.sched_getaffinity(0)) - 1)) if device.type == "cuda" else 0


def parse_execution(words: Iterable[str]) -> Execution:
    """Settings from words such as `cache=on`.

    Raises:
        ConfigError: a word is no setting, or its value is none that it takes.
    """
    values: dict[str, str | None] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"wanted NAME=VALUE, given {word!r}; the names are {', '.join(Execution.model_fields)}")
        values[name] = None if value == "null" else value
    try:
        return Execution.model_validate(values)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        names = ", ".join(Execution.model_fields)
        raise ConfigError(f"how to execute the run: {told}; the names are {names}") from None
