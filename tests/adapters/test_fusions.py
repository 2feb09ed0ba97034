"""Fusions against formulas written here in float64, and against what their specs promise.

Shape letters: B images, L layers, N tokens, D width of an encoder, E width out.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from chiasm.errors import CombinationError
from chiasm.features import Features, FeatureSpec, SequenceSpec
from chiasm_adapters.concat_channels import ConcatChannels, ConcatChannelsConfig
from chiasm_adapters.project_sum import ProjectSum, ProjectSumConfig
from chiasm_adapters.single import Single, SingleConfig

FUSIONS = [Single, ConcatChannels, ProjectSum]
ONE = FeatureSpec(layers=3, grid=(2, 3), width=5)
LARGE = FeatureSpec(layers=2, grid=(3, 5), width=4)
EQUAL = FeatureSpec(layers=1, grid=(2, 3), width=7)
SAME_COUNT = FeatureSpec(layers=1, grid=(3, 2), width=4)


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(7)


def draw(specs, rng, images=3):
    """Features that differ in mean and scale by layer, so that a mixed-up layer shows."""
    made = []
    for spec in specs:
        tokens_BLND = torch.randn(images, spec.layers, spec.tokens, spec.width, generator=rng)
        scale_L = torch.arange(1.0, spec.layers + 1).view(1, -1, 1, 1)
        made.append(Features(tokens_BLND * scale_L + scale_L, spec.grid))
    return made


def randomise(module, rng):
    """Moves every parameter off its start, where ones and zeros hide mistakes."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng))
    return module


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def bilinear(tokens_BNC, grid, to):
    """Cell by cell: the centre of a cell out, in coordinates of the grid in, clamped to its outermost centres."""
    cells = tokens_BNC.double().reshape(tokens_BNC.shape[0], *grid, tokens_BNC.shape[2])

    def ends(index, size, new_size):
        at = min(max((index + 0.5) * size / new_size - 0.5, 0.0), size - 1.0)
        low = int(at)
        return (low, 1 - (at - low)), (min(low + 1, size - 1), at - low)

    out = []
    for row, column in itertools.product(range(to[0]), range(to[1])):
        corners = itertools.product(ends(row, grid[0], to[0]), ends(column, grid[1], to[1]))
        out.append(sum(cells[:, i, j] * p * q for (i, p), (j, q) in corners))
    return torch.stack(out, dim=1)


def merge(projections, tokens, activation, place):
    """Mixer 3 layer by layer, from the text of the paper."""
    total = 0
    for p, h_BLND in zip(projections, tokens, strict=True):
        layers, width = h_BLND.shape[1], h_BLND.shape[3]
        u = 0
        for i in range(layers):
            h = h_BLND[:, i]
            centred = h - h.mean(-1, keepdim=True)
            h = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            h = h * p["norm_weight"][i] + p["norm_bias"][i]
            projected = h @ p["weight"][:, i * width : (i + 1) * width].T
            if "bias" in p:
                projected = projected + p["bias"][i]
            u = u + (p["scalars"][i] if "scalars" in p else 1 / layers) * projected
        total = total + place(u)
    return gelu(total) if activation == "gelu" else total


def append_zeros(length):
    def place(u):
        return torch.cat([u, u.new_zeros(u.shape[0], length - u.shape[1], u.shape[2])], dim=1)

    return place


# single


def test_single_gives_one_layer_as_it_is(rng):
    (features,) = draw([EQUAL], rng)
    fusion = Single(SingleConfig(), [EQUAL], 9)
    out = fusion([features])
    assert torch.equal(out.tokens, features.tokens[:, 0])
    assert (out.grid, fusion.out) == ((2, 3), SequenceSpec(6, 7, (2, 3)))


def test_single_puts_several_layers_side_by_side(rng):
    (features,) = draw([ONE], rng)
    out = Single(SingleConfig(), [ONE], 9)([features])
    assert torch.equal(out.tokens, torch.cat([features.tokens[:, layer] for layer in range(3)], dim=2))


def test_single_refuses_two_encoders_and_says_what_takes_them():
    with pytest.raises(
        CombinationError,
        match=r"single takes one encoder, given 2; choose a fusion that takes several, say concat_channels or project",
    ):
        Single.spec(SingleConfig(), [ONE, LARGE], 9)


# concat_channels


