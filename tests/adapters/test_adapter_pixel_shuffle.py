"""Space to depth against loops in float64, and against InternVL in transformers.

Shape letters: B images, N tokens, D width in, E width out, s the factor.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector

from chiasm.errors import CombinationError
from chiasm.features import SequenceSpec, TokenSequence
from chiasm_adapters.pixel_shuffle import PixelShuffle, PixelShuffleConfig


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(11)


def build(config, grid, rng, width=5, llm_width=9):
    adapter = PixelShuffle(config, SequenceSpec(grid[0] * grid[1], width, grid), llm_width)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return adapter, TokenSequence(torch.randn(3, grid[0] * grid[1], width, generator=rng), grid)


def reference(adapter, x, grid, config):
    """Block by block: the tokens of a block end to end, zeros where the grid has none, then the perceptron."""
    p = {name: value.detach().double() for name, value in adapter.named_parameters()}
    (h, w), s = grid, config.factor
    images = []
    for image in x.double():
        outs = []
        for row in range(0, h, s):
            for column in range(0, w, s):
                parts = []
                for i in range(row, row + s):
                    for j in range(column, column + s):
                        parts.append(image[i * w + j] if i < h and j < w else torch.zeros_like(image[0]))
                y = torch.cat(parts)
                if config.norm:
                    y = (y - y.mean()) / (y.var(unbiased=False) + 1e-5).sqrt() * p["norm.weight"] + p["norm.bias"]
                for index in range(config.depth):
                    y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2))) if index else y
                    y = p[f"layers.{2 * index}.weight"] @ y + p[f"layers.{2 * index}.bias"]
                outs.append(y)
        images.append(torch.stack(outs))
    return torch.stack(images)


@pytest.mark.parametrize(
    ("config", "grid", "out"),
    [
        (PixelShuffleConfig(), (4, 6), (2, 3)),
        (PixelShuffleConfig(factor=3, depth=1), (6, 3), (2, 1)),
        (PixelShuffleConfig(norm=False, depth=3, hidden=4), (2, 8), (1, 4)),
        (PixelShuffleConfig(indivisible="pad"), (3, 5), (2, 3)),
        (PixelShuffleConfig(indivisible="pad", factor=4), (5, 2), (2, 1)),
        (PixelShuffleConfig(factor=1), (2, 3), (2, 3)),
    ],
    ids=["default", "thirds", "no norm", "padded", "padded by more than it has", "one"],
)
def test_pixel_shuffle_equals_its_formula(config, grid, out, rng):
    adapter, sequence = build(config, grid, rng)
    given = adapter(sequence)
    wanted = reference(adapter, sequence.tokens, grid, config)
    torch.testing.assert_close(given.tokens.double(), wanted, atol=1e-5, rtol=0)
    assert given.spec == adapter.out == SequenceSpec(out[0] * out[1], 9, out)
    given.tokens.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())


def test_pixel_shuffle_takes_the_weights_of_internvl(rng):
    adapter, sequence = build(PixelShuffleConfig(), (4, 6), rng)
    projector = InternVLMultiModalProjector(
        SimpleNamespace(
            vision_config=SimpleNamespace(hidden_size=5),
            text_config=SimpleNamespace(hidden_size=9),
            downsample_ratio=0.5,
            projector_hidden_act="gelu",
        )
    )
    projector.layer_norm.load_state_dict(adapter.norm.state_dict())
    projector.linear_1.load_state_dict(adapter.layers[0].state_dict())
    projector.linear_2.load_state_dict(adapter.layers[2].state_dict())
    map_BhwD = sequence.tokens.unflatten(1, (4, 6))
    wanted = projector(InternVLModel.pixel_shuffle(None, map_BhwD, 0.5)).flatten(1, 2)
    assert torch.equal(adapter(sequence).tokens, wanted)


def test_pixel_shuffle_has_the_published_geometry():
    sequence = SequenceSpec(1024, 3200, (32, 32))
    assert PixelShuffle.spec(PixelShuffleConfig(), sequence, 6144) == SequenceSpec(256, 6144, (16, 16))


@pytest.mark.parametrize("grid", [(3, 4), (4, 3)])
def test_pixel_shuffle_refuses_a_grid_of_broken_blocks(grid):
    message = rf"blocks of 2 x 2 tokens do not fill the grid \({grid[0]}, {grid[1]}\); set `indivisible: pad`"
    with pytest.raises(CombinationError, match=message):
        PixelShuffle.spec(PixelShuffleConfig(), SequenceSpec(12, 5, grid), 9)


@pytest.mark.parametrize("indivisible", ["error", "pad"])
def test_pixel_shuffle_refuses_tokens_without_a_grid(indivisible):
    with pytest.raises(CombinationError, match=r"pixel_shuffle wants tokens on a grid, the 12 tokens .* choose a fus"):
        PixelShuffle.spec(PixelShuffleConfig(indivisible=indivisible), SequenceSpec(12, 5), 9)
