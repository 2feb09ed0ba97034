"""What the tests of single fusions share: features, and the formulas of their steps in float64, cell by cell.

Shape letters: B images, L layers, N tokens, C channels, D width.
"""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from chiasm.features import Features


def draw(specs, rng, images=2):
    """Features that differ in mean and scale by layer, so that a mixed-up layer shows."""
    made = []
    for spec in specs:
        tokens_BLND = torch.randn(images, spec.layers, spec.tokens, spec.width, generator=rng)
        scale_L = torch.arange(1.0, spec.layers + 1).view(1, -1, 1, 1)
        made.append(Features(tokens_BLND * scale_L / 2 + scale_L / 3, spec.grid))
    return made


def randomise(module, rng):
    """Moves every parameter off its start, where ones and zeros hide mistakes."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))
    return module


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def normal(x, weight=1.0, bias=0.0):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def channels(tokens_BLND):
    return torch.cat([tokens_BLND[:, layer] for layer in range(tokens_BLND.shape[1])], dim=-1)


def bilinear(tokens_BNC, grid, to):
    """Cell by cell: the centre of a cell out, in coordinates of the grid in, clamped to its outermost centres."""

    def ends(index, size, new_size):
        at = min(max((index + 0.5) * size / new_size - 0.5, 0.0), size - 1.0)
        low = int(at)
        return (low, 1 - (at - low)), (min(low + 1, size - 1), at - low)

    out = []
    for row, column in itertools.product(range(to[0]), range(to[1])):
        corners = itertools.product(ends(row, grid[0], to[0]), ends(column, grid[1], to[1]))
        out.append(sum(tokens_BNC[:, i * grid[1] + j] * p * q for (i, p), (j, q) in corners))
    return torch.stack(out, dim=1)


def layer_sum(p, at, h_BLND):
    """`sum_l a_l (W_l LN(h_l) + b_l)`, layer by layer; `at` begins the names of its parameters in p."""
    width, total = h_BLND.shape[3], 0
    for i in range(h_BLND.shape[1]):
        h = normal(h_BLND[:, i], p[f"{at}.norm_weight"][i], p[f"{at}.norm_bias"][i])
        h = h @ p[f"{at}.weight"][:, i * width : (i + 1) * width].T
        if f"{at}.bias" in p:
            h = h + p[f"{at}.bias"][i]
        total = total + h * (p[f"{at}.scalars"][i] if f"{at}.scalars" in p else 1 / h_BLND.shape[1])
    return total


def attend(q, keys, values, heads):
    """One query `[W]` to keys and values `[S, W]`, head by head."""
    size, out = q.shape[0] // heads, []
    for at in range(0, q.shape[0], size):
        scores = torch.stack([(q[at : at + size] * key[at : at + size]).sum() for key in keys]) / math.sqrt(size)
        shares = (scores - scores.max()).exp()
        shares = shares / shares.sum()
        out.append(sum(share * value[at : at + size] for share, value in zip(shares, values, strict=True)))
    return torch.cat(out)


def compare(fusion, features, formula, rng):
    """Values and gradients of a fusion are those of `formula(parameters, tokens)`, in float64, within 1e-5."""
    p = {name: value.detach().double().requires_grad_() for name, value in fusion.named_parameters()}
    tokens = [item.tokens.detach().double().requires_grad_() for item in features]
    given = [Features(item.tokens.detach().clone().requires_grad_(), item.grid) for item in features]
    out, wanted = fusion(given), formula(p, tokens)
    assert out.spec == fusion.out
    torch.testing.assert_close(out.tokens.double(), wanted, atol=1e-5, rtol=0)
    weights = torch.randn(wanted.shape, generator=rng) / math.sqrt(wanted.numel())
    (out.tokens * weights).sum().backward()
    (wanted * weights).sum().backward()
    pairs = {name: (value.grad, p[name].grad) for name, value in fusion.named_parameters()}
    pairs |= {f"tokens {k}": (given[k].tokens.grad, tokens[k].grad) for k in range(len(given))}
    for name, (ours, theirs) in pairs.items():
        assert ours is not None, name
        assert bool(ours.any()), name
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


@pytest.fixture
def formulas():
    """The functions of this module."""
    functions = (draw, randomise, gelu, normal, channels, bilinear, layer_sum, attend, compare)
    return SimpleNamespace(**{function.__name__: function for function in functions})


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(7)
