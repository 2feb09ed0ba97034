"""The world's scenes and pixels: what is drawn is what is described, and no scene is in two splits."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ImageFont
from scipy import stats
from sklearn.datasets import load_digits

from chiasm_experiments.world import sampling
from chiasm_experiments.world.digits import sources
from chiasm_experiments.world.render import LARGE_TEXT, MIN_SIZE, SMALL_TEXT, WorldImage, render
from chiasm_experiments.world.sampling import CONTENTS, Box, draw_contents, draw_scene, stream
from chiasm_experiments.world.scene import COLOURS, KINDS, SPLITS, WORDS, Digit, Scene, Shape, Split, Word


def scenes(split: Split, number: int, seed: int = 0) -> list[Scene]:
    found = []
    for index in range(number):
        rng = stream(seed, split, index)
        found.append(draw_scene(draw_contents([CONTENTS[index % len(CONTENTS)]], CONTENTS, rng), split, rng))
    return found


def pixels(scene: Scene, size: int) -> NDArray[np.int64]:
    return np.asarray(render(scene, size)).astype(np.int64)


def darkness(scene: Scene, size: int) -> tuple[int, int]:
    """Width and height of what is darker than any background."""
    rows, columns = np.nonzero(pixels(scene, size).max(axis=2) < 150)
    return int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1


@pytest.fixture(scope="module")
def crowd() -> list[Scene]:
    return [draw_scene(CONTENTS, "train", stream(3, "train", i)) for i in range(150)]


def test_no_scene_is_in_two_splits() -> None:
    owned: dict[str, set[str]] = {split: set() for split in SPLITS}
    for split in SPLITS:
        for seed in (0, 1, 2**32 - 1):
            for scene in scenes(split, 700, seed):
                described = json.dumps([scene.shapes, scene.digit, scene.words])
                assert hashlib.sha256(described.encode()).digest()[0] % 2 == SPLITS.index(split)
                assert scene.split == split
                owned[split].add(described)
    assert not owned["train"] & owned["eval"]
    assert all(len(found) == 2100 for found in owned.values()), "two seeds or indices drew the same scene"


def test_a_background_does_not_move_a_scene_to_the_other_split() -> None:
    scene = scenes("eval", 1)[0]
    twin = Scene(scene.shapes, scene.digit, scene.words, scene.counted, scene.background + 1)
    assert twin.split == scene.split
    assert twin.digest != scene.digest


def test_handwriting_is_divided_between_the_splits() -> None:
    data = load_digits()
    train, evaluation = sources("train"), sources("eval")
    for value in range(10):
        assert min(len(train[value]), len(evaluation[value])) > 50
        assert not set(train[value]) & set(evaluation[value])
        assert set(data.target[[*train[value], *evaluation[value]]]) == {value}
    assert sum(map(len, train + evaluation)) == len(data.target)
    images = [{data.images[i].tobytes() for group in split for i in group} for split in (train, evaluation)]
    assert not images[0] & images[1]
    for split in SPLITS:
        shown = [scene.digit for scene in scenes(split, 200) if scene.digit is not None]
        assert all(digit.source in sources(split)[digit.value] for digit in shown)


def test_objects_stay_in_the_image_and_apart(crowd: list[Scene]) -> None:
    for scene in crowd:
        boxes = [(s.x, s.y, s.radius, s.radius) for s in scene.shapes]
        assert scene.digit is not None
        boxes.append((scene.digit.x, scene.digit.y, *sampling.DIGIT_BOX))
        boxes += [(w.x, w.y, *(sampling.LARGE_BOX if w.large else sampling.SMALL_BOX)) for w in scene.words]
        assert all(half_x <= x <= 1000 - half_x and half_y <= y <= 1000 - half_y for x, y, half_x, half_y in boxes)
        for (ax, ay, aw, ah), (bx, by, bw, bh) in combinations(boxes, 2):
            assert abs(ax - bx) > aw + bw or abs(ay - by) > ah + bh


@pytest.mark.parametrize("size", [MIN_SIZE, 104, 224, 1024])
def test_words_fit_their_boxes(size: int) -> None:
    for letters, box in ((round(LARGE_TEXT * size / 1000), sampling.LARGE_BOX), (SMALL_TEXT, sampling.SMALL_BOX)):
        for word in WORDS:
            left, top, right, bottom = ImageFont.load_default(letters).getbbox(word, anchor="mm")
            assert max(-left, right) <= box.x * size / 1000, word
            assert max(-top, bottom) <= box.y * size / 1000, word


def test_a_scene_holds_what_is_asked_of_it() -> None:
    for content in CONTENTS:
        scene = draw_scene([content], "train", stream(0, "train", 5))
        held = {
            "shapes": bool(scene.shapes),
            "group": scene.counted is not None,
            "digit": scene.digit is not None,
            "large_word": any(word.large for word in scene.words),
            "small_word": any(not word.large for word in scene.words),
        }
        assert {name for name, there in held.items() if there} == {content, *(["shapes"] if content == "group" else [])}


def test_something_can_be_named_in_every_scene_of_shapes(crowd: list[Scene]) -> None:
    for scene in crowd:
        kinds = Counter(shape.kind for shape in scene.shapes)
        assert scene.counted in kinds
        assert 2 <= sum(number == 1 for kind, number in kinds.items() if kind != scene.counted) <= 3
        assert 1 in Counter(shape.colour for shape in scene.shapes).values()


@pytest.mark.parametrize("size", [MIN_SIZE, 224])
def test_shapes_have_their_colour_and_nothing_else_has_it(crowd: list[Scene], size: int) -> None:
    for scene in crowd[:40]:
        image = pixels(scene, size)
        area: Counter[str] = Counter()
        for shape in scene.shapes:
            left, top, right, bottom = (
                round(v * size / 1000)
                for v in (
                    shape.x - shape.radius,
                    shape.y - shape.radius,
                    shape.x + shape.radius,
                    shape.y + shape.radius,
                )
            )
            patch = image[max(top - 1, 0) : bottom + 1, max(left - 1, 0) : right + 1]
            counts = {name: int((patch == rgb).all(axis=2).sum()) for name, rgb in COLOURS.items()}
            assert counts[shape.colour] > 0.15 * (right - left) * (bottom - top)
            assert sum(counts.values()) == counts[shape.colour], "two colours in one shape"
            area[shape.colour] += counts[shape.colour]
        for name, rgb in COLOURS.items():
            assert (image == rgb).all(axis=2).sum() == area[name]


def test_colours_differ_for_the_eye() -> None:
    assert min(np.abs(np.subtract(a, b)).max() for a, b in combinations(COLOURS.values(), 2)) > 60


def test_no_two_kinds_look_alike() -> None:
    masks = {}
    for kind in KINDS:
        scene = Scene((Shape(kind, "black", 500, 500, 400),), None, (), None, 0)
        masks[kind] = (pixels(scene, 200) == COLOURS["black"]).all(axis=2)
    for a, b in combinations(KINDS, 2):
        overlap = (masks[a] & masks[b]).sum() / (masks[a] | masks[b]).sum()
        assert overlap < 0.85, (a, b)
    for kind in KINDS:
        mirrored = masks[kind][:, ::-1]
        assert (masks[kind] & mirrored).sum() > 0.9 * masks[kind].sum(), f"{kind} is lopsided"


def test_a_digit_shows_its_handwriting() -> None:
    for source in (0, 17, 1796):
        image = pixels(Scene((), Digit(0, source, 500, 500), (), None, 0), 500)
        half = sampling.DIGIT_BOX.x * 500 // 1000
        patch = image[250 - half : 250 + half, 250 - half : 250 + half].mean(axis=2)
        # the margin of paper is a tenth of the box on each side
        cells = patch[half // 5 : -half // 5, half // 5 : -half // 5].reshape(8, 11, 8, 11).mean(axis=(1, 3))
        assert np.corrcoef(-cells.ravel(), load_digits().images[source].ravel())[0, 1] > 0.95


def test_small_text_keeps_its_height_and_large_text_grows() -> None:
    small, large = (Scene((), None, (Word("farm", is_large, 500, 500),), None, 0) for is_large in (False, True))
    assert darkness(small, 128) == darkness(small, 512)
    width, height = darkness(large, 512)
    assert np.allclose((width, height), 4 * np.array(darkness(large, 128)), atol=6)
    assert height > 4 * darkness(small, 512)[1]


def test_pixels_are_repeatable_and_bounded(crowd: list[Scene]) -> None:
    for scene in crowd[:5]:
        image = render(scene, 112)
        assert (image.mode, image.size) == ("RGB", (112, 112))
        assert image.tobytes() == render(scene, 112).tobytes()


def test_the_key_is_of_the_content() -> None:
    first, second = scenes("train", 2)
    image = WorldImage(first, 128)
    assert image.key == WorldImage(scenes("train", 1)[0], 128).key
    assert len({image.key, WorldImage(first, 129).key, WorldImage(second, 128).key}) == 3
    copy = pickle.loads(pickle.dumps(image))
    assert copy == image
    assert copy.load().tobytes() == image.load().tobytes()
    assert len(pickle.dumps(image)) < 2000


def test_places_are_symmetric(crowd: list[Scene]) -> None:
    places = np.array([(shape.x, shape.y) for scene in crowd for shape in scene.shapes])
    mirrored = 1000 - places
    for axis in (0, 1):
        assert stats.ks_2samp(places[:, axis], mirrored[:, axis]).pvalue > 1e-3


def test_boxes_that_crowd_the_image_still_find_a_place() -> None:
    largest = Box(sampling.RADIUS[1], sampling.RADIUS[1])
    boxes = [sampling.LARGE_BOX, sampling.SMALL_BOX, sampling.DIGIT_BOX, *[largest] * 8]
    assert len(sampling.place(boxes, np.random.default_rng(0))) == len(boxes)


_PROGRAM = """
import hashlib
from chiasm_experiments.world.benchmark import WorldBenchmark
from chiasm_experiments.world.dataset import WorldDataset
benchmark, dataset = WorldBenchmark.tiny(), WorldDataset.tiny()
samples = [dataset[i] for i in reversed(range(len(dataset)))][::-1]
said = [(q.id, q.text, q.references, q.cluster) for q in benchmark.questions()] + [(s.id, s.turns) for s in samples]
images = [image for item in (*benchmark.questions(), *samples) for image in item.images]
seen = "".join(image.key + hashlib.sha256(image.load().tobytes()).hexdigest() for image in images)
print(hashlib.sha256((repr(said) + seen).encode()).hexdigest())
"""


def test_every_process_draws_the_same_world() -> None:
    digests = {
        subprocess.run(
            [sys.executable, "-c", _PROGRAM],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1
