"""The Perceiver resampler against a formula in float64.

Shape letters: B images, N tokens, M latents, D width in, W width of the latents, E width out.
"""

from __future__ import annotations

import math

import pytest
import torch

from chiasm.errors import CombinationError
from chiasm.features import SequenceSpec, TokenSequence
from chiasm_adapters.resampler import Resampler, ResamplerConfig

SMALL = {"tokens": 4, "depth": 2, "heads": 2}


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(11)


def build(config, spec, rng, llm_width=9):
    adapter = Resampler(config, spec, llm_width)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return adapter.eval(), TokenSequence(torch.randn(3, spec.tokens, spec.width, generator=rng), spec.grid)


def norm(x, p, name):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]


def linear(x, p, name):
    return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0)


def attention(q, kv, p, name, heads):
    """One image, head by head."""
    q, k, v = linear(q, p, f"{name}.query"), linear(kv, p, f"{name}.key"), linear(kv, p, f"{name}.value")
    outs = []
    for q_h, k_h, v_h in zip(*(part.chunk(heads, dim=-1) for part in (q, k, v)), strict=True):
        weights = (q_h @ k_h.T / math.sqrt(q_h.shape[-1])).exp()
        outs.append(weights / weights.sum(-1, keepdim=True) @ v_h)
    return linear(torch.cat(outs, dim=-1), p, f"{name}.output")


def place(row, column, width):
    """The position of one cell, channel by channel."""
    quarter = width // 4
    values = []
    for number in (row, column):
        angles = [number / 10000 ** (k / quarter) for k in range(quarter)]
        values += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
    return torch.tensor(values, dtype=torch.float64)


def reference(adapter, sequence, config):
    p = {name: value.detach().double() for name, value in adapter.named_parameters()}
    images = []
    for x in sequence.tokens.double():
        if "project.weight" in p:
            x = linear(x, p, "project")
        if config.positions == "sincos":
            h, w = sequence.grid
            x = x + torch.stack([place(i, j, x.shape[1]) for i in range(h) for j in range(w)])
        z = p["latents"]
        for index in range(config.depth):
            name = f"layers.{index}"
            both = torch.cat([norm(x, p, f"{name}.norm_tokens"), norm(z, p, f"{name}.norm_latents")])
            queries = norm(z, p, f"{name}.norm_latents")
            z = z + attention(queries, both, p, f"{name}.attention", config.heads)
            inner = linear(norm(z, p, f"{name}.norm"), p, f"{name}.feed_forward.0")
            if config.activation == "gelu":
                inner = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
            else:
                inner = inner.clamp(min=0) ** 2
            z = z + linear(inner, p, f"{name}.feed_forward.2")
        images.append(linear(norm(z, p, "norm"), p, "linear"))
    return torch.stack(images)


@pytest.mark.parametrize(
    ("config", "grid"),
    [
        (ResamplerConfig(**SMALL), None),
        (ResamplerConfig(**SMALL, positions="sincos"), (3, 2)),
        (ResamplerConfig(**SMALL, width=8, activation="gelu", bias=True, expansion=3, positions="sincos"), (2, 3)),
        (ResamplerConfig(tokens=7, depth=1, width=6, heads=3), (2, 3)),
    ],
    ids=["default", "sincos", "other width", "more latents than tokens"],
)
def test_resampler_equals_its_formula(config, grid, rng):
    spec = SequenceSpec(6, 12, grid)
    adapter, sequence = build(config, spec, rng)
    given = adapter(sequence)
    torch.testing.assert_close(given.tokens.double(), reference(adapter, sequence, config), atol=1e-5, rtol=0)
    assert given.spec == adapter.out == SequenceSpec(config.tokens, 9, None)
    names = [name for name, _ in adapter.named_parameters()]
    assert ("layers.0.attention.value.bias" in names) is config.bias
    assert ("layers.0.feed_forward.0.bias" in names) is config.bias
    assert ("project.weight" in names) is (config.width is not None)
    given.tokens.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())


def test_tokens_have_places_under_sincos_only(rng):
    spec = SequenceSpec(6, 12, (2, 3))
    order = [3, 1, 5, 0, 2, 4]
    for positions, same in (("none", True), ("sincos", False)):
        adapter, sequence = build(ResamplerConfig(**SMALL, positions=positions), spec, rng)
        moved = TokenSequence(sequence.tokens[:, order], (2, 3))
        assert torch.allclose(adapter(sequence).tokens, adapter(moved).tokens, atol=1e-5) is same


def test_positions_are_no_part_of_the_state(rng):
    adapter, _ = build(ResamplerConfig(**SMALL, positions="sincos"), SequenceSpec(6, 12, (2, 3)), rng)
    assert set(adapter.state_dict()) == {name for name, _ in adapter.named_parameters()}


def test_resampler_defaults_are_those_of_flamingo():
    config = ResamplerConfig()
    assert (config.tokens, config.depth, config.heads, config.expansion) == (64, 6, 16, 4)
    with torch.device("meta"):
        adapter = Resampler(config, SequenceSpec(576, 1536, (24, 24)), 4096)
    of_layer = 4 * 1536**2 + 2 * 4 * 1536**2 + 3 * 2 * 1536
    wanted = 64 * 1536 + 6 * of_layer + 2 * 1536 + 4097 * 4096 - 4096 * (4096 - 1536)
    assert sum(p.numel() for p in adapter.parameters()) == wanted


@pytest.mark.parametrize(
    ("config", "spec", "message"),
    [
        (ResamplerConfig(heads=5), SequenceSpec(6, 12), r"resampler: 5 heads do not divide the width 12; set `heads`"),
        (ResamplerConfig(width=10), SequenceSpec(6, 12), r"16 heads do not divide the width 10"),
        (
            ResamplerConfig(heads=2, positions="sincos"),
            SequenceSpec(6, 12),
            r"`positions: sincos` wants tokens on a grid, the 6 tokens of the fusion have none",
        ),
        (
            ResamplerConfig(heads=2, positions="sincos"),
            SequenceSpec(6, 10, (2, 3)),
            r"wants a width that 4 divides, the width is 10; set `width` to 12, or `positions: none`",
        ),
    ],
)
def test_resampler_refuses_what_does_not_fit(config, spec, message):
    with pytest.raises(CombinationError, match=message):
        Resampler.spec(config, spec, 9)
