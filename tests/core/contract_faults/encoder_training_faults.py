"""Encoders with one fault each: what they compute, and how they learn."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from contract_faults.encoders import WIDTH, BatchNorms, Block, Changed, GoodEncoder, RandomConfig
from fault_record import Recorder

fault = Recorder("encoder")


@fault("batch_independence", "image 0 of a batch of 3 differs from the same image alone")
class MixesTheBatch(GoodEncoder):
    """Centres over images as well."""

    def hidden(self, pixels_B3HW):
        return super().hidden(pixels_B3HW) - super().hidden(pixels_B3HW).mean(dim=(0, 2), keepdim=True)


@fault("batch_independence", "images in the order .* differ")
class LooksAtItsPlace(Changed):
    """The fourth image of a batch is treated otherwise."""

    def change(self, tokens):
        return torch.cat([tokens[:3], 2 * tokens[3:]])


@fault("deterministic", "is dropout or other noise active")
class DropoutInEval(Changed):
    """Functional dropout that does not ask for the mode."""

    def change(self, tokens):
        return F.dropout(tokens, 0.1)


@fault("deterministic", "gives another output after other inputs: forward keeps something of them")
class Remembers(Changed):
    """Adds what it saw of earlier images, as long as they are others."""

    seen: torch.Tensor | None = None

    def change(self, tokens):
        mean = tokens.detach().float().mean()
        if self.seen is None or self.training:
            self.seen = mean
        self.seen, shift = (self.seen, 0) if torch.equal(self.seen, mean) else (self.seen + mean, self.seen)
        return tokens + shift


@fault("deterministic", "a later pass overwrites an earlier output")
class HandsOutItsBuffer(Changed):
    """Writes every result into one tensor."""

    room: torch.Tensor | None = None

    def change(self, tokens):
        if torch.is_grad_enabled() and self.training:
            return tokens
        if self.room is None or self.room.shape != tokens.shape or self.room.dtype != tokens.dtype:
            self.room = torch.empty_like(tokens)
        return self.room.copy_(tokens.detach())


@fault("gradients", r"no gradient reaches blocks\.1\..*behind the last selected layer")
class UnusedBlock(GoodEncoder):
    """Holds all blocks whatever layer is asked."""

    @classmethod
    def tiny(cls):
        return cls.build(RandomConfig(layers=-2))

    def __init__(self, config) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(Block() for _ in range(2))


@fault("gradients", "does forward run under torch.no_grad")
class ForgetsToLearn(GoodEncoder):
    """Runs without a graph although it is trained."""

    @torch.no_grad()
    def forward(self, pixels_B3HW):
        return super().forward(pixels_B3HW)


@fault("gradients", r"no gradient reaches patches\.weight")
class DetachesThePatches(GoodEncoder):
    """The patch embedding stays as it is whatever a stage trains."""

    def tokens(self, pixels_B3HW):
        return super().tokens(pixels_B3HW).detach() + 0 * self.prefix_PD.sum()


@fault("gradients", "the gradient of extra is zero whatever the input")
class TouchesWithZero(Changed):
    """A parameter that does nothing, hidden from the search for unused ones."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.extra = nn.Parameter(torch.randn(WIDTH))

    def change(self, tokens):
        return tokens + 0 * self.extra


@fault("gradients", "a training step after another .*second time")
class KeepsTheGraph(Changed):
    """A running mean that drags the graph of earlier steps along."""

    kept: torch.Tensor | float = 0.0

    def change(self, tokens):
        if self.training:
            self.kept = 0.9 * self.kept + 0.1 * tokens.mean()
            return tokens - self.kept
        return tokens


@fault("gradients", r"no gradient reaches prefix_PD|keep what it computed under it")
class KeepsWhatItProjected(GoodEncoder):
    """Computes its prefix once, in an evaluation, and keeps it."""

    kept: torch.Tensor | None = None

    def tokens(self, pixels_B3HW):
        if self.kept is None or self.kept.dtype != pixels_B3HW.dtype:
            self.kept = self.prefix_PD * 1
        patches_BND = self.patches(pixels_B3HW).flatten(2).transpose(1, 2)
        return torch.cat([self.kept.expand(len(patches_BND), -1, -1), patches_BND], dim=1)


@fault("frozen", "some tensor is no registered parameter")
@fault("state", "neither a parameter nor a persistent buffer")
class HiddenParameter(Changed):
    """A learned vector in a plain list: not saved, not moved, not frozen."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.extra = [torch.randn(WIDTH, requires_grad=True)]

    def change(self, tokens):
        return tokens + self.extra[0]


@fault("frozen", "train or forward sets requires_grad|requires a gradient again after train")
class ThawsItself(GoodEncoder):
    """Training mode unfreezes it."""

    def train(self, mode=True):
        return super().train(mode).requires_grad_(mode or self.training)

    def eval(self):
        return super().train(False)


@fault("frozen", "after eval.* still in training mode: the module, patches")
class AlwaysTrains(GoodEncoder):
    """Will not go into eval mode."""

    def train(self, mode=True):
        return super().train(True)


@fault("frozen", "a forward pass in eval mode changed running")
class Stateful(GoodEncoder):
    """Updates a running mean in eval mode too."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.register_buffer("running", torch.zeros(()))

    def forward(self, pixels_B3HW):
        self.running.lerp_(pixels_B3HW.mean().float(), 0.5)
        return super().forward(pixels_B3HW)


@fault("frozen", r"a forward pass in eval mode changed net\.1\.running_mean")
class FrozenStatisticsMove(BatchNorms):
    """Batch normalisation that goes on counting when it is frozen."""

    def map(self, pixels_B3HW):
        norm = self.net[1]
        with torch.no_grad():
            F.batch_norm(self.net[0](pixels_B3HW), norm.running_mean, norm.running_var, training=True)
        return super().map(pixels_B3HW)
