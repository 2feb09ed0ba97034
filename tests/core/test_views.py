"""Views: which grid an image is cut on, what each view shows, and where its tokens stand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from chiasm.adapter import Adapter
from chiasm.config import ImageConfig, TokensConfig
from chiasm.errors import CombinationError, DataError
from chiasm.features import SequenceSpec
from chiasm.image import ImageSpec, fit
from chiasm.prompt import LEARNED, Position, PromptBuilder
from chiasm.sample import Sample, Turn
from chiasm.views import Views, best_grid, candidate_grids
from chiasm.vlm import VLM
from chiasm_experiments.data.feed import FeatureMemo, Feed

LLAVA_NEXT = ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))
TILE = ImageSpec(height=8, width=8)
ON_GRID = SequenceSpec(4, 16, (2, 2))


def image_config(**fields) -> ImageConfig:
    return ImageConfig.model_validate({"views": "tiles", **fields})


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


class Given:
    """An image that is there already."""

    def __init__(self, image: Image.Image) -> None:
        self.image = image
        self.key = f"{image.size}{hash(image.tobytes())}"

    def load(self) -> Image.Image:
        return self.image


@pytest.fixture
def tiled(make_vlm):
    """The toy model with tiles; its visual tokens have the grid (2, 2)."""

    def make(encoders: int = 1, tokens: TokensConfig | None = None, **fields) -> VLM:
        plain = make_vlm(1) if encoders == 1 else make_vlm(encoders)
        adapter: Adapter = plain.adapter
        adapter.out = SequenceSpec(adapter.out.tokens, adapter.out.width, (2, adapter.out.tokens // 2))
        views = Views(image_config(**fields), TILE, adapter.out)
        learned = 5 if tokens is not None and tokens.views else 4
        return VLM(plain.encoders, plain.fusion, adapter, plain.llm, views, learned).eval()

    return make


@pytest.mark.parametrize(
    "grids",
    [LLAVA_NEXT, candidate_grids(image_config(max_tiles=6)), candidate_grids(image_config(max_tiles=6))[::-1]],
    ids=["LLaVA-NeXT's", "up to six", "large ones first"],
)
@pytest.mark.parametrize("tile", [(336, 336), (8, 12)])
def test_the_grid_is_the_one_that_llava_next_chooses(tile, grids):
    """Where two canvases keep as much of an image, the one that wastes less, in whatever order they are given."""
    from transformers.image_processing_utils import select_best_resolution

    rng = np.random.default_rng(1)
    canvases = [[rows * tile[0], columns * tile[1]] for rows, columns in grids]
    for height, width in np.exp(rng.uniform(0, 8, (300, 2))).astype(int).tolist():
        rows, columns = best_grid((height, width), tile, grids)
        wanted = select_best_resolution((height, width), canvases)
        assert [rows * tile[0], columns * tile[1]] == list(wanted), (height, width, tile)


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((8, 8), (1, 1)),
        ((3, 5), (1, 1)),
        ((16, 16), (2, 2)),
        ((8, 24), (1, 3)),
        ((32, 8), (4, 1)),
        ((500, 480), (2, 2)),
    ],
)
def test_small_images_stay_whole_and_long_ones_are_cut_along(size, grid):
    assert best_grid(size, (8, 8), candidate_grids(image_config(max_tiles=4))) == grid


def test_every_grid_up_to_the_limit_may_be_chosen_once():
    grids = candidate_grids(image_config(max_tiles=6))
    assert sorted(grids) == sorted({(r, c) for r in range(1, 7) for c in range(1, 7) if r * c <= 6})
    assert candidate_grids(ImageConfig()) == ()


@pytest.mark.parametrize("resize", ["pad", "squash", "crop", "native"])
def test_tiles_are_the_pieces_of_an_image_that_fits_the_canvas(resize, tiled):
    vlm = tiled(resize=resize, max_tiles=6)
    encoder = vlm.encoders[0]
    image = noise(24, 16)
    views = vlm.views.pixels(image, encoder)
    pieces = [image.crop((x, y, x + 8, y + 8)) for y in (0, 8) for x in (0, 8, 16)]
    assert views.shape == (7, 3, 8, 8)
    torch.testing.assert_close(views[0], encoder.preprocess([image], resize)[0], rtol=0, atol=0)
    torch.testing.assert_close(views[1:], encoder.preprocess(pieces, "squash"), rtol=0, atol=0)


@pytest.mark.parametrize("native", ["crop", "squash"])
def test_native_pads_the_canvas_of_tiles_and_processes_the_whole(native, tiled):
    """A published processor knows no tiles: cut out of the middle, they would lose the border of the image."""
    vlm = tiled(resize="native", max_tiles=4)
    encoder, image = vlm.encoders[0], noise(23, 9)
    encoder.geometry = replace(
        encoder.geometry, image=encoder.geometry.image.model_copy(update={"native": native, "mean": (0.2, 0.4, 0.6)})
    )
    views, padded = (
        Views(image_config(resize=resize, max_tiles=4), TILE, ON_GRID).pixels(image, encoder)
        for resize in ("native", "pad")
    )
    assert len(views) > 2
    torch.testing.assert_close(views[1:], padded[1:], rtol=0, atol=0)
    torch.testing.assert_close(views[0], encoder.preprocess([image], native)[0], rtol=0, atol=0)
    assert not torch.equal(views[0], padded[0])


def test_a_canvas_of_another_shape_is_padded_squashed_or_cropped():
    spec = ImageSpec(height=8, width=8, mean=(0.2, 0.4, 0.6))
    white = Image.new("RGB", (10, 10), "white")
    padded = np.asarray(fit(white, (8, 24), "pad", spec))
    assert (padded[:, 8:16] == 255).all()
    assert (padded[:, :8] == [51, 102, 153]).all()
    assert (padded[:, 16:] == [51, 102, 153]).all()
    for policy in ("squash", "crop"):
        assert (np.asarray(fit(white, (8, 24), policy, spec)) == 255).all()


@pytest.mark.parametrize(("whole", "count"), [(True, 5), (False, 4)])
def test_counts_and_tokens_of_views(whole, count):
    views = Views(image_config(max_tiles=4, whole=whole), TILE, ON_GRID)
    assert views.count(noise(16, 16)) == count
    assert views.tokens(count) == (4,) * count
    assert views.tokens(1) == (4,)
    assert views.counts == (1, count)
    assert views.most_tokens == 4 * count
    pooled = Views(image_config(max_tiles=4, whole=whole, pool=2), TILE, ON_GRID)
    assert pooled.tokens(count) == ((4, 1, 1, 1, 1) if whole else (1, 1, 1, 1))
    assert pooled.most_tokens == (8 if whole else 4)


def test_each_view_stands_in_its_place_with_separators_between(tiled):
    tokens = TokensConfig(views=("SEP",))
    vlm = tiled(tokens=tokens, max_tiles=2)
    image = noise(16, 8)
    builder = PromptBuilder(vlm.llm, tokens, vlm.visual_tokens, "")
    feed = Feed(vlm, builder)
    sample = Sample("s", (Turn("q", "a"),), (Given(image),))
    example = feed.train(sample)
    batch = feed.batch([example, feed.train(Sample("t", (Turn("text", "only"),)))], torch.device("cpu"))
    embeds_TE = vlm.embed(batch)[0]
    kinds = batch.kinds_BT[0].tolist()
    sep = [i for i, kind in enumerate(kinds) if kind == Position.LEARNED and batch.ids_BT[0, i] == LEARNED.index("SEP")]
    first = kinds.index(Position.VISUAL)
    assert sep == [first + 4, first + 9]
    views = vlm.see([vlm.views.pixels(image, vlm.encoders[0])])
    for i in range(3):
        torch.testing.assert_close(embeds_TE[first + 5 * i : first + 5 * i + 4], views[i], rtol=0, atol=0)
    torch.testing.assert_close(embeds_TE[sep[0]], vlm.tokens.vectors[4], rtol=0, atol=0)
    assert (batch.kinds_BT[1] != Position.VISUAL).all()


def test_tiles_are_pooled_and_the_whole_image_is_not(tiled):
    vlm = tiled(max_tiles=2, pool=2)
    image = noise(16, 8)
    builder = PromptBuilder(vlm.llm, TokensConfig(), vlm.visual_tokens, "")
    feed = Feed(vlm, builder)
    batch = feed.batch([feed.train(Sample("s", (Turn("q", "a"),), (Given(image),)))], torch.device("cpu"))
    found_XE = vlm.embed(batch)[0][batch.kinds_BT[0] == Position.VISUAL]
    views_VNE = vlm.see([vlm.views.pixels(image, vlm.encoders[0])]).double()
    wanted_XE = torch.cat([views_VNE[0], views_VNE[1].mean(0, keepdim=True), views_VNE[2].mean(0, keepdim=True)])
    torch.testing.assert_close(found_XE.double(), wanted_XE, rtol=0, atol=1e-6)
    loss, _ = vlm(batch)
    loss.backward()
    assert all(parameter.grad is not None for parameter in vlm.adapter.parameters())


def test_neighbours_of_other_shapes_change_nothing(tiled):
    vlm = tiled(max_tiles=4, pool=2)
    builder = PromptBuilder(vlm.llm, TokensConfig(), vlm.visual_tokens, "")
    feed = Feed(vlm, builder)
    samples = [
        Sample("a", (Turn("q", "a"),), (Given(noise(16, 16, 1)),)),
        Sample("b", (Turn("<image>and<image>", "b"),), (Given(noise(5, 5, 2)), Given(noise(24, 8, 3)))),
        Sample("c", (Turn("text", "c"),)),
    ]
    device = torch.device("cpu")
    together = vlm.embed(feed.batch([feed.train(sample) for sample in samples], device))
    for row, sample in zip(together, samples, strict=True):
        alone = vlm.embed(feed.batch([feed.train(sample)], device))[0]
        torch.testing.assert_close(row[: len(alone)], alone, rtol=0, atol=0)


def test_remembered_features_of_tiles_give_the_same_batch(tiled):
    vlm = tiled(max_tiles=4)
    vlm.set_trained(["adapter"])
    builder = PromptBuilder(vlm.llm, TokensConfig(), vlm.visual_tokens, "")
    samples = [
        Sample("a", (Turn("q", "a"),), (Given(noise(16, 16, 1)),)),
        Sample("b", (Turn("q", "b"),), (Given(noise(5, 5, 2)), Given(noise(16, 16, 1)))),
    ]
    device = torch.device("cpu")
    live = Feed(vlm, builder)
    wanted = vlm.embed(live.batch([live.train(sample) for sample in samples], device))
    memo = FeatureMemo(2**20)
    feed = Feed(vlm, builder, memo, ["toy"])
    for _ in range(2):  # computed, then remembered
        examples = [feed.train(sample) for sample in samples]
        torch.testing.assert_close(vlm.embed(feed.batch(examples, device)), wanted, rtol=0, atol=0)
    assert not examples[0].pixels
    other = Feed(tiled(max_tiles=2), builder, memo, ["toy"])
    assert other.train(samples[0]).pixels, "features of other tiles were taken"


def test_an_image_with_too_many_tiles_for_the_context_is_named(tiled):
    vlm = tiled(max_tiles=16)
    feed = Feed(vlm, PromptBuilder(vlm.llm, TokensConfig(), vlm.visual_tokens, ""))
    with pytest.raises(DataError, match="sample 'big' is longer than the context of 64"):
        feed.train(Sample("big", (Turn("q", "a"),), (Given(noise(32, 32)),)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"views": "whole", "pool": 2}, "pool: for `views: tiles`, given `views: whole`"),
        ({"views": "whole", "max_tiles": 9, "whole": False}, "max_tiles, whole: for `views: tiles`"),
        ({"grids": [[1, 2]], "max_tiles": 2}, "give one of the two"),
        ({"grids": []}, "at least 1 item"),
        ({"grids": [[0, 1]]}, "greater than 0"),
        ({"max_tiles": 0}, "greater than 0"),
    ],
)
def test_settings_that_disagree_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        image_config(**fields)


@pytest.mark.parametrize(
    ("sequence", "found"),
    [(SequenceSpec(4, 16), "they have no grid"), (SequenceSpec(6, 16, (2, 3)), r"they have the grid \(2, 3\)")],
)
def test_pooling_wants_a_grid_that_it_divides(sequence, found):
    with pytest.raises(CombinationError, match=f"pool: 2 wants visual tokens on a grid that 2 divides, {found}"):
        Views(image_config(pool=2), TILE, sequence)
