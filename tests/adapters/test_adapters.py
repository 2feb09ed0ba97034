"""Adapters against formulas written here in float64, and against what their specs promise.

Shape letters: B images, N tokens, D width in, E width out.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from chiasm.errors import CombinationError
from chiasm.features import FeatureSpec, SequenceSpec, TokenSequence
from chiasm_adapters.avg_pool import AvgPool
from chiasm_adapters.c_abstractor import CAbstractor
from chiasm_adapters.identity import Identity
from chiasm_adapters.linear import Linear, LinearConfig
from chiasm_adapters.mlp import Mlp, MlpConfig
from chiasm_adapters.pixel_shuffle import PixelShuffle
from chiasm_adapters.project_sum import ProjectSum, ProjectSumConfig
from chiasm_adapters.qformer import QFormer
from chiasm_adapters.resampler import Resampler
from chiasm_adapters.token_packer import TokenPacker
from chiasm_adapters.transformer import Transformer, TransformerConfig

ADAPTERS = [Linear, Mlp, Transformer]
OTHERS = [AvgPool, CAbstractor, Identity, PixelShuffle, QFormer, Resampler, TokenPacker]
"""Each has a file of its own; here is what all have in common."""
SEQUENCE = SequenceSpec(tokens=6, width=12, grid=(2, 3))


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(11)


def draw(spec, rng, images=3):
    return TokenSequence(torch.randn(images, spec.tokens, spec.width, generator=rng), spec.grid)


def randomise(module, rng):
    """Moves every parameter off its start, where ones and zeros hide mistakes."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return module


