"""The Perceiver resampler: learned latents that gather from the tokens.

Shape letters: B images, N tokens, M latents, D width in, W width of the latents, E width of the language model, (h, w)
a grid.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from chiasm.adapter import Adapter
from chiasm.errors import CombinationError
from chiasm.features import Grid, SequenceSpec, TokenSequence
from chiasm.settings import Settings
from chiasm_adapters._blocks import need_grid
from chiasm_adapters._geometry import check_sequence, tiny_weights
from chiasm_adapters._layers import Attention, check_heads, perceptron


class ResamplerConfig(Settings):
    """Every detail of the layers; the defaults are Flamingo's (appendix A.1.1 and its table of sizes), except that
    `width` follows the tokens."""

    tokens: PositiveInt = 64
    """M: learned latents, each a visual token."""
    depth: PositiveInt = 6
    """Layers of attention and feed-forward part."""
    width: PositiveInt | None = None
    """W, of the latents; null for the width of the tokens, any other puts a matrix before the layers."""
    heads: PositiveInt = 16
    """Attention heads; they must divide W."""
    expansion: PositiveInt = 4
    """The feed-forward part is this many times as wide inside as W."""
    activation: Literal["squared_relu", "gelu"] = "squared_relu"
    """Inside the feed-forward part: `relu(x)^2` as in Flamingo, or GELU (the exact one, by erf) as in OpenFlamingo."""
    bias: bool = False
    """Gives the matrices of the layers a bias, but for the keys, where it has no effect; OpenFlamingo has none."""
    positions: Literal["none", "sincos"] = "none"
    """Added to the tokens before the first layer: nothing, as in Flamingo, where the encoder alone tells places apart;
    or two-dimensional sines and cosines (MAE's, arXiv 2111.06377): the first half of the channels tells the row, the
    second the column, each half by sines and then cosines of `row * 10000^(-k / (W / 4))`."""


class SquaredReLU(nn.Module):
    """`relu(x)^2` (arXiv 2109.08668), of any shape."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu().square()


class ResamplerLayer(nn.Module):
    """`z + A(LN z, [LN x ; LN z])`, then `z + F(LN z)`: tokens `[B, N, W]` and latents `[B, M, W]` to `[B, M, W]`."""

    def __init__(self, config: ResamplerConfig, width: int) -> None:
        super().__init__()
        activation = nn.GELU if config.activation == "gelu" else SquaredReLU
        self.norm_tokens, self.norm_latents, self.norm = (nn.LayerNorm(width) for _ in range(3))
        self.attention = Attention(width, config.heads, config.bias)
        self.feed_forward = perceptron([width, config.expansion * width, width], config.bias, activation)

    def forward(self, x_BNW: Tensor, z_BMW: Tensor) -> Tensor:
        normed_BMW = self.norm_latents(z_BMW)
        both_BSW = torch.cat([self.norm_tokens(x_BNW), normed_BMW], dim=1)
        z_BMW = z_BMW + self.attention(normed_BMW, both_BSW, both_BSW)
        out_BMW: Tensor = z_BMW + self.feed_forward(self.norm(z_BMW))
        return out_BMW


class Resampler(Adapter):
    """`W_o LN(z)` of M latents after the layers: `[B, N, D]` to `[B, M, E]`, without a grid.

    Flamingo's Perceiver resampler (arXiv 2204.14198, section 3.1.1 and appendix A.1.1): in each layer the latents
    attend to the tokens and to themselves at once. The normalisations (eps 1e-5) stand where OpenFlamingo has them,
    the one after the last layer included; the matrix behind it is ours, as Flamingo hands the latents to
    cross-attention instead. Latents are drawn from N(0, 1), the rest as torch does; the dtype out is that of the
    parameters.

    Raises:
        ValueError: the heads do not divide W; under `positions: sincos` the tokens have no grid or 4 does not divide
            W; or the sequence is not the one that it was built for.
    """

    Config = ResamplerConfig

    def __init__(self, config: ResamplerConfig, sequence: SequenceSpec, llm_width: int) -> None:
        super().__init__(config, sequence, llm_width)
        width = config.width or sequence.width
        self.project = nn.Identity() if width == sequence.width else nn.Linear(sequence.width, width)
        positions = None
        if config.positions == "sincos":
            assert sequence.grid is not None
            positions = sincos(sequence.grid, width)
        self.register_buffer("positions", positions, persistent=False)
        self.latents = nn.Parameter(torch.randn(config.tokens, width))
        self.layers = nn.ModuleList(ResamplerLayer(config, width) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, llm_width)

    @classmethod
    def spec(cls, config: Settings, sequence: SequenceSpec, llm_width: int) -> SequenceSpec:
        assert isinstance(config, ResamplerConfig)
        width = config.width or sequence.width
        check_heads("resampler", config.heads, width)
        if config.positions == "sincos":
            need_grid("resampler with `positions: sincos`", sequence)
            if width % 4:
                raise CombinationError(
                    f"resampler: `positions: sincos` wants a width that 4 divides, the width is {width}; set `width` "
                    f"to {width + -width % 4}, or `positions: none`"
                )
        return SequenceSpec(config.tokens, llm_width)

    @classmethod
    def tiny(cls) -> Self:
        config = ResamplerConfig(tokens=4, depth=2, width=8, heads=2, positions="sincos")
        with tiny_weights():
            return cls(config, SequenceSpec(tokens=6, width=5, grid=(2, 3)), llm_width=7)

    def forward(self, sequence: TokenSequence) -> TokenSequence:
        check_sequence("resampler", self.sequence, sequence)
        x_BNW = self.project(sequence.tokens)
        if self.positions is not None:
            x_BNW = x_BNW + self.positions
        z_BMW = self.latents.expand(x_BNW.shape[0], -1, -1)
        for layer in self.layers:
            z_BMW = layer(x_BNW, z_BMW)
        return TokenSequence(self.linear(self.norm(z_BMW)))


def sincos(grid: Grid, width: int) -> Tensor:
    """Positions on a grid as `ResamplerConfig.positions` states them, `[N, W]`, float32; 4 divides W."""
    quarter = width // 4
    frequencies = 10000 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = (torch.outer(torch.arange(n, dtype=torch.float64), frequencies) for n in grid)
    rows, columns = (torch.cat([angles.sin(), angles.cos()], dim=1) for angles in (rows, columns))
    both = [rows[:, None].expand(*grid, -1), columns[None].expand(*grid, -1)]
    return torch.cat(both, dim=2).flatten(0, 1).float()
