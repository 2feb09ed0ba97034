"""Correct fusions, and fusions with one fault each."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from chiasm.errors import CombinationError
from chiasm.features import FeatureSpec, SequenceSpec, TokenSequence
from chiasm.fusion import Fusion
from chiasm.settings import Settings
from fault_record import Recorder

fault = Recorder("fusion")


class Checked(Fusion):
    """What all have in common: the geometry is looked at."""

    @classmethod
    def tiny(cls):
        return cls(cls.Config(), [FeatureSpec(1, (2, 3), 4), FeatureSpec(2, (2, 3), 5)], 6)

    def check(self, features):
        given = tuple(item.spec for item in features)
        if given != self.features or len({len(item.tokens) for item in features}) > 1:
            raise ValueError(f"built for {self.features}, given {given}")

    def forward(self, features):
        self.check(features)
        return TokenSequence(self.mix([self.channels(item) for item in features]), self.out.grid)

    def channels(self, item):
        return item.tokens.transpose(1, 2).flatten(2)


@fault.correct
class GoodFusion(Checked):
    """Projects each encoder and sums; grids must be equal."""

    def __init__(self, config, features, llm_width) -> None:
        super().__init__(config, features, llm_width)
        self.projections = nn.ModuleList(nn.Linear(f.layers * f.width, llm_width) for f in features)

    @classmethod
    def spec(cls, config, features, llm_width):
        if not features or len({f.grid for f in features}) > 1:
            raise CombinationError(f"wanted equal grids of one encoder or more, given {[f.grid for f in features]}")
        return SequenceSpec(features[0].tokens, llm_width, features[0].grid)

    def mix(self, parts):
        return sum(projection(part) for projection, part in zip(self.projections, parts, strict=True))


@fault.correct
class JoinsTokens(GoodFusion):
    """One encoder's tokens behind the other's: no grid, and grids may differ."""

    @classmethod
    def spec(cls, config, features, llm_width):
        if not features:
            raise CombinationError("wanted one encoder or more, given none")
        return SequenceSpec(sum(f.tokens for f in features), llm_width)

    def mix(self, parts):
        return torch.cat([p(part) for p, part in zip(self.projections, parts, strict=True)], dim=1)


@fault.correct
class Interpolates(GoodFusion):
    """Brings all grids to the first one's size and joins channels: no parameter."""

    @classmethod
    def spec(cls, config, features, llm_width):
        if not features:
            raise CombinationError("wanted one encoder or more, given none")
        return SequenceSpec(features[0].tokens, sum(f.layers * f.width for f in features), features[0].grid)

    @classmethod
    def tiny(cls):
        return cls(cls.Config(), [FeatureSpec(1, (4, 3), 4), FeatureSpec(2, (3, 5), 5)], 6)

    def __init__(self, config, features, llm_width) -> None:
        Fusion.__init__(self, config, features, llm_width)

    def mix(self, parts):
        maps = [self.map(part, f.grid) for part, f in zip(parts, self.features, strict=True)]
        resized = [F.interpolate(item, size=self.out.grid, mode="bilinear") for item in maps]
        return torch.cat(resized, dim=1).flatten(2).transpose(1, 2)

    def map(self, part, grid):
        return part.transpose(1, 2).unflatten(2, grid)


@fault.correct
class Attends(Checked):
    """The first encoder's tokens look at the second's; exactly two encoders of one layer each."""

    @classmethod
    def spec(cls, config, features, llm_width):
        if len(features) != 2 or any(f.layers > 1 for f in features):
            raise CombinationError(f"wanted two encoders of one layer each, given {features}")
        return SequenceSpec(features[0].tokens, features[0].width, features[0].grid)

    @classmethod
    def tiny(cls):
        return cls(cls.Config(), [FeatureSpec(1, (2, 3), 4), FeatureSpec(1, (3, 3), 6)], 6)

    def __init__(self, config, features, llm_width) -> None:
        super().__init__(config, features, llm_width)
        width = features[0].width
        self.attention = nn.MultiheadAttention(
            width, 2, kdim=features[1].width, vdim=features[1].width, batch_first=True, dropout=0.1
        )

    def mix(self, parts):
        return parts[0] + self.attention(parts[0], parts[1], parts[1], need_weights=False)[0]


@fault("uses_every_encoder", "no gradient reaches encoder 1")
class UsesTheFirst(GoodFusion):
    """The second encoder changes nothing."""

    def mix(self, parts):
        return super().mix([parts[0], *(part.detach() for part in parts[1:])])


@fault("any_geometry", r"no gradient reaches layer 0 of the 2 that encoder 2 gives")
class UsesTheLastLayer(GoodFusion):
    """All layers but the last are paid for and thrown away."""

    def __init__(self, config, features, llm_width) -> None:
        super().__init__(config, features, llm_width)
        self.projections = nn.ModuleList(nn.Linear(f.width, llm_width) for f in features)

    def channels(self, item):
        return item.tokens[:, -1]


