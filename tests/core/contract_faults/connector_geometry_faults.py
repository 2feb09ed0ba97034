"""Fusions and adapters with one fault each that shows on other geometries than their own, or in single places."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from chiasm.features import SequenceSpec, TokenSequence
from contract_faults.adapters import GoodAdapter, Pools
from contract_faults.fusions import GoodFusion, Interpolates
from fault_record import Recorder

adapter, fusion = Recorder("adapter"), Recorder("fusion")

SQUARE = SequenceSpec(16, 5, (4, 4))


@adapter("any_geometry", "a (wide|tall) grid.*tokens seem to stand")
class PoolsSquares(Pools):
    """Takes columns for rows, which a square grid does not show."""

    @classmethod
    def tiny(cls):
        return cls(cls.Config(), SQUARE, 7)

    def mix(self, x_BND):
        rows, columns = self.sequence.grid
        map_BDhw = x_BND.transpose(1, 2).unflatten(2, (columns, rows))
        return self.matrix(F.avg_pool2d(map_BDhw, 2).flatten(2).transpose(1, 2))


@adapter("any_geometry", "as many tokens as a square.*tokens seem to stand")
class TakesTheRoot(Pools):
    """Takes the root of the number of tokens for the edge, where it is whole."""

    @classmethod
    def tiny(cls):
        return cls(cls.Config(), SQUARE, 7)

    def mix(self, x_BND):
        edge = int(x_BND.shape[1] ** 0.5)
        grid = (edge, edge) if edge * edge == x_BND.shape[1] else self.sequence.grid
        return self.matrix(F.avg_pool2d(x_BND.transpose(1, 2).unflatten(2, grid), 2).flatten(2).transpose(1, 2))


@adapter("refuses_other_sequences", "as many tokens on another grid")
class TakesAnyGrid(Pools):
    """Compares the number of tokens and not their grid, which it pools by."""

    def forward(self, sequence):
        if sequence.tokens.shape[1:] != (self.sequence.tokens, self.sequence.width):
            raise ValueError(f"built for {self.sequence}, given {sequence.spec}")
        return super().forward(type(sequence)(sequence.tokens, self.sequence.grid))


@adapter("input_gradient", "changes the output and no gradient reaches it there")
class DetachesHalf(GoodAdapter):
    """Every second token is detached."""

    def mix(self, x_BND):
        even_N1 = torch.arange(x_BND.shape[1]).unsqueeze(1) % 2 == 0
        return super().mix(torch.where(even_N1, x_BND, x_BND.detach()))


@adapter("input_gradient", "in training mode no gradient reaches the sequence")
class DetachesInTraining(GoodAdapter):
    """What is before it learns from nothing."""

    def mix(self, x_BND):
        return super().mix(x_BND.detach() if self.training else x_BND)


class AlignsBy(Interpolates):
    """A correct fusion whose grids are brought to the first one's by `align`."""

    def forward(self, features):
        self.check(features)
        parts = [self.align(item, self.channels(item)) for item in features]
        return TokenSequence(torch.cat(parts, dim=-1), self.out.grid)

    def align(self, item, tokens_BND):
        map_BDhw = tokens_BND.transpose(1, 2).unflatten(2, item.grid)
        return F.interpolate(map_BDhw, self.out.grid, mode="bilinear").flatten(2).transpose(1, 2)


@fusion("any_geometry", "tokens seem to stand")
class AlignsAlongTheLine(AlignsBy):
    """Brings unequal grids to one length along the sequence."""

    def align(self, item, tokens_BND):
        return F.interpolate(tokens_BND.transpose(1, 2), self.out.tokens, mode="linear").transpose(1, 2)


@fusion("any_geometry", "grids of as many tokens, one wide and one tall.*tokens seem to stand")
class AlignsByCount(AlignsBy):
    """Takes grids of as many tokens for equal."""

    def align(self, item, tokens_BND):
        return tokens_BND if tokens_BND.shape[1] == self.out.tokens else super().align(item, tokens_BND)


@fusion("uses_every_encoder", "no gradient reaches encoder 1")
class TwoClosedGates(GoodFusion):
    """The second encoder stands behind two gates, both at zero, so neither ever opens."""

    def __init__(self, config, features, llm_width) -> None:
        super().__init__(config, features, llm_width)
        self.gates = nn.Parameter(torch.zeros(2))

    def mix(self, parts):
        first, *others = [p(part) for p, part in zip(self.projections, parts, strict=True)]
        return first * (1 + self.gates[0] * self.gates[1]) + self.gates[0] * self.gates[1] * sum(others)


@fusion.correct
class OneClosedGate(GoodFusion):
    """All but the first encoder enter through a gate that starts at zero (Flamingo's), and opens."""

    def __init__(self, config, features, llm_width) -> None:
        super().__init__(config, features, llm_width)
        self.gate = nn.Parameter(torch.zeros(())) if len(features) > 1 else None

    def mix(self, parts):
        first, *others = [p(part) for p, part in zip(self.projections, parts, strict=True)]
        return first if self.gate is None else first + self.gate.tanh() * sum(others)


@adapter.correct
class TakesEveryThird(GoodAdapter):
    """Leaves tokens out on purpose, and states no grid; one matrix without a bias."""

    def __init__(self, config, sequence, llm_width) -> None:
        super().__init__(config, sequence, llm_width)
        self.matrix = nn.Linear(sequence.width, llm_width, bias=False)

    @classmethod
    def spec(cls, config, sequence, llm_width):
        return SequenceSpec(-(-sequence.tokens // 3), llm_width)

    def mix(self, x_BND):
        return super().mix(x_BND)[:, ::3]


@adapter.correct
class OneCell(GoodAdapter):
    """Built on a grid of one cell."""

    @classmethod
    def tiny(cls):
        return cls(cls.Config(), SequenceSpec(1, 3, (1, 1)), 1)

    def mix(self, x_BND):
        return self.matrix(x_BND)
