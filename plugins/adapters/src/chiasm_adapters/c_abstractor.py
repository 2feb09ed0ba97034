"""Honeybee's C-Abstractor: convolutions, pooling to a square, convolutions.

Shape letters: B images, N tokens, M tokens out, D width in, C width of the convolutions, E width of the language model,
(h, w) a grid.
"""

from __future__ import annotations

from math import isqrt
from typing import Self

import torch
from pydantic import Field, PositiveInt, field_validator
from timm.layers import LayerNorm2d
from timm.models.regnet import RegStage
from torch import nn

from chiasm.adapter import Adapter
from chiasm.features import SequenceSpec, TokenSequence
from chiasm.settings import Settings
from chiasm_adapters._blocks import check_smaller, need_grid
from chiasm_adapters._geometry import check_sequence, tiny_weights
from chiasm_adapters._layers import mlp_widths, perceptron


class CAbstractorConfig(Settings):
    """The size of the stages; the defaults are those of Honeybee's released code."""

    tokens: PositiveInt = 144
    """M: visual tokens, a square number."""
    depth: PositiveInt = 3
    """L: convolution blocks before the pooling, and as many after it."""
    width: PositiveInt = 1024
    """C, of the blocks."""
    mlp_depth: int = Field(default=2, ge=1, le=8)
    """Linear layers of the projection, of the language model's width, with SiLU between them."""
    positions: bool = True
    """Adds a learned embedding to the token of each place, drawn from N(0, 0.02^2)."""

    @field_validator("tokens")
    @classmethod
    def _square(cls, tokens: int) -> int:
        side = isqrt(tokens)
        if side**2 != tokens:
            raise ValueError(
                f"tokens={tokens} is no square number, and c_abstractor pools to a square; the nearest are {side**2} "
                f"and {(side + 1) ** 2}"
            )
        return tokens


class CAbstractor(Adapter):
    """`MLP(S_2(pool(S_1(x + p))))`: `[B, N, D]` on any grid to `[B, M, E]` on a square one.

    Honeybee (arXiv 2312.06742, section 3.2) with the parts of its released code: S_1 and S_2 are stages of timm's
    RegNet, each block a 1 x 1, a depthwise 3 x 3 and a 1 x 1 convolution without bias, squeeze-and-excitation (to a
    quarter of the block's width in) before the last, SiLU, and layer normalisation over the channels of each place
    (eps 1e-5), never over the batch. Where the width changes, the residual is a 1 x 1 convolution with such a norm. The
    pooling is adaptive. Initialised as timm and torch do; the dtype out is that of the parameters.

    Raises:
        ValueError: the tokens have no grid, or one with fewer rows or columns than the square; or the sequence is not
            the one that it was built for.
    """

    Config = CAbstractorConfig

    def __init__(self, config: CAbstractorConfig, sequence: SequenceSpec, llm_width: int) -> None:
        super().__init__(config, sequence, llm_width)
        self.positions = None
        if config.positions:
            self.positions = nn.Parameter(0.02 * torch.randn(sequence.tokens, sequence.width))
        side = isqrt(config.tokens)
        self.net = nn.Sequential(
            _stage(config.depth, sequence.width, config.width),
            nn.AdaptiveAvgPool2d((side, side)),
            _stage(config.depth, config.width, config.width),
        )
        self.readout = perceptron(mlp_widths(config.width, config.mlp_depth, None, llm_width), activation=nn.SiLU)

    @classmethod
    def spec(cls, config: Settings, sequence: SequenceSpec, llm_width: int) -> SequenceSpec:
        assert isinstance(config, CAbstractorConfig)
        grid = need_grid("c_abstractor", sequence)
        side, most = isqrt(config.tokens), min(grid)
        check_smaller("c_abstractor", grid, (side, side), f"set `tokens` to at most {most * most}")
        return SequenceSpec(config.tokens, llm_width, (side, side))

    @classmethod
    def tiny(cls) -> Self:
        config = CAbstractorConfig(tokens=4, depth=2, width=8)
        with tiny_weights():
            return cls(config, SequenceSpec(tokens=12, width=6, grid=(3, 4)), llm_width=7)

    def forward(self, sequence: TokenSequence) -> TokenSequence:
        check_sequence("c_abstractor", self.sequence, sequence)
        assert sequence.grid is not None
        x_BND = sequence.tokens if self.positions is None else sequence.tokens + self.positions
        map_BChw = self.net(torch.unflatten(x_BND.transpose(1, 2), 2, sequence.grid))
        return TokenSequence(self.readout(map_BChw.flatten(2).transpose(1, 2)), self.out.grid)


def _stage(depth: int, before: int, after: int) -> nn.Module:
    # timm's defaults for groups, squeeze-and-excitation and residual, written out
    stage: nn.Module = RegStage(
        depth,
        before,
        after,
        stride=1,
        dilation=1,
        bottle_ratio=1.0,
        group_size=1,
        se_ratio=0.25,
        downsample="conv1x1",
        act_layer=nn.SiLU,
        norm_layer=LayerNorm2d,
    )
    return stage
