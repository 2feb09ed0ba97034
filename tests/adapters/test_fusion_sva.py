"""`sva` against its formula."""

from __future__ import annotations

import pytest
import torch

from chiasm.errors import CombinationError
from chiasm.features import Features, FeatureSpec, SequenceSpec
from chiasm_adapters.sva import Sva, SvaConfig

ONE = FeatureSpec(layers=3, grid=(4, 2), width=5)
ODD = FeatureSpec(layers=1, grid=(3, 5), width=4)
COARSE = FeatureSpec(layers=2, grid=(1, 2), width=3)


@pytest.mark.parametrize(
    ("specs", "windows"),
    [
        ((ONE,), [(2, 1)]),
        ((ONE, ODD), [(2, 1), (2, 3)]),
        ((COARSE, ODD, ONE), [(1, 1), (2, 3), (2, 1)]),
        ((COARSE, COARSE), [(1, 1), (1, 1)]),
    ],
)
def test_equals_the_formula(formulas, rng, specs, windows):
    depth, width, heads, grid = 2, 6, 2, (2, 2)
    fusion = formulas.randomise(Sva(SvaConfig(grid=grid, depth=depth, width=width, heads=heads), specs, 9), rng)

    def norm(p, at, x):
        return formulas.normal(x, p[f"{at}.weight"], p.get(f"{at}.bias", 0.0))

    def formula(p, tokens):
        maps = []
        for k, h in enumerate(tokens):
            at = f"projections.{k}"
            y = formulas.gelu(formulas.channels(h) @ p[f"{at}.0.weight"].T + p[f"{at}.0.bias"])
            y = norm(p, f"{at}.3", y @ p[f"{at}.2.weight"].T + p[f"{at}.2.bias"])
            full = (grid[0] * windows[k][0], grid[1] * windows[k][1])
            maps.append(formulas.bilinear(y, specs[k].grid, full))
        images = []
        for b in range(tokens[0].shape[0]):
            out = []
            for cell in range(grid[0] * grid[1]):
                row, column = divmod(cell, grid[1])
                x = p["queries"][cell]
                for i in range(depth):
                    at = f"layers.{i}"
                    keys, values = [], []
                    for k, (rows, columns) in enumerate(windows):
                        for place in range(rows * columns):
                            r, c = divmod(place, columns)
                            y = maps[k][b, (row * rows + r) * grid[1] * columns + column * columns + c]
                            if rows * columns > 1:
                                y = y + p[f"{at}.places.{k}"][place]
                            keys.append(p[f"{at}.keys.{k}.1.weight"] @ norm(p, f"{at}.keys.{k}.0", y))
                            values.append(p[f"{at}.values.{k}.1.weight"] @ norm(p, f"{at}.values.{k}.0", y))
                    q = p[f"{at}.query.1.weight"] @ norm(p, f"{at}.query.0", x)
                    seen = p[f"{at}.output.weight"] @ formulas.attend(q, keys, values, heads)
                    inside = formulas.gelu(p[f"{at}.mlp.0.weight"] @ norm(p, f"{at}.norm", x + seen))
                    x = x + p[f"{at}.mlp.2.weight"] @ inside
                out.append(x)
            images.append(torch.stack(out))
        return torch.stack(images)

    formulas.compare(fusion, formulas.draw(specs, rng), formula, rng)


def test_a_query_sees_its_own_cell_alone(formulas, rng):
    spec = FeatureSpec(layers=1, grid=(4, 6), width=5)
    fusion = formulas.randomise(Sva(SvaConfig(grid=(2, 3), depth=2, width=8, heads=2), [spec, spec], 9), rng)
    first, second = formulas.draw([spec, spec], rng)
    before = fusion([first, second]).tokens
    changed = second.tokens.clone()
    changed[:, :, 1 * 6 + 5] += torch.randn(5, generator=rng)  # row 1, column 5: the cell of row 0, column 2
    moved = (fusion([first, Features(changed, spec.grid)]).tokens - before).abs().amax((0, 2))
    assert [n for n in range(6) if moved[n] > 0] == [2]


def test_queries_start_as_stated():
    torch.manual_seed(0)
    queries = Sva(SvaConfig(grid=(12, 12), depth=1, width=64, heads=1), [ONE, ODD], 9).queries
    assert queries.shape == (144, 64)
    assert queries.std().item() == pytest.approx(64**-0.5, rel=0.03)
    assert queries.mean().item() == pytest.approx(0, abs=4e-3)


def test_spec_and_what_it_refuses():
    assert Sva.spec(SvaConfig(), [ONE, ODD], 9) == SequenceSpec(576, 1024, (24, 24))
    assert Sva.spec(SvaConfig(grid=(2, 3), width=32), [COARSE, ODD], 9) == SequenceSpec(6, 32, (2, 3))
    message = (
        r"on its grid \(24, 24\) each query sees 1 feature of the only encoder, whose grid is \(4, 2\), .* fewer rows"
    )
    with pytest.raises(CombinationError, match=message):
        Sva.spec(SvaConfig(), [ONE], 9)
    with pytest.raises(CombinationError, match="sva: 16 heads do not divide the width 24; set `heads`"):
        Sva.spec(SvaConfig(width=24), [ONE, ODD], 9)
