"""TokenPacker against loops in float64.

Shape letters: B images, N tokens, D width in, Q width of the query's channels, W width of the attention, E width out.
"""

from __future__ import annotations

import math

import pytest
import torch

from chiasm.errors import CombinationError
from chiasm.features import SequenceSpec, TokenSequence
from chiasm_adapters.token_packer import TokenPacker, TokenPackerConfig

SMALL = {"width": 8, "heads": 2}


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(11)


def build(config, grid, rng, width=12):
    adapter = TokenPacker(config, SequenceSpec(grid[0] * grid[1], width, grid), 9)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))
    return adapter, TokenSequence(torch.randn(3, grid[0] * grid[1], width, generator=rng), grid)


def norm(x, p, name):
    scaled = (x - x.mean()) / (x.var(unbiased=False) + 1e-6).sqrt()
    return scaled * p[f"{name}.weight"] + p.get(f"{name}.bias", 0)


def linear(x, p, name):
    return p[f"{name}.weight"] @ x + p.get(f"{name}.bias", 0)


def perceptron(x, p, name):
    x = linear(x, p, f"{name}.0")
    return linear(0.5 * x * (1 + torch.erf(x / math.sqrt(2))), p, f"{name}.2")


def between(image, grid, row, column):
    """Bilinear between the centres of the cells around one place, which stays inside the map."""
    (h, w), value = grid, 0
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            weight = max(0, 1 - abs(row - i)) * max(0, 1 - abs(column - j))
            if weight:
                assert i < h
                assert j < w
                value = value + weight * image[i * w + j]
    return value


def reference(adapter, sequence, config):
    """Region by region, token by token, head by head."""
    p = {name: value.detach().double() for name, value in adapter.named_parameters()}
    (h, w), s = sequence.grid, config.factor
    size = config.width // config.heads
    images = []
    for image in sequence.tokens.double():
        query_width = config.query_width or image.shape[1]
        outs = []
        for row in range(h // s):
            for column in range(w // s):
                centre = (row + 0.5) * s - 0.5, (column + 0.5) * s - 0.5
                coarse = between(image, (h, w), *centre)[-query_width:]
                query = linear(norm(linear(coarse, p, "query"), p, "norm_query"), p, "attention.query")
                rows, columns = range(row * s, row * s + s), range(column * s, column * s + s)
                region = [image[i * w + j] for i in rows for j in columns]
                keys = [linear(norm(perceptron(x, p, "key"), p, "norm_key"), p, "attention.key") for x in region]
                values = [
                    linear(norm(perceptron(x, p, "value"), p, "norm_value"), p, "attention.value") for x in region
                ]
                packed = []
                for head in range(config.heads):
                    own = slice(head * size, (head + 1) * size)
                    scores = [(query[own] @ key[own] / math.sqrt(size)).exp() for key in keys]
                    packed.append(sum(a * v[own] for a, v in zip(scores, values, strict=True)) / sum(scores))
                outs.append(perceptron(linear(torch.cat(packed), p, "attention.output"), p, "layers"))
        images.append(torch.stack(outs))
    return torch.stack(images)


@pytest.mark.parametrize(
    ("config", "grid", "out"),
    [
        (TokenPackerConfig(**SMALL), (4, 6), (2, 3)),
        (TokenPackerConfig(**SMALL, query_width=4), (2, 4), (1, 2)),
        (TokenPackerConfig(width=6, heads=3, factor=3), (6, 3), (2, 1)),
        (TokenPackerConfig(width=8, heads=1, factor=4, query_width=5), (4, 8), (1, 2)),
    ],
    ids=["halves", "one layer asks", "thirds", "quarters"],
)
def test_token_packer_equals_its_formula(config, grid, out, rng):
    adapter, sequence = build(config, grid, rng)
    given = adapter(sequence)
    torch.testing.assert_close(given.tokens.double(), reference(adapter, sequence, config), atol=1e-5, rtol=0)
    assert given.spec == adapter.out == SequenceSpec(out[0] * out[1], 9, out)


def test_every_parameter_of_token_packer_learns(rng):
    adapter, sequence = build(TokenPackerConfig(**SMALL, query_width=4), (4, 6), rng)
    (adapter(sequence).tokens * torch.randn(3, 6, 9, generator=rng)).sum().backward()
    assert {n for n, p in adapter.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-6} == set()


def test_a_token_sees_its_own_region_only(rng):
    adapter, sequence = build(TokenPackerConfig(**SMALL), (4, 6), rng)
    changed = sequence.tokens.clone()
    changed[:, 1 * 6 + 4] += 1  # row 1, column 4: the region of row 0, column 2
    moved = (adapter(TokenSequence(changed, (4, 6))).tokens - adapter(sequence).tokens).abs().amax((0, 2))
    assert [n for n, by in enumerate(moved.tolist()) if by > 0] == [2]


def test_token_packer_has_the_size_of_the_released_code():
    """24 x 24 tokens of four layers of CLIP-L, the deepest asking, to 144 of a 7B model."""
    with torch.device("meta"):
        adapter = TokenPacker(TokenPackerConfig(query_width=1024), SequenceSpec(576, 4096, (24, 24)), 4096)
    assert adapter.out == SequenceSpec(144, 4096, (12, 12))
    two = 4097 * 1024 + 1025 * 1024
    released = 1024**2 + 2 * two + 3 * 2 * 1024 + 4 * 1025 * 1024 + 1025 * 4096 + 4097 * 4096
    without_effect = 2 * 1024  # biases of the keys and of their norm
    assert sum(p.numel() for p in adapter.parameters()) == released - without_effect


@pytest.mark.parametrize(
    ("config", "spec", "message"),
    [
        (TokenPackerConfig(), SequenceSpec(12, 8), r"token_packer wants tokens on a grid, the 12 tokens"),
        (
            TokenPackerConfig(),
            SequenceSpec(12, 8, (4, 3)),
            r"blocks of 2 x 2 tokens do not fill the grid \(4, 3\); choose `pixel_shuffle` with `indivisible: pad`",
        ),
        (TokenPackerConfig(width=12), SequenceSpec(16, 8, (4, 4)), r"8 heads do not divide the width 12; set `heads`"),
        (
            TokenPackerConfig(query_width=9),
            SequenceSpec(16, 8, (4, 4)),
            r"asks for the last 9 channels, the sequence of the fusion has 8; set it to the width of one layer",
        ),
    ],
)
def test_token_packer_refuses_what_does_not_fit(config, spec, message):
    with pytest.raises(CombinationError, match=message):
        TokenPacker.spec(config, spec, 9)
