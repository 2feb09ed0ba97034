"""The configuration of a run: one YAML file, every field typed, every default stated here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from chiasm.errors import ChiasmError
from chiasm.image import Resize
from chiasm.registry import registry
from chiasm.settings import Settings
from chiasm.yamlfile import Document, Location, Problem, load_yaml, problems_of

Part = Literal["encoders", "fusion", "adapter", "tokens", "llm"]
"""The parts of a model that a stage can train."""

Beta = Annotated[float, Field(ge=0, lt=1)]

PARTS: tuple[Part, ...] = ("encoders", "fusion", "adapter", "tokens", "llm")


class ComponentRef(Settings):
    """A component by name with its options: `clip`, or `{name: clip, layers: -2}`."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict):
            options = {key: item for key, item in value.items() if key != "name"}
            return {"options": options} | ({"name": value["name"]} if "name" in value else {})
        return value

    @model_serializer
    def _flatten(self) -> dict[str, Any]:
        return {"name": self.name, **self.options}


class ImageConfig(Settings):
    """How one image is shown to the encoders."""

    views: Literal["whole", "tiles"] = "whole"
    """The whole image as one view; or tiles on the best-fitting grid, each a view of the encoder's own size."""
    resize: Resize = "pad"
    """How the image becomes each encoder's rectangle, and the canvas of tiles (`native` pads it)."""
    max_tiles: int = Field(default=4, gt=0)
    """Of one image, the whole image not counted. Every grid up to it may be chosen, 1 x 1 for small images."""
    grids: tuple[tuple[PositiveInt, PositiveInt], ...] | None = Field(default=None, min_length=1)
    """Rows and columns to choose from instead; LLaVA-NeXT has [[1, 2], [2, 1], [2, 2], [1, 3], [3, 1]]."""
    whole: bool = True
    """The whole image as a view before its tiles."""
    pool: int = Field(default=1, gt=0)
    """The mean over squares of `pool` x `pool` visual tokens of each tile; the whole image keeps all of its own."""

    @model_validator(mode="after")
    def _tiles(self) -> Self:
        # not the fields that were set: a configuration that was written out names all of them
        changed = [
            name
            for name, field in type(self).model_fields.items()
            if name not in ("views", "resize") and getattr(self, name) != field.default
        ]
        if self.views == "whole" and changed:
            raise ValueError(f"{', '.join(changed)}: for `views: tiles`, given `views: whole`")
        if self.grids is not None and "max_tiles" in changed:
            raise ValueError("grids and max_tiles: the grids say how many tiles there may be; give one of the two")
        return self


class VisionConfig(Settings):
    """From images to visual tokens."""

    encoders: tuple[ComponentRef, ...] = Field(min_length=1)
    image: ImageConfig = ImageConfig()
    fusion: ComponentRef = ComponentRef(name="single")
    adapter: ComponentRef = ComponentRef(name="mlp")


class TokensConfig(Settings):
    """The learned vectors outside the vocabulary (OmniFusion, arXiv 2404.06212, section 2)."""

    image: tuple[Literal["SOI", "EOI"], ...] = ("SOI", "EOI")
    """Around the visual tokens of each image: both, or none."""
    views: tuple[Literal["SEP"], ...] = ()
    """Between the views of one image: [SEP], or nothing."""
    turns: Literal["template"] | tuple[Literal["USER", "BOT"], ...] = ("USER", "BOT")
    """Before each question and answer; `template` writes turns in the tokenizer's own chat template instead."""

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if self.image not in ((), ("SOI", "EOI")):
            raise ValueError(f"image: wanted [SOI, EOI] or [], given {list(self.image)}")
        if len(self.views) > 1:
            raise ValueError(f"views: wanted [SEP] or [], given {list(self.views)}")
        if self.turns not in ("template", ("USER", "BOT")):
            raise ValueError(f"turns: wanted [USER, BOT] or template, given {list(self.turns)}")
        return self