@fault("any_geometry", "spec accepts unequal grids.* forward of 2 images raised")
class AssumesEqualGrids(GoodFusion):
    """Does not look at the grids before they are added."""

    @classmethod
    def spec(cls, config, features, llm_width):
        if not features:
            raise CombinationError("no encoder")
        return SequenceSpec(features[0].tokens, llm_width, features[0].grid)


@fault("any_geometry", "raised AssertionError.*; wanted a ValueError")
class AssertsGrids(GoodFusion):
    """An assertion is no message for a user."""

    @classmethod
    def spec(cls, config, features, llm_width):
        assert len({f.grid for f in features}) == 1
        return super().spec(config, features, llm_width)


@fault("any_geometry", "refuses no encoder.*without saying why")
class RefusesSilently(GoodFusion):
    """An error without a word."""

    @classmethod
    def spec(cls, config, features, llm_width):
        if not features:
            raise ValueError
        return super().spec(config, features, llm_width)


@fault("refuses_other_features", r"\(twice the tokens\).*; wanted a ValueError")
class TakesAnything(GoodFusion):
    """Never looks at what it is given."""

    def check(self, features):
        pass


@fault("spec", r"forward returned the grid \(3, 2\), declared \(2, 3\)")
class TurnsTheGrid(GoodFusion):
    """Columns for rows."""

    def forward(self, features):
        return TokenSequence(super().forward(features).tokens, (3, 2))


@fault("places", "tokens seem to stand (column by column|in another order)")
class TurnsTheTokens(GoodFusion):
    """The stated grid, and tokens column by column."""

    def mix(self, parts):
        return super().mix(parts).unflatten(1, self.out.grid).transpose(1, 2).flatten(1, 2)


@fault("places", "the features of encoder 0: tokens seem to stand in another order than row by row")
class ReadsColumnsForRows(Interpolates):
    """The map is made with height and width exchanged before it is resized."""

    def map(self, part, grid):
        return super().map(part, grid[::-1])


@fault("inputs_unchanged", r"changes its input \[0, 1\] in place")
class AddsInPlace(GoodFusion):
    """Works in the features that a cache holds."""

    def channels(self, item):
        return item.tokens.mul_(0.5).transpose(1, 2).flatten(2)


@fault("features_kept", "changes the list of features that it is given: 2 before, 1 after")
class Pops(GoodFusion):
    """Takes the features out of the caller's list."""

    def forward(self, features):
        self.check(features)
        kept = features.pop()
        return TokenSequence(self.mix([self.channels(item) for item in [*features, kept]]), self.out.grid)


@fault("memory_layout", r"not contiguous in memory \(use reshape, not view\) raised RuntimeError")
class Views(GoodFusion):
    """Takes for granted how features lie in memory."""

    def channels(self, item):
        item.tokens.view(-1)
        return super().channels(item)


@fault("batch_independence", "a softmax or a mean over the batch axis")
class WeighsOverTheBatch(GoodFusion):
    """A softmax on the wrong axis."""

    def mix(self, parts):
        mixed = super().mix(parts)
        return mixed * mixed.softmax(dim=0)


@fault("meta", "holds 66 parameters, tiny.* holds 84|it holds .* parameters, tiny")
class DependsOnTheCall(GoodFusion):
    """Grows with every instance of its class that was made."""

    made = 0

    def __init__(self, config, features, llm_width) -> None:
        super().__init__(config, features, llm_width)
        type(self).made += 1
        self.more = nn.Parameter(torch.zeros(self.made))


class WidthConfig(Settings):
    width: Literal["llm", "double"] = "llm"


@fault("options", r"with width = 'double' forward returned \(2, 6, 12\), declared .* \(2, 6, 6\)")
class StatesTheDefault(GoodFusion):
    """The stated width is that of the default."""

    Config = WidthConfig

    def __init__(self, config, features, llm_width) -> None:
        super().__init__(config, features, llm_width * (2 if config.width == "double" else 1))
        self.out = self.spec(config, self.features, llm_width)


@fault("in_a_model", r"building a model around it raised ValueError: the fusion was built for")
class RewritesItsFeatures(GoodFusion):
    """States another geometry than it was built for."""

    def __init__(self, config, features, llm_width) -> None:
        super().__init__(config, features, llm_width)
        self.features = list(self.features)

    def check(self, features):
        given = [item.spec for item in features]
        if given != self.features or len({len(item.tokens) for item in features}) > 1:
            raise ValueError(f"built for {self.features}, given {given}")


@fault("finite", "features of hundreds gives NaN or infinity")
class OverflowsAtScale(GoodFusion):
    """An exponential without its largest value taken off."""

    def mix(self, parts):
        weights = super().mix(parts).exp()
        return weights / weights.sum(dim=1, keepdim=True)


@fault("spec", "in training mode forward returned|forward of 2 images raised")
class OtherTokensInTraining(GoodFusion):
    """Drops a token while it learns."""

    def forward(self, features):
        sequence = super().forward(features)
        return TokenSequence(sequence.tokens[:, 1:]) if self.training else sequence