def test_concat_channels_runs_by_encoder_then_by_layer(rng):
    first, second = draw([ONE, EQUAL], rng)
    fusion = ConcatChannels(ConcatChannelsConfig(), [ONE, EQUAL], 9)
    out = fusion([first, second])
    wanted = torch.cat([*first.tokens.unbind(1), second.tokens[:, 0]], dim=2)
    assert torch.equal(out.tokens, wanted)
    assert out.spec == fusion.out == SequenceSpec(6, 3 * 5 + 7, (2, 3))


@pytest.mark.parametrize(("to", "grid"), [("largest", (3, 5)), ("first", (2, 3))])
def test_concat_channels_resamples_as_the_formula(rng, to, grid):
    features = draw([ONE, LARGE], rng)
    fusion = ConcatChannels(ConcatChannelsConfig(align="interpolate", to=to), [ONE, LARGE], 9)
    out = fusion(features)
    wanted = torch.cat(
        [bilinear(layer, item.grid, grid) for item in features for layer in item.tokens.unbind(1)], dim=2
    )
    assert out.spec == fusion.out == SequenceSpec(grid[0] * grid[1], 3 * 5 + 2 * 4, grid)
    torch.testing.assert_close(out.tokens.double(), wanted, atol=1e-5, rtol=0)


def test_concat_channels_refuses_unequal_grids_with_both_and_the_remedy():
    message = r"equal grids, the encoders give \(2, 3\) and \(3, 5\); set `align: interpolate`"
    with pytest.raises(CombinationError, match=message):
        ConcatChannels(ConcatChannelsConfig(), [ONE, LARGE], 9)
    with pytest.raises(CombinationError, match=r"\(2, 3\) and \(3, 2\)"):  # as many tokens, other places
        ConcatChannels.spec(ConcatChannelsConfig(), [ONE, SAME_COUNT], 9)


# project_sum


