"""The Q-Former against a formula in float64.

Shape letters: B images, N tokens, M queries, D width in, W width of the queries, E width out.
"""

from __future__ import annotations

import math

import pytest
import torch
from transformers import Blip2QFormerConfig

from chiasm.errors import CombinationError
from chiasm.features import SequenceSpec, TokenSequence
from chiasm_adapters.qformer import QFormer, QFormerConfig

SPEC = SequenceSpec(6, 5, (2, 3))


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(11)


def build(config, rng, spec=SPEC):
    adapter = QFormer(config, spec, 9)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return adapter, TokenSequence(torch.randn(3, spec.tokens, spec.width, generator=rng), spec.grid)


def norm(x, p, name):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()
    return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]


def linear(x, p, name):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def attention(q, kv, p, name, heads):
    """One image, head by head, then the residual sum and its norm."""
    projected = (
        linear(q, p, f"{name}.attention.query"),
        linear(kv, p, f"{name}.attention.key"),
        linear(kv, p, f"{name}.attention.value"),
    )
    outs = []
    for q_h, k_h, v_h in zip(*(part.chunk(heads, dim=-1) for part in projected), strict=True):
        weights = (q_h @ k_h.T / math.sqrt(q_h.shape[-1])).exp()
        outs.append(weights / weights.sum(-1, keepdim=True) @ v_h)
    out = linear(torch.cat(outs, dim=-1), p, f"{name}.output.dense")
    return norm(out + q, p, f"{name}.output.LayerNorm")


def reference(adapter, sequence, config):
    p = {name: value.detach().double() for name, value in adapter.named_parameters()}
    images = []
    for x in sequence.tokens.double():
        q = norm(p["queries"], p, "model.layernorm")
        for index in range(config.depth):
            name = f"model.encoder.layer.{index}"
            q = attention(q, q, p, f"{name}.attention", config.heads)
            if index % config.cross_every == 0:
                q = attention(q, x, p, f"{name}.crossattention", config.heads)
            inner = linear(q, p, f"{name}.intermediate_query.dense")
            gelu = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
            inner = gelu if config.activation == "gelu" else inner.clamp(min=0)
            out = linear(inner, p, f"{name}.output_query.dense")
            q = norm(out + q, p, f"{name}.output_query.LayerNorm")
        images.append(linear(q, p, "linear"))
    return torch.stack(images)


@pytest.mark.parametrize("grid", [(3, 2), None])
@pytest.mark.parametrize(
    "config",
    [
        QFormerConfig(tokens=4, depth=3, width=8, heads=2, feed_forward=9),
        QFormerConfig(tokens=7, depth=3, width=12, heads=3, feed_forward=5, cross_every=1, activation="relu"),
        QFormerConfig(tokens=1, depth=4, width=8, heads=1, feed_forward=9, cross_every=3),
    ],
    ids=["every second", "every", "every third"],
)
def test_qformer_equals_its_formula(config, grid, rng):
    adapter, sequence = build(config, rng, SequenceSpec(6, 5, grid))
    given = adapter(sequence)
    torch.testing.assert_close(given.tokens.double(), reference(adapter, sequence, config), atol=1e-5, rtol=0)
    assert given.spec == adapter.out == SequenceSpec(config.tokens, 9, None)


def test_every_parameter_of_the_qformer_learns(rng):
    adapter, sequence = build(QFormerConfig(tokens=4, depth=3, width=8, heads=2, feed_forward=9), rng)
    (adapter(sequence).tokens * torch.randn(3, 4, 9, generator=rng)).sum().backward()
    assert {n for n, p in adapter.named_parameters() if p.grad is None} == set()
    # a key's bias moves all scores of a query alike, which the softmax does not see
    keys = {n for n, _ in adapter.named_parameters() if n.endswith("attention.key.bias")}
    assert {n for n, p in adapter.named_parameters() if p.grad.abs().max() < 1e-6} == keys


def test_qformer_defaults_are_those_of_blip2():
    config, published = QFormerConfig(), Blip2QFormerConfig()
    assert (config.depth, config.width, config.heads) == (
        published.num_hidden_layers,
        published.hidden_size,
        published.num_attention_heads,
    )
    assert (config.feed_forward, config.activation, config.cross_every) == (
        published.intermediate_size,
        published.hidden_act,
        published.cross_attention_frequency,
    )
    with torch.device("meta"):
        adapter = QFormer(config, SequenceSpec(257, 1408), 2560)
    attention, norm = 4 * 769 * 768, 2 * 768
    cross = 2 * 769 * 768 + 2 * 1409 * 768
    feed_forward = 769 * 3072 + 3073 * 768
    blocks = 12 * (attention + feed_forward + 2 * norm) + 6 * (cross + norm)
    assert sum(p.numel() for p in adapter.parameters()) == blocks + norm + 32 * 768 + 769 * 2560


def test_qformer_drops_in_training_only(rng):
    small = {"tokens": 4, "depth": 2, "width": 8, "heads": 2, "feed_forward": 9}
    adapter, sequence = build(QFormerConfig(**small, dropout=0.25), rng)
    assert not torch.equal(adapter(sequence).tokens, adapter(sequence).tokens)
    adapter.eval()
    assert torch.equal(adapter(sequence).tokens, adapter(sequence).tokens)
    assert {m.p for m in adapter.modules() if isinstance(m, torch.nn.Dropout)} == {0.25}
    without, _ = build(QFormerConfig(**small), rng)
    assert torch.equal(without(sequence).tokens, without(sequence).tokens)


def test_qformer_refuses_heads_that_do_not_divide_the_width():
    with pytest.raises(CombinationError, match=r"qformer: 12 heads do not divide the width 16; set `heads` to a div"):
        QFormer.spec(QFormerConfig(width=16), SPEC, 9)
