"""`concat_tokens` against its formula."""

from __future__ import annotations

import pytest
import torch

from chiasm.errors import CombinationError
from chiasm.features import FeatureSpec, SequenceSpec
from chiasm_adapters.concat_tokens import ConcatTokens, ConcatTokensConfig

ONE = FeatureSpec(layers=3, grid=(2, 3), width=5)
LARGE = FeatureSpec(layers=2, grid=(3, 5), width=4)
THIRD = FeatureSpec(layers=1, grid=(1, 2), width=7)


@pytest.mark.parametrize("specs", [(ONE,), (LARGE, ONE), (ONE, LARGE, THIRD)])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_formula(formulas, rng, specs, bias):
    fusion = formulas.randomise(ConcatTokens(ConcatTokensConfig(width=6, bias=bias), specs, 9), rng)

    def formula(p, tokens):
        parts = []
        for k, h in enumerate(tokens):
            part = formulas.channels(h) @ p[f"projections.{k}.weight"].T
            parts.append(part + p[f"projections.{k}.bias"] if bias else part)
        return torch.cat(parts, dim=1)

    formulas.compare(fusion, formulas.draw(specs, rng), formula, rng)


def test_spec_sums_tokens_and_keeps_the_grid_of_one_encoder_alone():
    config = ConcatTokensConfig()
    assert ConcatTokens.spec(config, [ONE, LARGE], 9) == SequenceSpec(6 + 15, 9, None)
    assert ConcatTokens.spec(config, [ONE, ONE], 9) == SequenceSpec(12, 9, None)
    assert ConcatTokens.spec(ConcatTokensConfig(width=4), [ONE], 9) == SequenceSpec(6, 4, (2, 3))
    with pytest.raises(CombinationError, match="concat_tokens was given the features of no encoder"):
        ConcatTokens.spec(config, [], 9)