class StageConfig(Settings):
    """One stage of training."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    data: tuple[ComponentRef, ...] = Field(min_length=1)
    """Data sets, joined; a path to a YAML file includes its list."""
    train: tuple[Part, ...] = Field(min_length=1)
    """The parts that learn; all others are frozen and in eval mode."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """adafactor: as OmniFusion's released code, with the given rate scaled by each parameter's size."""
    lr: PositiveFloat | dict[Part, PositiveFloat]
    """Peak learning rate, or one for each trained part; of adafactor relative to a parameter's root mean square."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Of adamw; adafactor keeps no first moment, and its second one forgets by a rule of its own."""
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    """On matrices alone: never on biases, normalisations, learned tokens, positions, queries and embeddings."""
    batch_size: int = Field(gt=0)
    """Samples of one optimiser step, over all workers."""
    micro_batch_size: PositiveInt | Literal["auto"] | None = None
    """Samples of one forward pass on one worker; it changes nothing but rounding. null: all of its share; auto: as many
    of it as a GPU's memory takes, found when the stage starts."""
    epochs: float = Field(default=1.0, gt=0)
    steps: int | None = Field(default=None, gt=0)
    """Optimiser steps; overrides `epochs`."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up; cosine ends at 0."""
    warmup: float = Field(default=0.01, ge=0, lt=1)
    """Share of the steps in which the learning rate rises linearly."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Largest norm of all gradients together."""

    @field_validator("data", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | dict) else value

    @model_validator(mode="after")
    def _rates(self) -> Self:
        rates = self.lr if isinstance(self.lr, dict) else dict.fromkeys(self.train, self.lr)
        if set(rates) != set(self.train):
            raise ValueError(f"lr: wanted one rate for each of {list(self.train)}, given {list(rates)}")
        if len(set(self.train)) < len(self.train):
            raise ValueError(f"train: wanted each part once, given {list(self.train)}")
        return self

    @model_validator(mode="after")
    def _step(self) -> Self:
        # not the fields that were set: a configuration that was written out names all of them
        if self.optimizer == "adafactor" and self.betas != type(self).model_fields["betas"].default:
            raise ValueError(f"betas: adafactor has none, given {list(self.betas)}; leave them out, or use adamw")
        if isinstance(self.micro_batch_size, int) and self.micro_batch_size > self.batch_size:
            raise ValueError(
                f"micro_batch_size: {self.micro_batch_size} samples are more than the step's {self.batch_size} "
                "(batch_size); give at most as many"
            )
        return self

    def rate(self, part: Part) -> float:
        """The peak learning rate of a trained part."""
        return self.lr[part] if isinstance(self.lr, dict) else self.lr


class RunConfig(Settings):
    """One complete run: a model, its stages of training, and what it is evaluated on."""

    vision: VisionConfig
    llm: ComponentRef
    tokens: TokensConfig = TokensConfig()
    system: str = "This is a dialog with AI assistant.\n"
    """The text before the images (OmniFusion's); with `turns: template` the system message, empty for none."""
    stages: tuple[StageConfig, ...] = Field(min_length=1)
    evaluate: tuple[ComponentRef, ...] = ()
    """Benchmarks."""
    evaluation_batch_size: int = Field(default=32, gt=0)
    """Questions answered at once."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of computation. auto: bfloat16 on a GPU, with trained weights kept in float32; float32 on the CPU."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of new weights and of the order of samples."""

    @field_validator("evaluate", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | dict) else value

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages: the names {names} are not all different")
        return self

    def components(self) -> Iterator[tuple[Location, str, ComponentRef]]:
        """Each component that the run names: where it is named, its kind, and the reference."""
        for i, ref in enumerate(self.vision.encoders):
            yield ("vision", "encoders", i), "encoder", ref
        yield ("vision", "fusion"), "fusion", self.vision.fusion
        yield ("vision", "adapter"), "adapter", self.vision.adapter
        yield ("llm",), "llm", self.llm
        for i, stage in enumerate(self.stages):
            for k, ref in enumerate(stage.data):
                yield ("stages", i, "data", k), "dataset", ref
        for i, ref in enumerate(self.evaluate):
            yield ("evaluate", i), "benchmark", ref

    @property
    def trained(self) -> tuple[Part, ...]:
        """The parts that any stage trains."""
        return tuple(part for part in PARTS if any(part in stage.train for stage in self.stages))


