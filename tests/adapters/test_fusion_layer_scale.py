"""`layer_scale` against its formula."""

from __future__ import annotations

import pytest
import torch

from chiasm.errors import CombinationError
from chiasm.features import FeatureSpec, SequenceSpec
from chiasm_adapters.layer_scale import LayerScale, LayerScaleConfig

ONE = FeatureSpec(layers=3, grid=(2, 3), width=5)
LARGE = FeatureSpec(layers=2, grid=(3, 5), width=4)
EQUAL = FeatureSpec(layers=4, grid=(2, 3), width=7)


@pytest.mark.parametrize("specs", [(ONE,), (ONE, EQUAL), (ONE, LARGE), (EQUAL, LARGE, ONE)])
@pytest.mark.parametrize("mlp", ["others", "all", "none"])
@pytest.mark.parametrize(("width", "bias", "to"), [(None, True, "largest"), (6, False, "first")])
def test_equals_the_formula(formulas, rng, specs, mlp, width, bias, to):
    fusion = formulas.randomise(LayerScale(LayerScaleConfig(mlp=mlp, width=width, bias=bias, to=to), specs, 9), rng)

    def formula(p, tokens):
        parts = []
        for k, h in enumerate(tokens):
            u = formulas.layer_sum(p, f"projections.{k}", h)
            if mlp == "all" or (mlp == "others" and k > 0):
                inside = formulas.gelu(u @ p[f"mlps.{k}.0.weight"].T + p[f"mlps.{k}.0.bias"])
                u = inside @ p[f"mlps.{k}.2.weight"].T + p[f"mlps.{k}.2.bias"]
            parts.append(formulas.bilinear(u, specs[k].grid, fusion.out.grid))
        return torch.cat(parts, dim=2)

    formulas.compare(fusion, formulas.draw(specs, rng), formula, rng)


def test_one_encoder_is_the_formula_alone():
    names = set(LayerScale(LayerScaleConfig(), [ONE], 9).state_dict())
    assert names == {f"projections.0.{name}" for name in ("norm_weight", "norm_bias", "weight", "bias", "scalars")}


def test_spec_and_what_it_refuses():
    assert LayerScale.spec(LayerScaleConfig(), [ONE, LARGE], 9) == SequenceSpec(15, 5 + 4, (3, 5))
    assert LayerScale.spec(LayerScaleConfig(to="first", width=6), [ONE, LARGE], 9) == SequenceSpec(6, 12, (2, 3))
    message = r"layer_scale wants equal grids, the encoders give \(2, 3\) and \(3, 5\); set `align: interpolate`"
    with pytest.raises(CombinationError, match=message):
        LayerScale.spec(LayerScaleConfig(align="error"), [ONE, LARGE], 9)
