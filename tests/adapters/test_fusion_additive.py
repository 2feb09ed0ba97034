"""`additive` against its formula."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from chiasm.errors import CombinationError
from chiasm.features import FeatureSpec, SequenceSpec
from chiasm_adapters.additive import Additive, AdditiveConfig

ONE = FeatureSpec(layers=3, grid=(2, 3), width=5)
LARGE = FeatureSpec(layers=2, grid=(3, 5), width=4)
EQUAL = FeatureSpec(layers=1, grid=(2, 3), width=7)


@pytest.mark.parametrize(
    ("specs", "weights", "to"),
    [
        ((ONE, EQUAL), (0.25, 0.75), "largest"),
        ((ONE, LARGE), (0.625, 0.375), "largest"),
        ((LARGE, ONE, EQUAL), (0.2, 0.3, 0.5), "largest"),
        ((ONE, LARGE), None, "first"),
        ((LARGE,), None, "largest"),
    ],
)
@pytest.mark.parametrize("learned", [True, False])
def test_equals_the_formula(formulas, rng, specs, weights, to, learned):
    fusion = formulas.randomise(
        Additive(AdditiveConfig(width=6, weights=weights, learned=learned, to=to), specs, 9), rng
    )

    def formula(p, tokens):
        fixed = weights or [1 / len(specs)] * len(specs)
        powers = [p["logits"][k].exp() for k in range(len(specs))] if "logits" in p else fixed
        total = 0
        for k, h in enumerate(tokens):
            placed = formulas.bilinear(formulas.channels(h), specs[k].grid, fusion.out.grid)
            projected = placed @ p[f"projections.{k}.weight"].T + p[f"projections.{k}.bias"]
            total = total + powers[k] / sum(powers) * projected
        return total

    assert ("logits" in fusion.state_dict()) == (learned and len(specs) > 1)
    formulas.compare(fusion, formulas.draw(specs, rng), formula, rng)


def test_learned_shares_start_at_the_weights(formulas, rng):
    features = formulas.draw([ONE, LARGE], rng)
    fixed, learned = (
        Additive(AdditiveConfig(weights=(0.7, 0.3), learned=learned), [ONE, LARGE], 9) for learned in (False, True)
    )
    learned.load_state_dict(fixed.state_dict(), strict=False)
    difference = fixed(features).tokens - learned(features).tokens
    assert difference.abs().max() < 1e-6


def test_spec_and_what_it_refuses():
    assert Additive.spec(AdditiveConfig(), [ONE, LARGE], 9) == SequenceSpec(15, 9, (3, 5))
    assert Additive.spec(AdditiveConfig(to="first", width=4), [ONE, LARGE], 9) == SequenceSpec(6, 4, (2, 3))
    message = r"`weights` has 2 and the run has 3 encoders; give as many, or null"
    with pytest.raises(CombinationError, match=message):
        Additive.spec(AdditiveConfig(weights=(0.5, 0.5)), [ONE, LARGE, EQUAL], 9)
    message = r"additive wants equal grids, the encoders give \(2, 3\) and \(3, 5\); set `align: interpolate`"
    with pytest.raises(CombinationError, match=message):
        Additive.spec(AdditiveConfig(align="error"), [ONE, LARGE], 9)
    with pytest.raises(ValidationError, match=r"sum to 1.5, wanted 1; divide each by their sum"):
        AdditiveConfig(weights=(0.5, 1.0))
    with pytest.raises(ValidationError, match="greater than 0"):
        AdditiveConfig(weights=(0.0, 1.0))