def doubles(module):
    return {name: value.detach().double() for name, value in module.named_parameters()}


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def norm(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def attention(x, p, heads):
    """Head by head, no mask."""
    q, k, v = (x @ p["self_attn.in_proj_weight"].T + p["self_attn.in_proj_bias"]).chunk(3, dim=-1)
    outs = []
    for q_h, k_h, v_h in zip(*(part.chunk(heads, dim=-1) for part in (q, k, v)), strict=True):
        scores = q_h @ k_h.transpose(1, 2) / math.sqrt(q_h.shape[-1])
        outs.append(scores.softmax(-1) @ v_h)
    return torch.cat(outs, dim=-1) @ p["self_attn.out_proj.weight"].T + p["self_attn.out_proj.bias"]


def encoder_layer(x, p, config):
    act = gelu if config.activation == "gelu" else torch.relu

    def feed_forward(x):
        return act(x @ p["linear1.weight"].T + p["linear1.bias"]) @ p["linear2.weight"].T + p["linear2.bias"]

    norm1 = p["norm1.weight"], p["norm1.bias"]
    norm2 = p["norm2.weight"], p["norm2.bias"]
    if config.norm == "pre":
        x = x + attention(norm(x, *norm1), p, config.heads)
        return x + feed_forward(norm(x, *norm2))
    x = norm(x + attention(x, p, config.heads), *norm1)
    return norm(x + feed_forward(x), *norm2)


# linear


@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_its_formula(rng, bias):
    adapter = Linear(LinearConfig(bias=bias), SEQUENCE, 9)
    sequence = draw(SEQUENCE, rng)
    p = doubles(adapter)
    wanted = sequence.tokens.double() @ p["linear.weight"].T + p.get("linear.bias", 0)
    torch.testing.assert_close(adapter(sequence).tokens.double(), wanted, atol=1e-5, rtol=0)
    assert ("linear.bias" in p) is bias


def test_linear_behind_project_sum_has_one_output_layer_for_both_encoders():
    features = [FeatureSpec(3, (2, 3), 5), FeatureSpec(2, (3, 5), 4)]
    fusion = ProjectSum(ProjectSumConfig(), features, 9)
    adapter = Linear(LinearConfig(), fusion.out, 9)
    count = sum(p.numel() for module in (fusion, adapter) for p in module.parameters())
    of_encoders = sum(spec.layers * (9 * spec.width + 9 + 2 * spec.width + 1) for spec in features)
    assert count == of_encoders + 9 * 9 + 9
    assert adapter.out == SequenceSpec(15, 9, None)


# mlp


@pytest.mark.parametrize(("depth", "hidden"), [(1, None), (2, None), (2, 5), (3, 7), (8, None)])
def test_mlp_equals_its_formula(rng, depth, hidden):
    adapter = Mlp(MlpConfig(depth=depth, hidden=hidden), SEQUENCE, 9)
    sequence = draw(SEQUENCE, rng)
    p = doubles(adapter)
    x = sequence.tokens.double()
    for index in range(depth):
        x = gelu(x) if index else x
        x = x @ p[f"layers.{2 * index}.weight"].T + p[f"layers.{2 * index}.bias"]
    torch.testing.assert_close(adapter(sequence).tokens.double(), x, atol=1e-5, rtol=0)
    widths = [12, *[hidden or 9] * (depth - 1), 9]
    assert [p[f"layers.{2 * index}.weight"].shape for index in range(depth)] == [
        (after, before) for before, after in pairwise(widths)
    ]
    assert len(p) == 2 * depth


def test_mlp_without_bias_holds_matrices_only():
    assert [name for name, _ in Mlp(MlpConfig(bias=False), SEQUENCE, 9).named_parameters()] == [
        "layers.0.weight",
        "layers.2.weight",
    ]


def test_mlp_takes_the_weights_of_a_llava_projector(rng):
    class Projector(nn.Module):
        """The submodules of `multi_modal_projector` in a Hugging Face LLaVA model, by its names."""

        def __init__(self):
            super().__init__()
            self.linear_1, self.act, self.linear_2 = nn.Linear(12, 9), nn.GELU(), nn.Linear(9, 9)

        def forward(self, x):
            return self.linear_2(self.act(self.linear_1(x)))

    projector = Projector()
    adapter = Mlp(MlpConfig(), SEQUENCE, 9)
    adapter.layers[0].load_state_dict(projector.linear_1.state_dict())
    adapter.layers[2].load_state_dict(projector.linear_2.state_dict())
    sequence = draw(SEQUENCE, rng)
    assert torch.equal(adapter(sequence).tokens, projector(sequence.tokens))


# transformer


def test_transformer_defaults_are_the_layer_of_the_released_code(rng):
    adapter = randomise(Transformer(TransformerConfig(), SEQUENCE, 9), rng)
    layer = nn.TransformerEncoderLayer(12, 4, 2048, 0.1, "relu", batch_first=True, norm_first=False)
    layer.load_state_dict(adapter.layers[0].state_dict())
    linear = nn.Linear(12, 9)
    linear.load_state_dict(adapter.linear.state_dict())
    sequence = draw(SEQUENCE, rng)
    for mode in (True, False):  # in training the dropout masks agree as well
        adapter.train(mode)
        layer.train(mode)
        torch.manual_seed(5)
        given = adapter(sequence).tokens
        torch.manual_seed(5)
        assert torch.equal(given, linear(layer(sequence.tokens)))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        TransformerConfig(),
        TransformerConfig(depth=2, heads=3, feed_forward=20, activation="gelu", norm="pre"),
        TransformerConfig(depth=2, heads=6, feed_forward=7),
    ],
    ids=["default", "pre", "deep"],
)
def test_transformer_equals_its_formula(rng, config, frozen):
    adapter = randomise(Transformer(config, SEQUENCE, 9), rng).eval()
    sequence = draw(SEQUENCE, rng)
    p = doubles(adapter)
    x = sequence.tokens.double()
    for index in range(config.depth):
        prefix = f"layers.{index}."
        x = encoder_layer(x, {n.removeprefix(prefix): v for n, v in p.items() if n.startswith(prefix)}, config)
    if config.norm == "pre":
        x = norm(x, p["norm.weight"], p["norm.bias"])
    wanted = x @ p["linear.weight"].T + p["linear.bias"]
    with torch.set_grad_enabled(not frozen):  # torch takes a kernel of its own where there is no gradient
        given = adapter(sequence).tokens
    torch.testing.assert_close(given.double(), wanted, atol=1e-5, rtol=0)


def test_transformer_drops_in_training_only_and_by_the_configured_rate(rng):
    adapter = Transformer(TransformerConfig(), SEQUENCE, 9)
    sequence = draw(SEQUENCE, rng)
    assert not torch.equal(adapter(sequence).tokens, adapter(sequence).tokens)
    adapter.eval()
    assert torch.equal(adapter(sequence).tokens, adapter(sequence).tokens)
    without = Transformer(TransformerConfig(dropout=0.0), SEQUENCE, 9)
    assert torch.equal(without(sequence).tokens, without(sequence).tokens)
    rates = {m.p for m in Transformer(TransformerConfig(dropout=0.25), SEQUENCE, 9).modules() if hasattr(m, "p")}
    assert rates == {0.25}


def test_transformer_layers_start_apart():
    first, second = Transformer(TransformerConfig(depth=2), SEQUENCE, 9).layers
    assert not torch.equal(first.linear1.weight, second.linear1.weight)


