"""Average pooling against loops in float64.

Shape letters: B images, N tokens, D width in, E width out.
"""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from chiasm.errors import CombinationError
from chiasm.features import SequenceSpec, TokenSequence
from chiasm_adapters.avg_pool import AvgPool, AvgPoolConfig


def reference(adapter, x, grid, out, depth):
    """Cell by cell: the mean over its rows and columns, then the perceptron."""
    p = {name: value.detach().double() for name, value in adapter.named_parameters()}
    (h, w), (rows, columns) = grid, out
    images = []
    for image in x.double():
        cells = []
        for i in range(rows):
            for j in range(columns):
                places = [
                    y * w + x
                    for y in range(math.floor(i * h / rows), math.ceil((i + 1) * h / rows))
                    for x in range(math.floor(j * w / columns), math.ceil((j + 1) * w / columns))
                ]
                y = sum(image[n] for n in places) / len(places)
                for index in range(depth):
                    y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2))) if index else y
                    y = p[f"layers.{2 * index}.weight"] @ y + p[f"layers.{2 * index}.bias"]
                cells.append(y)
        images.append(torch.stack(cells))
    return torch.stack(images)


@pytest.mark.parametrize(
    ("config", "grid", "out"),
    [
        (AvgPoolConfig(), (4, 6), (2, 3)),
        (AvgPoolConfig(factor=3, depth=1), (6, 3), (2, 1)),
        (AvgPoolConfig(grid=(2, 3), hidden=4), (3, 5), (2, 3)),
        (AvgPoolConfig(grid=(3, 2), depth=3), (4, 2), (3, 2)),
        (AvgPoolConfig(factor=1), (2, 3), (2, 3)),
    ],
    ids=["default", "one matrix", "adaptive", "adaptive in rows", "one"],
)
def test_avg_pool_equals_its_formula(config, grid, out):
    rng = torch.Generator().manual_seed(11)
    spec = SequenceSpec(grid[0] * grid[1], 5, grid)
    adapter = AvgPool(config, spec, 9)
    sequence = TokenSequence(torch.randn(3, spec.tokens, 5, generator=rng), grid)
    given = adapter(sequence)
    wanted = reference(adapter, sequence.tokens, grid, out, config.depth)
    torch.testing.assert_close(given.tokens.double(), wanted, atol=1e-5, rtol=0)
    assert given.spec == adapter.out == SequenceSpec(out[0] * out[1], 9, out)
    given.tokens.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())


def test_a_grid_replaces_the_factor():
    config = AvgPoolConfig.model_validate({"grid": [12, 12]})
    assert config.factor is None
    assert config.grid == (12, 12)
    assert AvgPoolConfig.model_validate(config.model_dump(mode="json")) == config
    with pytest.raises(ValidationError, match=r"one of `factor` and `grid`, given are factor=2 and grid=\(3, 4\)"):
        AvgPoolConfig(factor=2, grid=(3, 4))
    with pytest.raises(ValidationError, match="given are factor=None and grid=None; set the other"):
        AvgPoolConfig(factor=None)


@pytest.mark.parametrize(("grid", "remedy"), [((3, 4), r"\[2, 2\]"), ((4, 5), r"\[2, 3\]")])
def test_avg_pool_refuses_a_grid_of_broken_blocks(grid, remedy):
    message = rf"blocks of 2 x 2 tokens do not fill the grid \({grid[0]}, {grid[1]}\); set `grid: {remedy}`"
    with pytest.raises(CombinationError, match=message):
        AvgPool.spec(AvgPoolConfig(), SequenceSpec(grid[0] * grid[1], 5, grid), 9)


@pytest.mark.parametrize("wanted", [(4, 4), (3, 5)])
def test_avg_pool_refuses_to_repeat_tokens(wanted):
    message = rf"pool to the grid \({wanted[0]}, {wanted[1]}\), the tokens stand on \(3, 4\), .* at most \[3, 4\]"
    with pytest.raises(CombinationError, match=message):
        AvgPool.spec(AvgPoolConfig(grid=wanted), SequenceSpec(12, 5, (3, 4)), 9)


@pytest.mark.parametrize("config", [AvgPoolConfig(), AvgPoolConfig(grid=(2, 2))])
def test_avg_pool_refuses_tokens_without_a_grid(config):
    with pytest.raises(CombinationError, match=r"avg_pool wants tokens on a grid, the 12 tokens"):
        AvgPool.spec(config, SequenceSpec(12, 5), 9)