def resolve(kind: str, ref: ComponentRef) -> tuple[Any, Any]:
    """The class that a reference names and its validated configuration.

    Raises:
        PluginError: no such component, or it cannot be imported.
        pydantic.ValidationError: its options are wrong.
    """
    cls: Any = registry().load(kind, ref.name)
    return cls, cls.Config.model_validate(ref.options)


def load_run(path: Path) -> RunConfig:
    """Reads a run from a YAML file and checks every field, those of its components too.

    Paths in the result are absolute.

    Raises:
        ConfigError: all problems at once, each with file, line and field.
    """
    return parse_run(read_document(path))


def read_document(path: Path) -> Document:
    """A run's YAML file with the data lists that its stages include."""
    document = load_yaml(Path(path).absolute())
    include_data(document)
    return document


def include_data(document: Document) -> None:
    """Replaces `data: file.yaml` in each stage by the content of that file."""
    stages = document.data.get("stages") if isinstance(document.data, dict) else None
    for i, stage in enumerate(stages if isinstance(stages, list) else []):
        data = stage.get("data") if isinstance(stage, dict) else None
        if isinstance(data, str) and data.endswith((".yaml", ".yml")):
            location = ("stages", i, "data")
            folder = document.folder(location) or Path.cwd()
            included = load_yaml(folder / Path(data).expanduser())
            stage["data"] = included.data
            document.graft(location, included)


def parse_run(document: Document) -> RunConfig:
    """A run from a document, checked as `load_run` says."""
    if not isinstance(document.data, dict):
        raise document.fail([Problem((), f"wanted a mapping of a run's fields, given {document.data!r}")])
    try:
        run = RunConfig.model_validate(document.data, context={"folder": document.folder()})
    except ValidationError as error:
        raise document.fail(problems_of(error, document.data, model=RunConfig)) from None
    problems: list[Problem] = []
    resolved: dict[Location, ComponentRef] = {}
    for location, kind, ref in run.components():
        place = location if location in document.lines else _written(location, document)
        try:
            cls: Any = registry().load(kind, ref.name)
            config = cls.Config.model_validate(ref.options, context={"folder": document.folder(place)})
        except ValidationError as error:
            problems += problems_of(error, ref.options, place, cls.Config)
        except ChiasmError as error:
            problems.append(Problem((*place, "name"), str(error)))
        else:
            options = config.model_dump(mode="json", exclude_unset=True)
            resolved[location] = ComponentRef.model_construct(name=ref.name, options=options)
    if problems:
        raise document.fail(problems)
    return _with_components(run, resolved)


def _written(location: Location, document: Document) -> Location:
    """The location without the index that stands for a single value where a list may stand."""
    return location[:-1] if document.lines and isinstance(location[-1], int) else location


def _with_components(run: RunConfig, resolved: dict[Location, ComponentRef]) -> RunConfig:
    """The run with each reference replaced by its checked form."""
    encoders = tuple(resolved["vision", "encoders", i] for i in range(len(run.vision.encoders)))
    vision = run.vision.model_copy(
        update={
            "encoders": encoders,
            "fusion": resolved["vision", "fusion"],
            "adapter": resolved["vision", "adapter"],
        }
    )
    stages = tuple(
        stage.model_copy(update={"data": tuple(resolved["stages", i, "data", k] for k in range(len(stage.data)))})
        for i, stage in enumerate(run.stages)
    )
    evaluate = tuple(resolved["evaluate", i] for i in range(len(run.evaluate)))
    return run.model_copy(update={"vision": vision, "llm": resolved[("llm",)], "stages": stages, "evaluate": evaluate})
