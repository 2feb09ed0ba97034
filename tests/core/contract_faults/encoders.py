"""Correct encoders: a minimal one, on which the faults are built, and unusual ones that must not be rejected."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from chiasm.encoder import Encoder, EncoderConfig, EncoderSpec, select_layers
from chiasm.features import Features, FeatureSpec
from chiasm.image import ImageSpec
from fault_record import Recorder

EDGE, PATCH, WIDTH = 16, 4, 12
GRID = (EDGE // PATCH, EDGE // PATCH)

fault = Recorder("encoder")


class RandomConfig(EncoderConfig):
    pretrained: None = None


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x_BTD):
        # the mean over tokens stands for attention
        return x_BTD + self.linear(self.norm(x_BTD)) + 0.1 * x_BTD.mean(dim=1, keepdim=True)


@fault.correct
class GoodEncoder(Encoder):
    """Patches through a convolution, attention with a CLS token, and two blocks."""

    Config = RandomConfig
    prefix = 1
    depth = 2
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    native: Literal["crop", "squash"] = "crop"

    @classmethod
    def spec(cls, config):
        chosen = select_layers(config.layers, cls.depth)
        block = WIDTH * WIDTH + WIDTH + 2 * WIDTH
        parameters = PATCH * PATCH * 3 * WIDTH + WIDTH + cls.prefix * WIDTH + max(chosen) * block
        image = ImageSpec(height=EDGE, width=EDGE, mean=cls.mean, std=cls.std, native=cls.native)
        return EncoderSpec(image, FeatureSpec(len(chosen), GRID, WIDTH), cls.depth, parameters, cls.flops(max(chosen)))

    @classmethod
    def flops(cls, blocks):
        patches = GRID[0] * GRID[1]
        return 2 * patches * 3 * PATCH * PATCH * WIDTH + blocks * 2 * (patches + cls.prefix) * WIDTH * WIDTH

    def __init__(self, config) -> None:
        super().__init__(config)
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.prefix_PD = nn.Parameter(torch.randn(self.prefix, WIDTH)) if self.prefix else None
        self.layers = select_layers(config.layers, self.depth)
        self.blocks = nn.ModuleList(Block() for _ in range(max(self.layers)))

    @classmethod
    def build(cls, config):
        return cls(config)

    @classmethod
    def tiny(cls):
        return cls.build(cls.Config())

    def tokens(self, pixels_B3HW):
        tokens_BND = self.patches(pixels_B3HW).flatten(2).transpose(1, 2)
        if self.prefix_PD is None:
            return tokens_BND
        return torch.cat([self.prefix_PD.expand(len(tokens_BND), -1, -1), tokens_BND], dim=1)

    def hidden(self, pixels_B3HW):
        states, tokens_BTD = {}, self.tokens(pixels_B3HW)
        for index, block in enumerate(self.blocks, start=1):
            states[index] = tokens_BTD = block(tokens_BTD)
        return torch.stack([states[index] for index in self.layers], dim=1)

    def forward(self, pixels_B3HW):
        return Features(self.hidden(pixels_B3HW)[:, :, self.prefix :], GRID)


@fault.correct
class Registers(GoodEncoder):
    """CLS and four registers."""

    prefix = 5


@fault.correct
class NoPrefix(GoodEncoder):
    """Every token is a patch, and the published processor squashes."""

    prefix = 0
    native = "squash"


class OneLayer(EncoderConfig):
    pretrained: None = None
    layers: Literal[-1] = -1


class Single(Encoder):
    """One layer, no choice."""

    Config = OneLayer
    image, grid, width, count = ImageSpec(height=16, width=16), (4, 4), 3, 0

    @classmethod
    def spec(cls, config):
        return EncoderSpec(cls.image, FeatureSpec(1, cls.grid, cls.width), 1, cls.count, 0)

    @classmethod
    def build(cls, config):
        return cls(config)

    @classmethod
    def tiny(cls):
        return cls(cls.Config())

    def forward(self, pixels_B3HW):
        return Features(self.map(pixels_B3HW).flatten(2).transpose(1, 2)[:, None], self.grid)


@fault.correct
class NoParameters(Single):
    """The mean colour of each cell, on a grid that is not square."""

    image, grid = ImageSpec(height=12, width=20), (3, 5)

    def map(self, pixels_B3HW):
        return F.avg_pool2d(pixels_B3HW, 4)


@fault.correct
class BatchNorms(Single):
    """A convolutional network: in training it normalises over its batch, in eval mode by its statistics."""

    width, count = 6, 3 * 6 * 16 + 6 + 12

    def __init__(self, config) -> None:
        super().__init__(config)
        self.net = nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.BatchNorm2d(6), nn.ReLU())

    def map(self, pixels_B3HW):
        return self.net(pixels_B3HW)


@fault.correct
class KeepsStatistics(BatchNorms):
    """The same with statistics that stay as they are while the rest learns."""

    def train(self, mode=True):
        super().train(mode)
        self.net[1].eval()
        return self


@fault.correct
class MakesPositions(Single):
    """Positions from a formula, kept for the next pass of a device and dtype; a constant that follows its input."""

    width, count = 6, 3 * 6 * 16 + 6

    def __init__(self, config) -> None:
        super().__init__(config)
        self.net = nn.Conv2d(3, 6, 4, 4)
        self.scale = torch.linspace(1, 2, 6)
        self.kept: dict = {}

    def map(self, pixels_B3HW):
        map_BDhw = self.net(pixels_B3HW)
        key = (map_BDhw.device, map_BDhw.dtype)
        if key not in self.kept:
            self.kept[key] = torch.arange(16.0, device=map_BDhw.device).sin().to(map_BDhw.dtype).view(4, 4)
        return map_BDhw * self.scale.to(map_BDhw).view(-1, 1, 1) + self.kept[key]


@fault.correct
class GloballyMixed(Single):
    """Random matrices mix all tokens, so nothing can be seen of places; dropout while it learns."""

    width, count = 6, 3 * 6 * 16 + 6 + 16 * 16

    def __init__(self, config) -> None:
        super().__init__(config)
        self.net = nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.Dropout(0.2))
        self.mix = nn.Parameter(torch.randn(16, 16) / 4)

    def map(self, pixels_B3HW):
        return (self.net(pixels_B3HW).flatten(2) @ self.mix).unflatten(2, (4, 4))


class Changed(GoodEncoder):
    """A correct encoder whose features pass through `change`."""

    def forward(self, pixels_B3HW):
        return Features(self.change(super().forward(pixels_B3HW).tokens), GRID)

    def change(self, tokens):
        return tokens
