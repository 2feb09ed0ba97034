"""`project_sum` under autocast: what a run trains in, frozen features in bfloat16 and parameters in float32."""

from __future__ import annotations

import pytest
import torch

from chiasm.features import Features, FeatureSpec
from chiasm_adapters.project_sum import ProjectSum, ProjectSumConfig

SPEC = FeatureSpec(layers=4, grid=(3, 4), width=16)


@pytest.mark.parametrize("of_features", [torch.bfloat16, torch.float32])
def test_autocast_computes_in_bfloat16_and_learns_in_float32(formulas, rng, of_features):
    fusion = formulas.randomise(ProjectSum(ProjectSumConfig(width=32, activation="none"), [SPEC], 9), rng)
    (item,) = formulas.draw([SPEC], rng, images=4)
    item = Features(item.tokens.to(torch.bfloat16), SPEC.grid)
    p = {name: value.detach().double().requires_grad_() for name, value in fusion.named_parameters()}
    tokens = item.tokens.double().requires_grad_()
    given = item.tokens.to(of_features).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = fusion([Features(given, SPEC.grid)]).tokens
    wanted = formulas.layer_sum(p, "projections.0", tokens)
    assert out.dtype == torch.bfloat16
    weights = torch.randn(wanted.shape, generator=rng)
    (out.float() * weights).sum().backward()
    (wanted * weights).sum().backward()
    pairs = {name: (value.grad, p[name].grad) for name, value in fusion.named_parameters()}
    pairs |= {"out": (out, wanted), "tokens": (given.grad, tokens.grad)}
    for name, (ours, theirs) in pairs.items():
        assert ours.dtype == {"out": torch.bfloat16, "tokens": of_features}.get(name, torch.float32), name
        error = (ours.double() - theirs).norm() / theirs.norm()
        assert error < 0.02, f"{name}: {error}"  # bfloat16 keeps 8 bits: 0.004 a number


def test_one_encoder_over_all_layers_is_the_control(formulas, rng):
    fusion = formulas.randomise(ProjectSum(ProjectSumConfig(width=6), [SPEC], 9), rng)
    formulas.compare(
        fusion,
        formulas.draw([SPEC], rng),
        lambda p, tokens: formulas.gelu(formulas.layer_sum(p, "projections.0", tokens[0])),
        rng,
    )
    assert fusion.out.grid == (3, 4)
