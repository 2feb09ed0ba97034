"""`cross_attention` against its formula."""

from __future__ import annotations

import pytest
import torch

from chiasm.errors import CombinationError
from chiasm.features import Features, FeatureSpec, SequenceSpec
from chiasm_adapters.cross_attention import CrossAttention, CrossAttentionConfig

LOW = FeatureSpec(layers=2, grid=(2, 3), width=3)
DOUBLE = FeatureSpec(layers=1, grid=(4, 6), width=5)
ODD = FeatureSpec(layers=2, grid=(3, 7), width=4)
"""Neither 3 rows nor 7 columns fall on 2 and 3: they are resampled to 4 and 9."""
TALL = FeatureSpec(layers=1, grid=(4, 3), width=5)


@pytest.mark.parametrize(("high", "window"), [(DOUBLE, (2, 2)), (ODD, (2, 3)), (TALL, (2, 1))])
@pytest.mark.parametrize("heads", [1, 2])
def test_equals_the_formula(formulas, rng, high, window, heads):
    fusion = formulas.randomise(CrossAttention(CrossAttentionConfig(heads=heads), [LOW, high], 9), rng)
    full = (LOW.grid[0] * window[0], LOW.grid[1] * window[1])

    def formula(p, tokens):
        x, y = formulas.channels(tokens[0]), formulas.bilinear(formulas.channels(tokens[1]), high.grid, full)
        q = formulas.normal(x, p["query.0.weight"], p["query.0.bias"]) @ p["query.1.weight"].T + p["query.1.bias"]
        keys = formulas.normal(y, p["key.0.weight"]) @ p["key.1.weight"].T
        values = formulas.normal(y, p["value.0.weight"], p["value.0.bias"])
        values = values @ p["value.1.weight"].T + p["value.1.bias"]
        images = []
        for b in range(x.shape[0]):
            out = []
            for n in range(LOW.tokens):
                row, column = divmod(n, LOW.grid[1])
                seen = [
                    (row * window[0] + i) * full[1] + column * window[1] + j
                    for i in range(window[0])
                    for j in range(window[1])
                ]
                out.append(x[b, n] + formulas.attend(q[b, n], keys[b, seen], values[b, seen], heads))
            images.append(torch.stack(out))
        return torch.stack(images)

    formulas.compare(fusion, formulas.draw([LOW, high], rng), formula, rng)


def test_a_token_sees_its_own_window_alone(formulas, rng):
    fusion = formulas.randomise(CrossAttention(CrossAttentionConfig(), [LOW, DOUBLE], 9), rng)
    low, high = formulas.draw([LOW, DOUBLE], rng)
    before = fusion([low, high]).tokens
    changed = high.tokens.clone()
    changed[:, :, 2 * 6 + 4] += 1 - 2 * torch.arange(5) / 4  # row 2, column 4: the window of row 1, column 2
    moved = (fusion([low, Features(changed, high.grid)]).tokens - before).abs().amax((0, 2))
    assert [n for n in range(6) if moved[n] > 0] == [1 * 3 + 2]


def test_spec_and_what_it_refuses():
    config = CrossAttentionConfig()
    assert CrossAttention.spec(config, [LOW, DOUBLE], 9) == SequenceSpec(6, 2 * 3, (2, 3))
    for given in ([LOW], [LOW, DOUBLE, ODD]):
        with pytest.raises(CombinationError, match=f"takes two encoders, .*, given {len(given)}; choose `single`"):
            CrossAttention.spec(config, given, 9)
    message = r"finer grid than the first's, given \(4, 6\) and then \(2, 3\).* choose the other order"
    with pytest.raises(CombinationError, match=message):
        CrossAttention.spec(config, [DOUBLE, LOW], 9)
    with pytest.raises(CombinationError, match=r"given \(2, 3\) and then \(2, 3\)"):
        CrossAttention.spec(config, [LOW, LOW], 9)
    with pytest.raises(CombinationError, match="cross_attention: 4 heads do not divide the width 6"):
        CrossAttention.spec(CrossAttentionConfig(heads=4), [LOW, DOUBLE], 9)
