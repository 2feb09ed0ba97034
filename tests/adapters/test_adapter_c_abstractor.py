"""Honeybee's C-Abstractor against its convolutions, written out in float64.

Shape letters: B images, N tokens, D width in, C width of the convolutions, E width out, (h, w) a grid.
"""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from chiasm.errors import CombinationError
from chiasm.features import SequenceSpec, TokenSequence
from chiasm_adapters.c_abstractor import CAbstractor, CAbstractorConfig


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(11)


def build(config, grid, rng, width=6):
    adapter = CAbstractor(config, SequenceSpec(grid[0] * grid[1], width, grid), 9)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return adapter, TokenSequence(torch.randn(3, grid[0] * grid[1], width, generator=rng), grid)


def silu(x):
    return x / (1 + (-x).exp())


def conv_norm(x, p, name, groups=1):
    """A convolution without bias, and the normalisation of each place over its channels."""
    weight = p[f"{name}.conv.weight"]
    x = F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=groups)
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return x * p[f"{name}.bn.weight"][:, None, None] + p[f"{name}.bn.bias"][:, None, None]


def block(x, p, name):
    y = silu(conv_norm(x, p, f"{name}.conv1"))
    y = silu(conv_norm(y, p, f"{name}.conv2", groups=y.shape[1]))
    squeezed = y.mean((2, 3))
    squeezed = silu(squeezed @ p[f"{name}.se.fc1.weight"][:, :, 0, 0].T + p[f"{name}.se.fc1.bias"])
    squeezed = squeezed @ p[f"{name}.se.fc2.weight"][:, :, 0, 0].T + p[f"{name}.se.fc2.bias"]
    y = y / (1 + (-squeezed).exp())[:, :, None, None]
    y = conv_norm(y, p, f"{name}.conv3")
    beside = conv_norm(x, p, f"{name}.downsample") if f"{name}.downsample.conv.weight" in p else x
    return silu(y + beside)


def pool(x, side):
    h, w = x.shape[2:]
    rows = []
    for i in range(side):
        for j in range(side):
            top, bottom = math.floor(i * h / side), math.ceil((i + 1) * h / side)
            left, right = math.floor(j * w / side), math.ceil((j + 1) * w / side)
            rows.append(x[:, :, top:bottom, left:right].mean((2, 3)))
    return torch.stack(rows, dim=2).unflatten(2, (side, side))


def reference(adapter, sequence, config):
    p = {name: value.detach().double() for name, value in adapter.named_parameters()}
    x = sequence.tokens.double() + p.get("positions", 0)
    x = x.transpose(1, 2).unflatten(2, sequence.grid)
    for index in range(config.depth):
        x = block(x, p, f"net.0.b{index + 1}")
    x = pool(x, math.isqrt(config.tokens))
    for index in range(config.depth):
        x = block(x, p, f"net.2.b{index + 1}")
    x = x.flatten(2).transpose(1, 2)
    for index in range(config.mlp_depth):
        x = silu(x) if index else x
        x = x @ p[f"readout.{2 * index}.weight"].T + p[f"readout.{2 * index}.bias"]
    return x


@pytest.mark.parametrize(
    ("config", "grid"),
    [
        (CAbstractorConfig(tokens=4, width=8), (3, 5)),
        (CAbstractorConfig(tokens=9, width=6, depth=2, positions=False), (4, 3)),
        (CAbstractorConfig(tokens=1, width=8, depth=1, mlp_depth=1), (1, 4)),
    ],
    ids=["default", "same width", "shallow"],
)
def test_c_abstractor_equals_its_formula(config, grid, rng):
    adapter, sequence = build(config, grid, rng)
    given = adapter(sequence)
    torch.testing.assert_close(given.tokens.double(), reference(adapter, sequence, config), atol=1e-5, rtol=0)
    side = math.isqrt(config.tokens)
    assert given.spec == adapter.out == SequenceSpec(config.tokens, 9, (side, side))
    assert (adapter.positions is not None) is config.positions
    (given.tokens * torch.randn(given.tokens.shape, generator=rng)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())


def test_c_abstractor_defaults_are_those_of_the_released_code():
    config = CAbstractorConfig()
    assert (config.tokens, config.depth, config.width, config.mlp_depth, config.positions) == (144, 3, 1024, 2, True)
    with torch.device("meta"):
        adapter = CAbstractor(config, SequenceSpec(576, 1024, (24, 24)), 4096)
    one = 1024**2 + 2 * 1024
    of_block = 2 * one + 9 * 1024 + 2 * 1024 + 2 * 1024 * 256 + 256 + 1024
    assert sum(p.numel() for p in adapter.parameters()) == 576 * 1024 + 6 * of_block + 1025 * 4096 + 4097 * 4096


def test_nothing_normalises_over_the_batch():
    batch_norms = torch.nn.modules.batchnorm._BatchNorm
    assert not [module for module in CAbstractor.tiny().modules() if isinstance(module, batch_norms)]


@pytest.mark.parametrize("tokens", [2, 8, 10])
def test_c_abstractor_wants_a_square_number(tokens):
    nearest = {2: "1 and 4", 8: "4 and 9", 10: "9 and 16"}[tokens]
    with pytest.raises(ValidationError, match=rf"tokens={tokens} is no square number, .* the nearest are {nearest}"):
        CAbstractorConfig(tokens=tokens)


@pytest.mark.parametrize("grid", [(2, 8), (8, 2)])
def test_c_abstractor_refuses_a_grid_smaller_than_the_square(grid):
    message = rf"pool to the grid \(3, 3\), the tokens stand on \({grid[0]}, {grid[1]}\), .* set `tokens` to at most 4"
    with pytest.raises(CombinationError, match=message):
        CAbstractor.spec(CAbstractorConfig(tokens=9), SequenceSpec(16, 6, grid), 9)


def test_c_abstractor_refuses_tokens_without_a_grid():
    with pytest.raises(CombinationError, match=r"c_abstractor wants tokens on a grid, the 16 tokens"):
        CAbstractor.spec(CAbstractorConfig(tokens=4), SequenceSpec(16, 6), 9)
