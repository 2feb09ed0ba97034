"""Encoders with one fault each: how they are made, moved and saved, and what else they touch."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from torch import nn

from contract_faults.encoders import WIDTH, Changed, GoodEncoder
from fault_record import Recorder

fault = Recorder("encoder")


@fault("state", "neither a parameter nor a persistent buffer")
class HiddenState(Changed):
    """A random constant that is in no state dict."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.register_buffer("extra", torch.randn(WIDTH), persistent=False)

    def change(self, tokens):
        return tokens + self.extra


@fault("state", "what was computed from old weights is kept")
class FoldsItsWeightsOnce(GoodEncoder):
    """Keeps a product of its weights that loading a checkpoint does not renew."""

    folded: torch.Tensor | None = None

    def hidden(self, pixels_B3HW):
        if self.training or (torch.is_grad_enabled() and self.folded is None):
            self.folded = self.prefix_PD.detach().clone()
        return super().hidden(pixels_B3HW) + (0 if self.folded is None else self.folded.to(pixels_B3HW).mean())


@fault("fixed_tensors", r"forward makes or replaces extra: make every parameter and buffer in __init__")
class MakesParametersLate(Changed):
    """A parameter that no optimiser will know."""

    def change(self, tokens):
        if not hasattr(self, "extra"):
            self.extra = nn.Parameter(torch.zeros(WIDTH, dtype=tokens.dtype, device=tokens.device))
        return tokens + self.extra


@fault("tiny", r"lazy\.weight of tiny\(\) has no shape before the first pass")
class LazyWeights(Changed):
    """The size of a matrix is left to the first batch."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.lazy = nn.LazyLinear(WIDTH)

    def change(self, tokens):
        return self.lazy(tokens)


@fault("bfloat16", r"forward of torch.bfloat16 pixels .* RuntimeError: .*encoder_effect_faults\.py:\d+, in hidden")
@fault("device", r"gives mm a tensor of shape \(12, 12\) that is on the CPU .*encoder_effect_faults\.py:\d+, in hidden")
class Unmovable(GoodEncoder):
    """A matrix that is no parameter follows no move."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.matrix = torch.eye(WIDTH)

    def hidden(self, pixels_B3HW):
        return super().hidden(pixels_B3HW) @ self.matrix


@fault("device", "register it as a parameter or buffer, or make it on the device of the input")
class MakesPositionsOnTheCpu(Changed):
    """Names no device for what it makes in forward."""

    def change(self, tokens):
        return tokens + torch.arange(tokens.shape[2]).to(tokens.dtype).unsqueeze(1)


@fault("device", "that is on the CPU|forward returned a tensor on cpu")
class BringsItHome(Changed):
    """Hands its features back on the CPU."""

    def change(self, tokens):
        return tokens.to("cpu")


@fault("bfloat16", "is off by .* of the float32 output's norm, allowed 0.1")
class Overflows(GoodEncoder):
    """Subtracts numbers that bfloat16 cannot tell apart."""

    def tokens(self, pixels_B3HW):
        return super().tokens(pixels_B3HW) + 4096 - 4096


@fault("bfloat16", "moved to bfloat16, forward of bfloat16 returned torch.float32")
class AlwaysFloat32(Changed):
    """Whatever its weights are."""

    def change(self, tokens):
        return tokens.float()


@fault("tiny", "is torch.bfloat16, wanted torch.float32")
class HalfPrecision(GoodEncoder):
    """Weights in bfloat16 from the start."""

    @classmethod
    def build(cls, config):
        return cls(config).to(torch.bfloat16)


@fault("seeded", "from different seeds hold the same .*do not seed within build")
class SeedsItself(GoodEncoder):
    """Every seed of a study would be one."""

    @classmethod
    def build(cls, config):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return cls(config)


@fault("seeded", "building seeds torch's global generator")
class ReseedsEverybody(GoodEncoder):
    """Leaves the global generator seeded."""

    @classmethod
    def build(cls, config):
        made = cls(config)
        torch.default_generator.manual_seed(0)
        return made


@fault("seeded", "two builds from the same seed differ in prefix_PD")
class OwnGenerator(GoodEncoder):
    """Weights from the clock."""

    def __init__(self, config) -> None:
        super().__init__(config)
        generator = torch.Generator()
        generator.seed()
        with torch.no_grad():
            self.prefix_PD.copy_(torch.randn(1, WIDTH, generator=generator))


@fault("no_side_effects", "forward in eval mode draws or seeds torch's generator")
class SeedsInForward(Changed):
    """Makes its noise repeatable at everybody's cost."""

    def change(self, tokens):
        torch.default_generator.manual_seed(0)
        return tokens + 0.01 * torch.randn_like(tokens)


@fault("no_side_effects", "forward in training mode seeds NumPy's random")
class SeedsNumpyInTraining(Changed):
    """The same numbers in every step."""

    def change(self, tokens):
        if self.training:
            np.random.seed(0)
        return tokens


@fault("no_side_effects", "forward in eval mode draws or seeds Python's random")
class DrawsInEval(Changed):
    """Throws a coin that it does not need."""

    def change(self, tokens):
        random.random()
        return tokens


@fault("no_side_effects", "changes torch's default dtype for the whole process")
class ChangesTheDefault(GoodEncoder):
    """Sets a global option when it is made."""

    @classmethod
    def build(cls, config):
        made = cls(config)
        torch.set_default_dtype(torch.float64)
        return made


@fault("no_side_effects", r"writes features\.pt into the working directory")
class DumpsItsFeatures(Changed):
    """Left over from debugging."""

    def change(self, tokens):
        Path("features.pt").write_bytes(b"")
        return tokens


@fault("no_side_effects", r"prints 'torch\.Size")
class Prints(Changed):
    """Left over from debugging."""

    def change(self, tokens):
        print(tokens.shape)
        return tokens


@fault("no_side_effects", "forward changes the configuration that it was made from")
class EditsItsConfig(Changed):
    """Writes into a frozen model."""

    def change(self, tokens):
        self.config.__dict__["layers"] = (1, 2)
        return tokens


@fault("inputs_unchanged", r"forward in eval mode changes its input \[0\] in place")
class WorksInPlace(GoodEncoder):
    """Centres the pixels that it was given."""

    def tokens(self, pixels_B3HW):
        return super().tokens(pixels_B3HW.sub_(pixels_B3HW.mean((2, 3), keepdim=True)))