def test_transformer_refuses_heads_that_do_not_divide_the_width():
    with pytest.raises(CombinationError, match=r"5 heads do not divide the width 12 of the sequence; set `heads`"):
        Transformer(TransformerConfig(heads=5), SEQUENCE, 9)


# all of them


@pytest.mark.parametrize("cls", ADAPTERS)
@pytest.mark.parametrize("grid", [(2, 3), None])
def test_specs_are_kept_with_and_without_a_grid(cls, grid, rng):
    spec = SequenceSpec(6, 12, grid)
    adapter = cls(cls.Config(), spec, 9)
    assert adapter(draw(spec, rng)).spec == adapter.out == cls.spec(cls.Config(), spec, 9) == SequenceSpec(6, 9, grid)


@pytest.mark.parametrize("cls", ADAPTERS + OTHERS)
def test_tiny_keeps_the_random_state(cls, rng):
    before = torch.get_rng_state()
    adapter, again = cls.tiny(), cls.tiny()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), again.parameters(), strict=True))
    assert adapter(draw(adapter.sequence, rng)).spec == adapter.out


@pytest.mark.parametrize("cls", ADAPTERS + OTHERS)
@pytest.mark.parametrize("gradient", [True, False])
def test_an_image_is_the_same_alone(cls, gradient, rng):
    adapter = cls.tiny().eval()
    sequence = draw(adapter.sequence, rng)
    with torch.set_grad_enabled(gradient):
        alone = adapter(TokenSequence(sequence.tokens[1:2], sequence.grid)).tokens
        torch.testing.assert_close(adapter(sequence).tokens[1:2], alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("cls", ADAPTERS + OTHERS)
def test_no_image_gives_no_tokens(cls, rng):
    adapter = cls.tiny()
    none = adapter(draw(adapter.sequence, rng, images=0))
    assert none.tokens.shape == (0, adapter.out.tokens, adapter.out.width)
    assert none.grid == adapter.out.grid


@pytest.mark.parametrize("cls", ADAPTERS + OTHERS)
def test_other_sequences_than_the_adapter_was_built_for_raise(cls, rng):
    adapter = cls.tiny()
    width = adapter.sequence.width
    for wrong in (SequenceSpec(12, width, (2, 6)), SequenceSpec(6, width + 1, (2, 3)), SequenceSpec(6, width, None)):
        with pytest.raises(ValueError, match="was built for") as caught:
            adapter(draw(wrong, rng))
        assert str(adapter.sequence) in str(caught.value)
        assert str(wrong) in str(caught.value)
    with pytest.raises(ValueError, match=r"wants tokens \[B, N, D\], their shape is \(3, 6, 1, 2\)"):
        adapter(TokenSequence(torch.zeros(3, 6, 1, 2), (2, 3)))


@pytest.mark.parametrize("cls", ADAPTERS + OTHERS)
def test_state_goes_round_and_meta_instances_hold_as_much(cls, rng):
    adapter = randomise(cls.tiny(), rng).eval()
    copy = cls.tiny().eval()
    copy.load_state_dict(adapter.state_dict(), strict=True)
    sequence = draw(adapter.sequence, rng)
    assert torch.equal(adapter(sequence).tokens, copy(sequence).tokens)
    with torch.device("meta"):
        planned = cls(adapter.config, adapter.sequence, adapter.llm_width)
    assert {n: p.shape for n, p in planned.state_dict().items()} == {
        n: p.shape for n, p in adapter.state_dict().items()
    }


@pytest.mark.parametrize("cls", ADAPTERS + OTHERS)
def test_every_parameter_learns_and_the_dtype_follows(cls, rng):
    adapter = cls.tiny()
    sequence = draw(adapter.sequence, rng)
    sequence.tokens.requires_grad_()
    adapter(sequence).tokens.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in [*adapter.parameters(), sequence.tokens])
    half = adapter.to(torch.bfloat16)(TokenSequence(sequence.tokens.to(torch.bfloat16), sequence.grid))
    assert half.tokens.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (MlpConfig, {"depth": 0}, "greater than or equal to 1"),
        (MlpConfig, {"depth": 9}, "less than or equal to 8"),
        (MlpConfig, {"hidden": 0}, "greater than 0"),
        (TransformerConfig, {"dropout": 1.0}, "less than 1"),
        (TransformerConfig, {"norm": "middle"}, "'post' or 'pre'"),
        (LinearConfig, {"width": 3}, "Extra inputs"),
    ],
)
def test_configurations_are_bounded(cls, fields, message):
    with pytest.raises(ValidationError, match=message):
        cls(**fields)
