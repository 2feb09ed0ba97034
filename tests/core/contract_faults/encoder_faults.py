"""Encoders with one fault each: what they state, and what they give."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import ConfigDict
from torch import nn

from chiasm.encoder import EncoderConfig
from chiasm.features import Features, FeatureSpec
from contract_faults.encoders import EDGE, GRID, PATCH, WIDTH, Block, GoodEncoder, NoPrefix, RandomConfig, Registers
from fault_record import Recorder

fault = Recorder("encoder")


@fault("features", r"forward returned \(1, 1, 17, 12\), declared \(B, L, N, D\) = \(1, 1, 16, 12\)")
class KeepsCls(GoodEncoder):
    """All prefix and patch tokens, on a grid that holds them."""

    def forward(self, pixels_B3HW):
        return Features(self.hidden(pixels_B3HW), (1, GRID[0] * GRID[1] + 1))


@fault("features", r"do not fit the grid \(4, 4\).*patch tokens only \(at .*encoder_faults\.py:\d+, in forward\)")
class KeepsClsOnTheGrid(GoodEncoder):
    """CLS beside the patches on the declared grid: `Features` refuses it."""

    def forward(self, pixels_B3HW):
        return Features(self.hidden(pixels_B3HW), GRID)


@fault("places", r"on the grid \(4, 4\) behind 1 prefix tokens")
class DeclaresCls(GoodEncoder):
    """CLS is kept, and the stated geometry agrees: one row of 17."""

    @classmethod
    def spec(cls, config):
        right = super().spec(config)
        return replace(right, features=FeatureSpec(right.features.layers, (1, 17), WIDTH))

    def forward(self, pixels_B3HW):
        return Features(self.hidden(pixels_B3HW), (1, 17))


@fault("places", "1 places late, behind a prefix token")
class DropsTheWrongToken(GoodEncoder):
    """CLS stays, the last patch goes: the count is right."""

    def forward(self, pixels_B3HW):
        return Features(self.hidden(pixels_B3HW)[:, :, :-1], GRID)


@fault("places", "4 places late, behind a prefix token")
class ForgetsRegisters(Registers):
    """Drops CLS alone and cuts to the count that is wanted."""

    def forward(self, pixels_B3HW):
        return Features(self.hidden(pixels_B3HW)[:, :, 1:17], GRID)


@fault("places", r"on the grid \(4, 4\) without its first patch")
class DropsAPatch(NoPrefix):
    """Drops token 0 where there is no CLS, and states the 15 that remain."""

    @classmethod
    def spec(cls, config):
        right = super().spec(config)
        return replace(right, features=FeatureSpec(right.features.layers, (3, 5), WIDTH))

    def forward(self, pixels_B3HW):
        return Features(self.hidden(pixels_B3HW)[:, :, 1:], (3, 5))


@fault("places", "column by column, wanted row by row")
class Transposes(GoodEncoder):
    """Tokens column by column."""

    def tokens(self, pixels_B3HW):
        return super().tokens(pixels_B3HW.transpose(2, 3))


@fault("places", "rows from the bottom")
class Flips(GoodEncoder):
    """The image upside down."""

    def tokens(self, pixels_B3HW):
        return super().tokens(pixels_B3HW.flip(2))


@fault("features", r"forward returned \(1, 1, 16, 12\), declared .* = \(1, 1, 16, 24\)")
class WrongWidth(GoodEncoder):
    """States twice its width."""

    @classmethod
    def spec(cls, config):
        right = super().spec(config)
        return replace(right, features=FeatureSpec(right.features.layers, GRID, 2 * WIDTH))


@fault("features", r"in training mode forward returned \(3, 1, 8, 12\), declared .* \(3, 1, 16, 12\)")
class DropsTokensInTraining(GoodEncoder):
    """Half of the tokens while it learns, on half of the rows."""

    def forward(self, pixels_B3HW):
        features = super().forward(pixels_B3HW)
        return Features(features.tokens[:, :, :8], (2, 4)) if self.training else features


@fault("features", "forward returned NaN or infinity")
class DividesByZero(GoodEncoder):
    """A normalisation without its small number."""

    def hidden(self, pixels_B3HW):
        hidden = super().hidden(pixels_B3HW)
        return hidden / (hidden - hidden.amin(dim=-1, keepdim=True)).amin(dim=-1, keepdim=True)


@fault("finite", "forward of a black and a white image gives NaN or infinity")
class Standardises(GoodEncoder):
    """Each image by its own contrast, which a plain one has not."""

    def tokens(self, pixels_B3HW):
        contrast = pixels_B3HW.std(dim=(1, 2, 3), keepdim=True) - pixels_B3HW.mean((2, 3), keepdim=True).std(
            1, keepdim=True, correction=0
        )
        plain = (pixels_B3HW == pixels_B3HW[:, :, :1, :1]).all(dim=(1, 2, 3), keepdim=True)
        return super().tokens(pixels_B3HW / contrast.masked_fill(plain, 0))


@fault("parameters", r"tiny\(\) holds \d+ parameters, its spec states")
class MiscountsParameters(GoodEncoder):
    """Does not count its biases."""

    @classmethod
    def spec(cls, config):
        right = super().spec(config)
        return replace(right, parameters=right.parameters - WIDTH)


@fault("layers", r"with layers: -2 an instance holds \d+ parameters")
class CountsAllBlocks(GoodEncoder):
    """Counts its parameters right for the default layer alone."""

    @classmethod
    def spec(cls, config):
        return replace(super().spec(config), parameters=super().spec(cls.Config()).parameters)


class PatchConfig(RandomConfig):
    patch: Literal[4, 8] = 4


@fault("options", r"with patch = 8 forward returned .* declared")
class CountsTokensForTheDefault(GoodEncoder):
    """The stated grid is that of the default patch."""

    Config = PatchConfig

    @classmethod
    def spec(cls, config):
        right = super().spec(config)
        return replace(right, parameters=right.parameters + 3 * WIDTH * (config.patch**2 - PATCH**2))

    def __init__(self, config) -> None:
        super().__init__(config)
        self.patches = nn.Conv2d(3, WIDTH, config.patch, config.patch)

    def forward(self, pixels_B3HW):
        edge = EDGE // self.config.patch
        return Features(self.hidden(pixels_B3HW)[:, :, 1:], (edge, edge))


@fault("options", r"with patch = 8 forward of .* raised ValueError")
class BuildsWhatCannotRun(CountsTokensForTheDefault):
    """An option that is offered fails after the plan."""

    def forward(self, pixels_B3HW):
        return Features(self.hidden(pixels_B3HW)[:, :, 1:], GRID)


@fault("spec", "build.* gives a BuildsTheDefault with .*wanted the configuration that it was given")
class BuildsTheDefault(GoodEncoder):
    """The asked options are thrown away."""

    @classmethod
    def build(cls, config):
        return cls(RandomConfig())

    @classmethod
    def tiny(cls):
        return cls(RandomConfig(layers=-2))


@fault("spec", "spec draws random numbers: it seems to make weights")
class MakesWeightsToPlan(GoodEncoder):
    """Counts parameters by making them."""

    @classmethod
    def spec(cls, config):
        nn.Linear(2, 2)
        return super().spec(config)


@fault("spec", "spec makes tensors of 1200 numbers, an instance has 960 parameters")
class AllocatesToPlan(GoodEncoder):
    """The same without a random number."""

    @classmethod
    def spec(cls, config):
        torch.zeros(100, WIDTH)
        return super().spec(config)


@fault("layers", "layers: all gives the same features for blocks 1 and the next")
class IgnoresLayers(GoodEncoder):
    """Always gives the last block."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.layers = (2,) * len(self.layers)
        self.blocks = nn.ModuleList(Block() for _ in range(2))


