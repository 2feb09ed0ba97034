"""Encoders with one fault each: what they keep from pass to pass, and from one another; their numbers; their places."""

from __future__ import annotations

import contextlib
import socket

import torch
from torch import nn
from torch.nn import functional as F

from chiasm.features import Features
from contract_faults.encoders import GRID, WIDTH, Changed, GoodEncoder
from fault_record import Recorder

fault = Recorder("encoder")


@fault("keeps_nothing", "the graph of a pass still holds .* tensors")
class KeepsItsGraph(Changed):
    """The last features stay on the module, with all that led to them."""

    def change(self, tokens):
        self.last = tokens * 2
        return self.last / 2


@fault("keeps_nothing", "every pass leaves 1 more tensors behind")
class Hoards(Changed):
    """Every pass adds to a list."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.norms: list = []

    def change(self, tokens):
        self.norms.append(tokens.detach().norm())
        return tokens


@fault("deterministic", "a cache by shape, by address or by size")
class KeepsTheFirstMean(Changed):
    """Centres by the mean of the first batch of a shape."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.means: dict = {}

    def change(self, tokens):
        return tokens - self.means.setdefault(tokens.shape[1:], tokens.detach().mean(dim=(0, 1, 2)))


@fault("deterministic", "an input in the memory of an earlier one gives another output")
class KnowsTheAddress(GoodEncoder):
    """Features of pixels at a known address are not computed again."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.known: dict = {}

    def forward(self, pixels_B3HW):
        if torch.is_grad_enabled():
            return super().forward(pixels_B3HW)
        key = pixels_B3HW.data_ptr(), pixels_B3HW.shape
        if key not in self.known:
            self.known[key] = super().forward(pixels_B3HW), pixels_B3HW
        return self.known[key][0]


@fault("seeded", "two instances share the memory of scale")
class ScaleOfTheClass(Changed):
    """One parameter belongs to all instances."""

    scale_of_all = nn.Parameter(torch.ones(WIDTH))

    def __init__(self, config) -> None:
        super().__init__(config)
        self.scale = ScaleOfTheClass.scale_of_all

    def change(self, tokens):
        return tokens * self.scale


@fault("no_side_effects", "forward in training mode puts .* into eval mode")
class EvalsItself(GoodEncoder):
    """A pass ends the training mode."""

    def forward(self, pixels_B3HW):
        return super().forward(pixels_B3HW) if not self.eval().training else None


@fault("frozen", r"eval\(\) does not return the module|train\(\) does not return the module")
class TrainReturnsNothing(GoodEncoder):
    """Calls of `train` cannot be chained."""

    def train(self, mode=True):
        super().train(mode)

    @classmethod
    def build(cls, config):
        return cls(config)


@fault("frozen", r"requires a gradient again after train\(\)")
class ThawsWhenTrained(GoodEncoder):
    """What was frozen learns again after `train()`."""

    def train(self, mode=True):
        return super().train(mode).requires_grad_(mode)


@fault("precision", "in float32, forward computes .* in torch.bfloat16")
class RoundsToHalf(Changed):
    """Features pass through bfloat16."""

    def change(self, tokens):
        return tokens.bfloat16().to(tokens.dtype)


@fault("tiny", "asks the network for .*; wanted no download")
class AsksTheNetwork(GoodEncoder):
    """Tries a download, and goes on without."""

    @classmethod
    def tiny(cls):
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", 9), timeout=0.1).close()
        return super().tiny()


@fault("tiny", "holds .* numbers, wanted a small instance")
class NotSmall(Changed):
    """A tiny instance of 100 MB."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.register_buffer("table", torch.zeros(25_000_000), persistent=False)


@fault("flops", "; a multiply-add counts two")
class CountsMultiplyAdds(GoodEncoder):
    """Half of the operations."""

    @classmethod
    def flops(cls, blocks):
        return super().flops(blocks) // 2


@fault("flops", "with layers: 1 spec states flops")
class CountsEveryBlock(GoodEncoder):
    """The operations of the whole tower, whatever layer is selected."""

    depth = 6

    @classmethod
    def flops(cls, blocks):
        return super().flops(cls.depth)


@fault("places", r"the token of the cell \(3, 3\) .* does not stand for it")
class LosesTheLastPatch(Changed):
    """The last token is the mean of the others."""

    def change(self, tokens):
        return torch.cat([tokens[:, :, :-1], tokens[:, :, :-1].mean(dim=2, keepdim=True)], dim=2)


@fault("layers", r"layers: \(2, 1\) does not give .* at blocks \[2, 1\], in that order; it looks like blocks \[1, 2\]")
class SortsItsLayers(GoodEncoder):
    """Layers come in the order of the tower, not in the order asked."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.layers = tuple(sorted(self.layers))


@fault.correct
class KeepsAMap(GoodEncoder):
    """The last map of attention stays for whoever wants to look, without its graph."""

    def forward(self, pixels_B3HW):
        features = super().forward(pixels_B3HW)
        self.map_BN = F.softmax(features.tokens.detach()[:, -1].norm(dim=-1), dim=-1)
        return features


@fault.correct
class FloatsInside(Changed):
    """Normalises in float32, and in float64, whatever it is given, and gives its input's dtype."""

    def change(self, tokens):
        return Features((tokens.double() * 1.5).float().to(tokens.dtype), GRID).tokens
