"""`project_attention` against its formula, in both orientations."""

from __future__ import annotations

import pytest
import torch

from chiasm.errors import CombinationError
from chiasm.features import FeatureSpec, SequenceSpec
from chiasm_adapters.project_attention import ProjectAttention, ProjectAttentionConfig

ONE = FeatureSpec(layers=3, grid=(2, 3), width=5)
LARGE = FeatureSpec(layers=2, grid=(2, 4), width=4)


@pytest.mark.parametrize("specs", [(ONE,), (ONE, LARGE)])
@pytest.mark.parametrize("query", ["matrix", "features"])
@pytest.mark.parametrize(("heads", "scalars", "bias"), [(2, True, True), (1, False, False)])
def test_equals_the_formula(formulas, rng, specs, query, heads, scalars, bias):
    config = ProjectAttentionConfig(query=query, rows=5, width=6, heads=heads, layer_scalars=scalars, bias=bias)
    fusion = formulas.randomise(ProjectAttention(config, specs, 9), rng)

    def project(p, name, x):
        x = x @ p[f"attention.{name}.weight"].T
        return x + p[f"attention.{name}.bias"] if bias and name != "key" else x

    def formula(p, tokens):
        v = torch.cat(
            [formulas.gelu(formulas.layer_sum(p, f"projections.{k}", h)) for k, h in enumerate(tokens)], dim=1
        )
        images = []
        for image in v:
            asked, given = (p["matrix"], image) if query == "matrix" else (image, p["matrix"])
            keys, values = project(p, "key", given), project(p, "value", given)
            images.append(torch.stack([formulas.attend(q, keys, values, heads) for q in project(p, "query", asked)]))
        return formulas.gelu(project(p, "output", torch.stack(images)))

    formulas.compare(fusion, formulas.draw(specs, rng), formula, rng)


def test_spec_and_what_it_refuses():
    matrix, features = (ProjectAttentionConfig(query=query, heads=3) for query in ("matrix", "features"))
    assert ProjectAttention.spec(matrix, [ONE, LARGE], 9) == SequenceSpec(576, 9, None)
    assert ProjectAttention.spec(features, [ONE, LARGE], 9) == SequenceSpec(6 + 8, 9, None)
    assert ProjectAttention.spec(features, [LARGE], 9) == SequenceSpec(8, 9, (2, 4))
    message = "project_attention: 8 heads do not divide the width 9; set `heads` to a divisor of it, or set `width`"
    with pytest.raises(CombinationError, match=message):
        ProjectAttention.spec(ProjectAttentionConfig(), [ONE, LARGE], 9)
