"""The interface of a vision encoder.

Shape letters: B images, H and W pixels, L selected layers, N patch tokens, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from PIL.Image import Image
from pydantic import field_validator
from torch import Tensor

from chiasm.errors import ConfigError
from chiasm.features import Features, FeatureSpec, Grid
from chiasm.image import ImageSpec, Resize, to_pixels
from chiasm.part_module import PartModule
from chiasm.settings import Settings, Source

Layers = int | tuple[int, ...] | Literal["all"]


class EncoderConfig(Settings):
    """What every encoder lets a run choose; subclass it to add more."""

    pretrained: Source | None = None
    """Hub id or folder of the weights; null for random weights, a control."""
    layers: Layers = -1
    """Which hidden states to give: one index, a list, or `all`. Index i in 1..depth is the output of block i,
    negative ones count from the last block: -1 is the last block, -2 the one before it (LLaVA's choice). 0, the
    patch embedding, is not a block."""

    @field_validator("layers")
    @classmethod
    def _some_layer(cls, value: Layers) -> Layers:
        chosen = value if isinstance(value, tuple) else () if value == "all" else (value,)
        if value == () or 0 in chosen:
            raise ValueError("layers count from 1 to the depth, or from -1 back; name at least one, and not 0")
        return value


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """The geometry of an encoder, stated without weights."""

    image: ImageSpec
    """Pixels that it wants."""
    features: FeatureSpec
    """Features of the selected layers."""
    depth: int
    """Blocks in the architecture."""
    parameters: int
    """Parameters that `build` would hold."""
    flops: int
    """Floating-point operations of one view's forward pass (a multiply-add counts two), of matrix products and
    convolutions at least; 0 where it is not known."""

    @property
    def grid(self) -> Grid:
        return self.features.grid

    @property
    def width(self) -> int:
        return self.features.width


class Encoder(PartModule, ABC):
    """Images to patch features, each encoder with its own preprocessing.

    A subclass sets `Config`, states its geometry in `spec`, and makes itself in `build`.

    Args:
        config: an instance of `Config`; kept, with its geometry, as `config` and `geometry`.
    """

    Config: ClassVar[type[EncoderConfig]] = EncoderConfig

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.geometry = self.spec(config)

    @classmethod
    @abstractmethod
    def spec(cls, config: EncoderConfig) -> EncoderSpec:
        """The geometry of `build(config)`, without its weights. May read a small file such as config.json.

        Raises:
            CheckpointError: `pretrained` is missing or of another architecture.
            ConfigError: a layer is out of range.
        """

    @classmethod
    @abstractmethod
    def build(cls, config: EncoderConfig) -> Self:
        """The encoder with its weights, in float32 on the CPU.

        Random weights (`pretrained: null`) come from torch's global generator: seed it before.

        Raises:
            CheckpointError: `pretrained` is missing, unreadable or of another architecture.
        """

    @classmethod
    @abstractmethod
    def tiny(cls) -> Self:
        """A small instance with random weights for tests: made on the CPU in well under a second."""

    @classmethod
    def activation_bytes(cls, config: EncoderConfig) -> int | None:
        """Bytes that one view keeps between forward and backward where the encoder learns, in bfloat16 on a GPU.

        `chiasm plan` estimates memory with it. None, where it is not known, leaves the estimate out of the stages that
        train the encoders. No weight is loaded.
        """
        return None

    @abstractmethod
    def forward(self, pixels_B3HW: Tensor) -> Features:
        """`[B, 3, H, W]` to features `[B, L, N, D]` as `spec` states them, prefix tokens removed."""

    def preprocess(self, images: Sequence[Image], resize: Resize = "native") -> Tensor:
        """Images to normalised pixels `[B, 3, H, W]` float32, by this encoder's own size, mean and std.

        Images are of any mode, and what is transparent is laid over white (`chiasm.image.to_rgb`).
        """
        return to_pixels(images, self.geometry.image, resize)


def select_layers(layers: Layers, depth: int) -> tuple[int, ...]:
    """The selected blocks as indices 1..depth, in the order asked.

    Raises:
        ConfigError: an index is out of range, or named twice.
    """
    if layers == "all":
        return tuple(range(1, depth + 1))
    asked = layers if isinstance(layers, tuple) else (layers,)
    chosen = tuple(index + depth + 1 if index < 0 else index for index in asked)
    for index, block in zip(asked, chosen, strict=True):
        if not 1 <= block <= depth:
            raise ConfigError(
                f"layer {index} does not exist: the encoder has {depth} blocks, 1..{depth} or -{depth}..-1"
            )
    if len(set(chosen)) < len(chosen):
        raise ConfigError(f"layers {list(asked)} name a block twice (the encoder has {depth} blocks)")
    return chosen


__all__ = ["Encoder", "EncoderConfig", "EncoderSpec", "Layers", "select_layers"]
