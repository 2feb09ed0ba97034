"""Correct adapters, and adapters with one fault each."""

from __future__ import annotations

import torch
from pydantic import PositiveInt
from torch import nn
from torch.nn import functional as F

from chiasm.adapter import Adapter
from chiasm.errors import CombinationError
from chiasm.features import SequenceSpec, TokenSequence
from chiasm.settings import Settings
from fault_record import Recorder

fault = Recorder("adapter")


@fault.correct
class GoodAdapter(Adapter):
    """Centres an image's tokens and projects them, with dropout while it learns."""

    def __init__(self, config, sequence, llm_width) -> None:
        super().__init__(config, sequence, llm_width)
        self.dropout = nn.Dropout(0.1)
        self.matrix = nn.Linear(sequence.width, llm_width)

    @classmethod
    def spec(cls, config, sequence, llm_width):
        return SequenceSpec(sequence.tokens, llm_width, sequence.grid)

    @classmethod
    def tiny(cls):
        return cls(cls.Config(), SequenceSpec(8, 5, (2, 4)), 7)

    def forward(self, sequence):
        if sequence.spec != self.sequence:
            raise ValueError(f"built for {self.sequence}, given {sequence.spec}")
        return TokenSequence(self.mix(sequence.tokens), self.out.grid)

    def mix(self, x_BND):
        return self.matrix(self.dropout(x_BND - 0.5 * x_BND.mean(dim=1, keepdim=True)))


