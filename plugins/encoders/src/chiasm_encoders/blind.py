"""The image-blind control."""

from __future__ import annotations

from typing import Annotated, Self

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from chiasm.encoder import Encoder, EncoderConfig, EncoderSpec, select_layers
from chiasm.features import Features, FeatureSpec, Grid
from chiasm.image import ImageSpec


class BlindConfig(EncoderConfig):
    """The geometry that the control pretends to have: that of the encoder it replaces."""

    grid: Annotated[tuple[PositiveInt, PositiveInt], Field(description="Rows and columns of tokens.")] = (4, 4)
    width: PositiveInt = 64
    depth: PositiveInt = 1
    """Layers that can be asked for; all are alike."""

    @model_validator(mode="after")
    def _no_weights(self) -> Self:
        if self.pretrained is not None:
            raise ValueError(f"pretrained: the blind encoder has no weights to load, given {self.pretrained!r}")
        return self


class BlindEncoder(Encoder):
    """Features that are the same for every image, so that a run with it measures what the text alone gives.

    Token n has the features `sin((n + 1) (d + 1))`: no parameter, no operation, yet tokens that differ, as an ordinary
    encoder's do, so that an adapter behind it can learn a prompt but never an image.
    """

    Config = BlindConfig
    config: BlindConfig

    def __init__(self, config: BlindConfig) -> None:
        super().__init__(config)
        spec = self.geometry.features
        angles_ND = torch.outer(torch.arange(1.0, spec.tokens + 1), torch.arange(1.0, spec.width + 1))
        self.register_buffer("features_ND", torch.sin(angles_ND), persistent=False)

    @classmethod
    def spec(cls, config: EncoderConfig) -> EncoderSpec:
        assert isinstance(config, BlindConfig)
        grid: Grid = config.grid
        layers = len(select_layers(config.layers, config.depth))
        return EncoderSpec(
            image=ImageSpec(height=grid[0], width=grid[1]),  # a pixel for each token: none of them is looked at
            features=FeatureSpec(layers, grid, config.width),
            depth=config.depth,
            parameters=0,
            flops=0,
        )

    @classmethod
    def build(cls, config: EncoderConfig) -> Self:
        assert isinstance(config, BlindConfig)
        return cls(config)

    @classmethod
    def tiny(cls) -> Self:
        return cls.build(BlindConfig())

    def forward(self, pixels_B3HW: Tensor) -> Features:
        spec = self.geometry.features
        features_ND = self.get_buffer("features_ND")
        return Features(features_ND.expand(len(pixels_B3HW), spec.layers, -1, -1), spec.grid)