@fault("layers", r"layers: \(2, 1\) does not give what `all` gives at blocks \[2, 1\]")
class SortsLayers(GoodEncoder):
    """Gives layers in the order of the blocks."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.layers = tuple(sorted(self.layers))


@fault("layers", r"layers: \(-1, -2\) does not give what `all` gives at blocks \[2, 1\]")
class CountsListsFromTheFront(GoodEncoder):
    """Takes the sizes of negative indices in a list."""

    def __init__(self, config) -> None:
        super().__init__(config)
        if isinstance(config.layers, tuple) and min(config.layers) < 0:
            self.layers = tuple(-index for index in config.layers)


@fault("layers", "layers: 3 is accepted although spec states 2 blocks")
class AcceptsAnyLayer(GoodEncoder):
    """Takes a layer that does not exist for the last."""

    @classmethod
    def spec(cls, config):
        return super().spec(RandomConfig())

    def __init__(self, config) -> None:
        super().__init__(RandomConfig())


@fault("layers", "layers: 3 is accepted although spec states 2 blocks|layers: all gives 3 layers")
class OneBlockMore(GoodEncoder):
    """Counts the patch embedding as a block."""

    @classmethod
    def spec(cls, config):
        return replace(super().spec(config), depth=2)

    depth = 3


@fault("sees_the_image", "forward does not use its pixels")
class Blind(GoodEncoder):
    """Looks at nothing."""

    def forward(self, pixels_B3HW):
        return super().forward(torch.zeros_like(pixels_B3HW))


class LooseConfig(EncoderConfig):
    model_config = ConfigDict(frozen=False, extra="ignore")
    pretrained: None = None


@fault("config", "can be changed after it was made")
class TakesAnyOption(GoodEncoder):
    """A misspelt option is ignored."""

    Config = LooseConfig


class SetConfig(RandomConfig):
    kept: object = None


@fault("config", "round trip through JSON")
class ForgetsItsConfig(GoodEncoder):
    """An option that no file can hold."""

    Config = SetConfig

    @classmethod
    def tiny(cls):
        return cls(SetConfig(kept=frozenset({1})))


@fault("missing_checkpoint", "a run would train on random weights")
class IgnoresPretrained(GoodEncoder):
    """Random weights whatever checkpoint is asked."""

    Config = EncoderConfig


@fault("features", r"AttributeError: .*no_such_part.*encoder_faults\.py:\d+, in forward")
class Crashes(GoodEncoder):
    """An ordinary mistake."""

    def forward(self, pixels_B3HW):
        return self.no_such_part(pixels_B3HW)