@fault.correct
class Pools(GoodAdapter):
    """A quarter of the tokens, on grids of even edges alone."""

    @classmethod
    def spec(cls, config, sequence, llm_width):
        if sequence.grid is None or sequence.grid[0] % 2 or sequence.grid[1] % 2:
            raise CombinationError(f"wanted a grid of even edges, given {sequence.grid}; choose another image size")
        return SequenceSpec(sequence.tokens // 4, llm_width, (sequence.grid[0] // 2, sequence.grid[1] // 2))

    @classmethod
    def tiny(cls):
        return cls(cls.Config(), SequenceSpec(32, 5, (4, 8)), 7)

    def mix(self, x_BND):
        map_BDhw = x_BND.transpose(1, 2).unflatten(2, self.sequence.grid)
        return super().mix(F.avg_pool2d(map_BDhw, 2).flatten(2).transpose(1, 2))


class QueryConfig(Settings):
    queries: PositiveInt = 3


@fault.correct
class Queries(GoodAdapter):
    """Learned queries look at the tokens; their number is an option, and they have no grid."""

    Config = QueryConfig

    def __init__(self, config, sequence, llm_width) -> None:
        super().__init__(config, sequence, llm_width)
        self.queries_MD = nn.Parameter(torch.randn(config.queries, sequence.width))

    @classmethod
    def spec(cls, config, sequence, llm_width):
        return SequenceSpec(config.queries, llm_width)

    def mix(self, x_BND):
        return super().mix((self.queries_MD @ x_BND.transpose(1, 2)).softmax(dim=-1) @ x_BND)


@fault.correct
class StartsAsZero(GoodAdapter):
    """A residual part that starts as nothing, so that its first matrix has no gradient in the first step."""

    def __init__(self, config, sequence, llm_width) -> None:
        super().__init__(config, sequence, llm_width)
        self.inner, self.outer = nn.Linear(sequence.width, 9), nn.Linear(9, llm_width)
        nn.init.zeros_(self.outer.weight)

    def mix(self, x_BND):
        return super().mix(x_BND) + self.outer(F.gelu(self.inner(x_BND)))


@fault.correct
class SharesAMatrix(GoodAdapter):
    """One matrix under two names."""

    def __init__(self, config, sequence, llm_width) -> None:
        super().__init__(config, sequence, llm_width)
        self.before = nn.Linear(sequence.width, sequence.width)
        self.after = self.before

    def mix(self, x_BND):
        return super().mix(self.after(F.gelu(self.before(x_BND))))


@fault.correct
class Passes(GoodAdapter):
    """Nothing to learn: the width must be right already."""

    @classmethod
    def spec(cls, config, sequence, llm_width):
        if sequence.width != llm_width:
            raise CombinationError(f"the sequence has width {sequence.width}, the language model {llm_width}")
        return sequence

    @classmethod
    def tiny(cls):
        return cls(cls.Config(), SequenceSpec(8, 7, (2, 4)), 7)

    def __init__(self, config, sequence, llm_width) -> None:
        Adapter.__init__(self, config, sequence, llm_width)

    def mix(self, x_BND):
        return x_BND


@fault("refuses_other_sequences", "images could be mixed")
class ViewMixes(GoodAdapter):
    """Reshapes with -1 over the batch, as released code does: a divisible count of tokens gives more images."""

    def forward(self, sequence):
        tokens = sequence.tokens.reshape(-1, self.sequence.tokens, self.sequence.width)
        return TokenSequence(self.mix(tokens), self.out.grid)


@fault("batch_independence", "in training mode image 0 depends on the others")
class NormalisesOverImages(GoodAdapter):
    """Mixes images in training mode only."""

    def __init__(self, config, sequence, llm_width) -> None:
        super().__init__(config, sequence, llm_width)
        self.norm = nn.BatchNorm1d(sequence.width)

    def mix(self, x_BND):
        return super().mix(self.norm(x_BND.transpose(1, 2)).transpose(1, 2))


@fault("batch_independence", "image 0 of a batch of 3 differs from the same image alone")
class AttendsAcrossImages(GoodAdapter):
    """Attention that takes the batch for the sequence, torch's default order."""

    def __init__(self, config, sequence, llm_width) -> None:
        super().__init__(config, sequence, llm_width)
        self.attention = nn.MultiheadAttention(sequence.width, 1)

    def mix(self, x_BND):
        return super().mix(self.attention(x_BND, x_BND, x_BND)[0])


@fault("any_geometry", r"one token.*returned \(2, 0, 7\), declared .* \(2, 1, 7\)")
class PoolsAway(GoodAdapter):
    """States more tokens than it gives where their number is odd."""

    @classmethod
    def spec(cls, config, sequence, llm_width):
        return SequenceSpec((sequence.tokens + 1) // 2, llm_width)

    def mix(self, x_BND):
        return super().mix(x_BND[:, : x_BND.shape[1] // 2 * 2].unflatten(1, (-1, 2)).mean(dim=2))


@fault("any_geometry", "spec accepts tokens without a grid.*; making the adapter raised|forward of 2 images raised")
class NeedsAGrid(Pools):
    """Works on a grid and does not ask for one."""

    @classmethod
    def spec(cls, config, sequence, llm_width):
        if sequence.grid is None:
            return SequenceSpec(sequence.tokens // 4, llm_width)
        return super().spec(config, sequence, llm_width)


@fault("any_geometry", "states the width 7, the language model has")
class FixesTheWidth(GoodAdapter):
    """Gives its own width whatever the language model has."""

    @classmethod
    def spec(cls, config, sequence, llm_width):
        return SequenceSpec(sequence.tokens, 7, sequence.grid)


@fault("places", "tokens seem to stand (column by column|in another order)")
class PoolsColumns(Pools):
    """Tokens come out column by column."""

    def mix(self, x_BND):
        return super().mix(x_BND).unflatten(1, self.out.grid).transpose(1, 2).flatten(1, 2)


@fault("spec", r"the grid \(2, 4\) does not hold 4 tokens")
class KeepsTheGrid(GoodAdapter):
    """Half of the tokens on the grid of all."""

    @classmethod
    def spec(cls, config, sequence, llm_width):
        return SequenceSpec(sequence.tokens // 2, llm_width, sequence.grid)

    def mix(self, x_BND):
        return super().mix(x_BND[:, ::2])


@fault("input_gradient", "no gradient reaches the sequence")
class Detaches(GoodAdapter):
    """What comes before it could not be trained."""

    def mix(self, x_BND):
        return super().mix(x_BND.detach())


@fault("gradients", r"no gradient reaches unused\.weight, unused\.bias")
class UnusedMatrix(GoodAdapter):
    """Holds a matrix that nothing uses."""

    def __init__(self, config, sequence, llm_width) -> None:
        super().__init__(config, sequence, llm_width)
        self.unused = nn.Linear(2, 2)


@fault("meta", r"matrix\.weight holds data")
class NamesADevice(GoodAdapter):
    """Cannot be counted without being made."""

    def __init__(self, config, sequence, llm_width) -> None:
        super().__init__(config, sequence, llm_width)
        self.matrix = nn.Linear(sequence.width, llm_width, device="cpu")


@fault("spec", "returned torch.float64, wanted torch.float32")
class Float64(GoodAdapter):
    """Computes and returns in double precision."""

    def mix(self, x_BND):
        return super().mix(x_BND).double()


@fault("finite", "gives .* a gradient that is not finite|gives NaN or infinity")
class DividesByTheNorm(GoodAdapter):
    """A norm of zero."""

    def mix(self, x_BND):
        return super().mix(x_BND / x_BND.norm(dim=-1, keepdim=True))


@fault("options", r"with queries = 6 forward returned \(2, 3, 7\), declared .* \(2, 6, 7\)")
class IgnoresItsOption(Queries):
    """Always three queries."""

    def __init__(self, config, sequence, llm_width) -> None:
        super().__init__(config, sequence, llm_width)
        self.queries_MD = nn.Parameter(torch.randn(3, sequence.width))


@fault("deterministic", "is dropout or other noise active")
class DropsInEval(GoodAdapter):
    """Attention with dropout that does not ask for the mode."""

    def mix(self, x_BND):
        return super().mix(F.scaled_dot_product_attention(x_BND, x_BND, x_BND, dropout_p=0.5))


@fault("bfloat16", "in bfloat16 raised RuntimeError")
class MakesFloat32(GoodAdapter):
    """Adds positions of a fixed dtype before its matrix."""

    def mix(self, x_BND):
        return super().mix(x_BND + torch.arange(x_BND.shape[1], dtype=torch.float32, device=x_BND.device)[:, None])


@fault("device", "make it on the device of the input")
class PositionsOnTheCpu(GoodAdapter):
    """Looks positions up with indices that are always on the CPU."""

    def __init__(self, config, sequence, llm_width) -> None:
        super().__init__(config, sequence, llm_width)
        self.positions = nn.Embedding(sequence.tokens, sequence.width)

    def mix(self, x_BND):
        return super().mix(x_BND + self.positions(torch.arange(x_BND.shape[1])))


@fault("state", "what was computed from old weights is kept")
class KeepsItsProduct(GoodAdapter):
    """Folds its matrix once in eval mode."""

    folded: torch.Tensor | None = None

    def mix(self, x_BND):
        if self.training:
            return super().mix(x_BND)
        if self.folded is None or self.folded.dtype != x_BND.dtype or self.folded.device != x_BND.device:
            self.folded = self.matrix.weight.detach().clone()
        return F.linear(x_BND - 0.5 * x_BND.mean(dim=1, keepdim=True), self.folded) + self.matrix.bias


@fault("in_a_model", "frozen in a model that is trained, still in training mode")
class TrainsItsChild(GoodAdapter):
    """Puts a part back into training mode after eval."""

    def eval(self):
        super().eval()
        self.dropout.train()
        return self