@pytest.mark.parametrize("specs", [(ONE,), (ONE, EQUAL), (ONE, LARGE), (LARGE, ONE, SAME_COUNT)])
@pytest.mark.parametrize("scalars", [True, False])
@pytest.mark.parametrize(("bias", "activation"), [(True, "gelu"), (False, "none")])
def test_project_sum_equals_the_sum_over_layers_in_values_and_gradients(rng, specs, scalars, bias, activation):
    config = ProjectSumConfig(width=6, layer_scalars=scalars, bias=bias, activation=activation)
    fusion = randomise(ProjectSum(config, specs, 9), rng)
    features = draw(specs, rng)
    tokens = [item.tokens.double().requires_grad_() for item in features]
    parameters = {name: value.detach().double().requires_grad_() for name, value in fusion.named_parameters()}
    of_encoder = [
        {name.split(".")[2]: value for name, value in parameters.items() if name.split(".")[1] == str(k)}
        for k in range(len(specs))
    ]
    for item in features:
        item.tokens.requires_grad_()

    out = fusion(features)
    wanted = merge(of_encoder, tokens, activation, append_zeros(max(spec.tokens for spec in specs)))
    torch.testing.assert_close(out.tokens.double(), wanted, atol=1e-5, rtol=0)

    weights = torch.randn(wanted.shape, generator=rng) / math.sqrt(wanted.numel())
    (out.tokens * weights).sum().backward()
    (wanted * weights).sum().backward()
    pairs = {name: (value.grad, parameters[name].grad) for name, value in fusion.named_parameters()}
    pairs |= {f"tokens {k}": (features[k].tokens.grad, tokens[k].grad) for k in range(len(specs))}
    for name, (given, reference) in pairs.items():
        torch.testing.assert_close(
            given.double(), reference, atol=1e-5, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_the_largest_grid_is_that_of_most_tokens():
    """Not that of most rows, or of most columns."""
    tall, wide, full = (FeatureSpec(layers=1, grid=grid, width=4) for grid in ((7, 1), (1, 8), (3, 4)))
    config = ConcatChannelsConfig(align="interpolate")
    for specs in itertools.permutations([tall, wide, full]):
        assert ConcatChannels.spec(config, specs, 9).grid == (3, 4)
        assert ProjectSum.spec(ProjectSumConfig(align="interpolate"), specs, 9).grid == (3, 4)
        assert ProjectSum.spec(ProjectSumConfig(), specs, 9).tokens == 12
    # of several with as many tokens the first
    assert ConcatChannels.spec(config, [ONE, SAME_COUNT], 9).grid == ONE.grid
    assert ConcatChannels.spec(config, [SAME_COUNT, ONE], 9).grid == SAME_COUNT.grid


def test_project_sum_interpolates_projections_to_the_largest_grid(rng):
    fusion = randomise(ProjectSum(ProjectSumConfig(width=6, align="interpolate"), [ONE, LARGE], 9), rng)
    features = draw([ONE, LARGE], rng)
    of_encoder = [{name: value.double() for name, value in p.named_parameters()} for p in fusion.projections]
    wanted = merge(
        of_encoder,
        [item.tokens.double() for item in features],
        "gelu",
        lambda u: bilinear(u, (2, 3), (3, 5)) if u.shape[1] == 6 else u,
    )
    out = fusion(features)
    assert out.spec == fusion.out == SequenceSpec(15, 6, (3, 5))
    torch.testing.assert_close(out.tokens.double(), wanted, atol=1e-5, rtol=0)


def test_project_sum_pads_the_projection_so_that_the_rest_is_the_longer_encoder_alone(rng):
    fusion = randomise(ProjectSum(ProjectSumConfig(), [ONE, LARGE], 9), rng)
    features = draw([ONE, LARGE], rng)
    out_BNE = fusion(features).tokens
    alone_BNE = F.gelu(fusion.projections[1](features[1].tokens))
    assert torch.equal(out_BNE[:, 6:], alone_BNE[:, 6:])
    assert not torch.allclose(out_BNE[:, :6], alone_BNE[:, :6])


def test_project_sum_keeps_a_grid_only_where_all_are_equal():
    config = ProjectSumConfig()
    assert ProjectSum.spec(config, [ONE, EQUAL], 9) == SequenceSpec(6, 9, (2, 3))
    assert ProjectSum.spec(config, [ONE, SAME_COUNT], 9) == SequenceSpec(6, 9, None)
    assert ProjectSum.spec(config, [ONE, LARGE], 9) == SequenceSpec(15, 9, None)
    assert ProjectSum.spec(ProjectSumConfig(width=4), [ONE], 9) == SequenceSpec(6, 4, (2, 3))
    with pytest.raises(CombinationError, match=r"give \(2, 3\) and \(3, 5\); set `align: pad` or `align: interpolate`"):
        ProjectSum.spec(ProjectSumConfig(align="error"), [ONE, LARGE], 9)


class CountProducts(TorchDispatchMode):
    """Counts the matrix-matrix products of what runs inside, by the height of the first factor."""

    def __init__(self):
        super().__init__()
        self.rows = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm"):
            first = args[1] if func.overloadpacket.__name__ in ("addmm", "baddbmm") else args[0]
            self.rows[math.prod(first.shape[:-1])] += 1
        return func(*args, **(kwargs or {}))


def test_project_sum_is_one_wide_product_for_each_encoder(rng):
    fusion = ProjectSum(ProjectSumConfig(), [ONE, LARGE], 9)
    features = draw([ONE, LARGE], rng, images=3)
    with CountProducts() as products:
        fusion(features)
    del products.rows[1]  # scalars times biases
    assert products.rows == {3 * 6: 1, 3 * 15: 1}


def test_project_sum_keeps_one_copy_of_frozen_features_for_backward(rng):
    spec = FeatureSpec(layers=4, grid=(8, 8), width=16)
    fusion = ProjectSum(ProjectSumConfig(width=2, activation="none"), [spec], 9)
    features = draw([spec], rng, images=8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        fusion(features)
    size = features[0].tokens.numel()
    assert sum(saved) < 1.1 * size  # and the weights beside it


def test_project_sum_starts_each_layer_as_a_linear_of_its_own(rng):
    spec = FeatureSpec(layers=8, grid=(1, 1), width=64)
    torch.manual_seed(0)
    fusion = ProjectSum(ProjectSumConfig(), [spec, EQUAL], 512)
    first, second = fusion.projections
    for parameter in (first.weight, first.bias):  # U(-1/8, 1/8): not 1/sqrt(8 * 64)
        assert parameter.abs().max() <= 1 / 8
        assert parameter.abs().max() > 0.124
        assert parameter.std().item() == pytest.approx(1 / 8 / math.sqrt(3), rel=0.02)
    assert first.weight.shape == (512, 8 * 64)
    assert second.weight.abs().max() <= 7**-0.5
    assert torch.equal(first.scalars, torch.full((8,), 1 / 8))
    assert torch.equal(second.scalars, torch.ones(1))


def test_project_sum_starts_as_the_mean_of_its_projected_layers_with_and_without_scalars(rng):
    features = draw([ONE, LARGE], rng)
    outs = []
    for scalars in (True, False):
        torch.manual_seed(3)
        fusion = ProjectSum(ProjectSumConfig(layer_scalars=scalars, activation="none"), [ONE, LARGE], 9)
        outs.append(fusion(features).tokens)
    torch.testing.assert_close(outs[0], outs[1], atol=1e-6, rtol=0)
    mean = 0
    for projection, item in zip(fusion.projections, features, strict=True):
        layers = [
            F.linear(F.layer_norm(h, h.shape[-1:]), w, b)
            for h, w, b in zip(
                item.tokens.unbind(1),
                projection.weight.chunk(len(projection.bias), dim=1),
                projection.bias,
                strict=True,
            )
        ]
        mean = mean + append_zeros(15)(torch.stack(layers).mean(0))
    torch.testing.assert_close(outs[0], mean, atol=1e-5, rtol=0)


# all of them


@pytest.mark.parametrize("cls", FUSIONS)
def test_tiny_keeps_its_spec_and_the_random_state(cls, rng):
    before = torch.get_rng_state()
    fusion, again = cls.tiny(), cls.tiny()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(fusion.parameters(), again.parameters(), strict=True))
    assert fusion.out == cls.spec(fusion.config, fusion.features, fusion.llm_width)
    out = fusion(draw(fusion.features, rng))
    assert out.spec == fusion.out
    assert out.tokens.shape[0] == 3


@pytest.mark.parametrize("cls", FUSIONS)
def test_an_image_is_the_same_alone(cls, rng):
    fusion = cls.tiny().eval()
    features = draw(fusion.features, rng)
    alone = fusion([Features(item.tokens[1:2], item.grid) for item in features]).tokens
    torch.testing.assert_close(fusion(features).tokens[1:2], alone, atol=1e-6, rtol=0)
    none = fusion([Features(item.tokens[:0], item.grid) for item in features])
    assert none.tokens.shape == (0, fusion.out.tokens, fusion.out.width)


@pytest.mark.parametrize("cls", FUSIONS)
def test_other_features_than_the_fusion_was_built_for_raise(cls, rng):
    fusion = cls.tiny()
    good = draw(fusion.features, rng)
    first = fusion.features[0]
    for wrong in (
        FeatureSpec(first.layers + 1, first.grid, first.width),
        FeatureSpec(first.layers, (first.grid[1], first.grid[0]), first.width),
        FeatureSpec(first.layers, first.grid, first.width + 1),
    ):
        with pytest.raises(ValueError, match="was built for") as caught:
            fusion([*draw([wrong], rng), *good[1:]])
        assert str(first) in str(caught.value)
        assert str(wrong) in str(caught.value)
    with pytest.raises(ValueError, match=r"was built for .* the features are \(\)"):
        fusion([])
    with pytest.raises(CombinationError, match="of no encoder; wanted at least one"):
        cls.spec(fusion.config, [], 9)


@pytest.mark.parametrize("cls", [ConcatChannels, ProjectSum])
def test_encoders_that_saw_different_numbers_of_images_raise(cls, rng):
    fusion = cls.tiny()
    first, second = fusion.features
    with pytest.raises(ValueError, match=r"same images from each encoder, their numbers are \[3, 2\]"):
        fusion([*draw([first], rng, images=3), *draw([second], rng, images=2)])


@pytest.mark.parametrize("cls", FUSIONS)
def test_state_goes_round_and_meta_instances_hold_as_much(cls, rng):
    fusion = randomise(cls.tiny(), rng)
    copy = cls.tiny()
    copy.load_state_dict(fusion.state_dict(), strict=True)
    features = draw(fusion.features, rng)
    assert torch.equal(fusion(features).tokens, copy(features).tokens)
    with torch.device("meta"):
        planned = cls(fusion.config, fusion.features, fusion.llm_width)
    assert {n: p.shape for n, p in planned.state_dict().items()} == {n: p.shape for n, p in fusion.state_dict().items()}


@pytest.mark.parametrize("cls", FUSIONS)
def test_dtype_follows_the_parameters(cls, rng):
    fusion = cls.tiny().to(torch.bfloat16)
    features = [Features(item.tokens.to(torch.bfloat16), item.grid) for item in draw(fusion.features, rng)]
    assert fusion(features).tokens.dtype == torch.bfloat16


def test_configurations_are_bounded():
    with pytest.raises(ValidationError, match="greater than 0"):
        ProjectSumConfig(width=0)
    with pytest.raises(ValidationError, match="'largest' or 'first'"):
        ConcatChannelsConfig(to="smallest")
    with pytest.raises(ValidationError, match="Extra inputs"):
        SingleConfig(width=3)
