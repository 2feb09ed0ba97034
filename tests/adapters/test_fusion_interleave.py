"""`interleave` against its formula."""

from __future__ import annotations

import pytest
import torch

from chiasm.errors import CombinationError
from chiasm.features import FeatureSpec, SequenceSpec
from chiasm_adapters.interleave import Interleave, InterleaveConfig

ONE = FeatureSpec(layers=3, grid=(2, 3), width=5)
LARGE = FeatureSpec(layers=2, grid=(3, 5), width=4)
EQUAL = FeatureSpec(layers=1, grid=(2, 3), width=7)


@pytest.mark.parametrize("specs", [(ONE,), (ONE, EQUAL), (ONE, LARGE), (EQUAL, LARGE, ONE)])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("to", ["largest", "first"])
def test_equals_the_formula(formulas, rng, specs, depth, to):
    fusion = formulas.randomise(Interleave(InterleaveConfig(width=6, depth=depth, to=to), specs, 9), rng)
    grid = specs[0].grid if to == "first" or LARGE not in specs else LARGE.grid

    def formula(p, tokens):
        parts = []
        for k, h in enumerate(tokens):
            x = formulas.channels(h)
            for i in range(depth):
                x = formulas.gelu(x) if i else x
                x = x @ p[f"projections.{k}.{2 * i}.weight"].T + p[f"projections.{k}.{2 * i}.bias"]
            parts.append(formulas.bilinear(x, specs[k].grid, grid))
        places = range(grid[0] * grid[1])
        return torch.stack([part[:, place] for place in places for part in parts], dim=1)

    formulas.compare(fusion, formulas.draw(specs, rng), formula, rng)


def test_spec_and_what_it_refuses():
    assert Interleave.spec(InterleaveConfig(), [ONE, LARGE], 9) == SequenceSpec(30, 9, None)
    assert Interleave.spec(InterleaveConfig(to="first"), [ONE, LARGE, EQUAL], 9) == SequenceSpec(18, 9, None)
    assert Interleave.spec(InterleaveConfig(width=4), [ONE], 9) == SequenceSpec(6, 4, (2, 3))
    assert Interleave.spec(InterleaveConfig(align="error"), [ONE, EQUAL], 9).tokens == 12
    message = r"interleave wants equal grids, the encoders give \(2, 3\) and \(3, 5\); set `align: interpolate`"
    with pytest.raises(CombinationError, match=message):
        Interleave.spec(InterleaveConfig(align="error"), [ONE, LARGE], 9)
