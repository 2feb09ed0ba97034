"""EfficientNet-Lite0 (Tan and Le, arXiv 1905.11946, in its Lite form: ReLU6, no squeeze-and-excitation).

Shape letters: B images, N positions of the feature map in row-major order, D channels.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, Self

import timm
import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from chiasm.encoder import Encoder, EncoderConfig, EncoderSpec
from chiasm.features import Features, FeatureSpec
from chiasm.image import ImageSpec
from chiasm_efficientnet_lite0.weights import load_imagenet

STAGES = {16: 5, 32: 7}
"""Stages of blocks up to the last feature map of a stride."""


class EfficientNetConfig(EncoderConfig):
    """Which weights, which image size, which feature map."""

    pretrained: Literal["imagenet"] | None = "imagenet"
    """`imagenet`, or null for random weights: the same architecture as a control."""
    layers: Literal[-1] = -1
    """One feature map is given; `stride` chooses it."""
    image_size: int = Field(default=224, ge=64, le=1024)
    """Pixels of a side, a multiple of 32. The weights were trained at 224."""
    stride: Literal[16, 32] = 16
    """Pixels between neighbouring tokens. 16: 112 channels; 32: 320 channels."""

    @field_validator("image_size")
    @classmethod
    def _multiple(cls, value: int) -> int:
        if value % 32:
            raise ValueError(
                f"image_size must be a multiple of 32, given {value}; the nearest is {round(value / 32) * 32}"
            )
        return value


class EfficientNetLite0(Encoder):
    """The last feature map of a stride, each position a token. Convolutions have no prefix token."""

    Config = EfficientNetConfig
    config: EfficientNetConfig

    def __init__(self, config: EfficientNetConfig) -> None:
        super().__init__(config)
        self.trunk = _trunk(config.stride).to(memory_format=torch.channels_last)

    @classmethod
    def spec(cls, config: EfficientNetConfig) -> EncoderSpec:  # type: ignore[override]
        size, grid = config.image_size, config.image_size // config.stride
        parameters, flops, width = _measure(size, config.stride)
        image = ImageSpec(
            height=size,
            width=size,
            mean=(127 / 255, 127 / 255, 127 / 255),
            std=(128 / 255, 128 / 255, 128 / 255),
            interpolation="bicubic",
            native="crop",
            crop_fraction=0.875,
        )
        return EncoderSpec(image, FeatureSpec(1, (grid, grid), width), depth=1, parameters=parameters, flops=flops)

    @classmethod
    def build(cls, config: EfficientNetConfig) -> Self:  # type: ignore[override]
        encoder = cls(config)
        if config.pretrained == "imagenet":
            load_imagenet(encoder.trunk)
        else:
            _calibrate(encoder.trunk, config.image_size)
        return encoder.eval()

    @classmethod
    def tiny(cls) -> Self:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return cls.build(EfficientNetConfig(pretrained=None, image_size=64))

    def forward(self, pixels_B3HW: Tensor) -> Features:
        # depthwise convolutions run nearly twice as fast on a CPU with channels last
        map_BDhw = self.trunk(pixels_B3HW.contiguous(memory_format=torch.channels_last))
        tokens_BND = map_BDhw.flatten(2).transpose(1, 2)
        return Features(tokens_BND.unsqueeze(1), (map_BDhw.shape[2], map_BDhw.shape[3]))


def _trunk(stride: int) -> nn.Sequential:
    """The stem and the stages up to a stride; what lies behind would hold weights that nothing uses."""
    # TensorFlow's weights want its uneven `same` padding, which timm's tf_ variant has
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    return nn.Sequential(model.conv_stem, model.bn1, model.blocks[: STAGES[stride]])


@lru_cache
def _measure(size: int, stride: int) -> tuple[int, int, int]:
    """Parameters, floating-point operations for a view, and channels; no weight is made."""
    with torch.device("meta"):
        trunk = _trunk(stride).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            out = trunk(torch.empty(1, 3, size, size))
    return sum(p.numel() for p in trunk.parameters()), counter.get_total_flops(), out.shape[1]


@torch.no_grad()
def _calibrate(trunk: nn.Module, size: int) -> None:
    """Gives random weights the batch statistics of noise.

    With statistics of 0 and 1 the signal of random convolutions changes its scale from block to block, and the control
    would measure that instead of what training put into the weights.
    """
    norms = [module for module in trunk.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = None  # a plain average: one batch sets the statistics
    # noise of several scales, as natural images have
    noise = sum(
        nn.functional.interpolate(torch.randn(8, 3, n, n), size=(size, size), mode="bilinear") for n in (4, 16, size)
    )
    trunk.train()
    trunk(noise)
    trunk.eval()
