"""The world behind the interfaces: data set, benchmark, captions, settings."""

from __future__ import annotations

import pickle
import re
from collections import Counter
from typing import Any, cast

import pytest
from pydantic import ValidationError

from chiasm_experiments.world.benchmark import WorldBenchmark
from chiasm_experiments.world.config import WorldConfig
from chiasm_experiments.world.dataset import WorldDataset
from chiasm_experiments.world.language import BRIEF, DETAILED, brief_caption, detailed_caption, where
from chiasm_experiments.world.questions import SKILLS, SkillName
from chiasm_experiments.world.render import WorldImage
from chiasm_experiments.world.scene import Digit, Scene, Shape, Word

NUMBERS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
PLACES = {
    f"{row} {column}".strip(): (i, j)
    for i, row in enumerate(("at the top", "at the", "at the bottom"))
    for j, column in enumerate(("left", "", "right"))
} | {"in the centre": (1, 1)}


def captions(**settings: Any) -> list[tuple[str, str, Scene]]:
    found = []
    for sample in WorldDataset(WorldDataset.Config(**settings)):
        [turn], [image] = sample.turns, sample.images
        assert isinstance(image, WorldImage)
        assert turn.answer is not None
        found.append((turn.question, turn.answer, image.scene))
    return found


def test_captions_name_every_object_once() -> None:
    kinds: Counter[str] = Counter()
    for question, answer, scene in captions(size=600):
        kinds[question] += 1
        assert answer[0].isupper()
        assert answer.endswith(".")
        parts = re.split(r", | and ", answer[0].lower() + answer[1:-1])
        said: Counter[tuple[str, ...]] = Counter()
        for part in parts:
            match = re.fullmatch(r"(.*?)(?: ((?:at|in) the .*))?", part)
            assert match is not None
            assert (match[2] is not None) == (question == DETAILED)
            words = match[1].split()
            spot = (str(PLACES[match[2]]),) if match[2] else ()
            if words[0] == "the":
                said[(*words[1:], *spot)] += 1
            else:
                kind = words[2] if NUMBERS[words[0]] == 1 else words[2].removesuffix("es" if "cross" in part else "s")
                said[(words[1], kind, *spot)] += NUMBERS[words[0]]

        def ninth(thing: Shape | Digit | Word, detailed: bool = question == DETAILED) -> tuple[str, ...]:
            return (str((thing.y * 3 // 1000, thing.x * 3 // 1000)),) if detailed else ()

        there = Counter((s.colour, s.kind, *ninth(s)) for s in scene.shapes)
        there += Counter(("large" if w.large else "small", "word", w.text, *ninth(w)) for w in scene.words)
        if scene.digit:
            there[("digit", str(scene.digit.value), *ninth(scene.digit))] += 1
        assert said == there, answer
    assert min(kinds[BRIEF], kinds[DETAILED]) > 240


def test_captions_read_as_english() -> None:
    scene = Scene(
        (
            Shape("cross", "orange", 100, 900, 80),
            Shape("star", "red", 500, 500, 80),
            Shape("cross", "orange", 900, 100, 80),
        ),
        Digit(7, 0, 100, 100),
        (Word("tree", False, 500, 800),),
        None,
        0,
    )
    assert brief_caption(scene) == "Two orange crosses, a red star, the small word tree and the digit 7."
    assert detailed_caption(scene) == (
        "An orange cross at the top right, a red star in the centre, an orange cross at the bottom left, "
        "the small word tree at the bottom and the digit 7 at the top left."
    )
    assert brief_caption(Scene((), Digit(7, 0, 1, 1), (), None, 0)) == "The digit 7."


def test_places_have_names() -> None:
    names = {where(x, y) for x in (0, 500, 1000) for y in (0, 500, 1000)}
    assert names == {
        "at the top left", "at the top", "at the top right", "at the left", "in the centre", "at the right",
        "at the bottom left", "at the bottom", "at the bottom right",
    }  # fmt: skip
    assert where(333, 333) == "at the top left"
    assert where(334, 666) == "in the centre"


def test_both_tasks_show_the_same_images() -> None:
    first, second = (
        WorldDataset(WorldDataset.Config(task=task, size=30, seed=4)) for task in ("captions", "dialogues")
    )
    assert [a.images for a in first] == [b.images for b in second]
    assert not {a.id for a in first} & {b.id for b in second}


def test_samples_do_not_depend_on_what_came_before() -> None:
    dataset = WorldDataset(WorldDataset.Config(size=50, task="dialogues"))
    assert len(dataset) == 50
    assert [dataset[i] for i in reversed(range(50))][::-1] == list(dataset)
    larger = WorldDataset(WorldDataset.Config(size=70, task="dialogues"))
    assert [larger[i] for i in range(50)] == list(dataset)
    assert pickle.loads(pickle.dumps(dataset))[7] == dataset[7]
    with pytest.raises(IndexError, match="sample 50 of a data set of 50"):
        dataset[50]
    with pytest.raises(IndexError):
        dataset[-1]


def test_dialogues_keep_to_their_length_and_do_not_repeat() -> None:
    lengths: Counter[int] = Counter()
    for sample in WorldDataset(WorldDataset.Config(size=400, task="dialogues", turns=3)):
        texts = [turn.question for turn in sample.turns]
        assert len(set(texts)) == len(texts)
        lengths[len(texts)] += 1
    assert max(lengths) == 3
    assert lengths[3] > 300


@pytest.mark.parametrize("skill", SKILLS)
def test_one_skill_alone(skill: SkillName) -> None:
    needs = SKILLS[skill].needs
    config: dict[str, Any] = {"skills": [skill], "size": 20}
    for sample in WorldDataset(WorldDataset.Config(task="dialogues", **config)):
        image = sample.images[0]
        assert isinstance(image, WorldImage)
        assert bool(image.scene.shapes) == ("shapes" in needs)
        assert (image.scene.counted is not None) == ("group" in needs)
        assert (image.scene.digit is not None) == ("digit" in needs)
        assert len(image.scene.words) == sum("word" in need for need in needs)
    questions = WorldBenchmark(WorldBenchmark.Config(**config)).questions()
    assert {question.skill for question in questions} == {skill}
    assert len({question.cluster for question in questions}) == 20


def test_questions_are_balanced_unique_and_clustered() -> None:
    benchmark = WorldBenchmark(WorldBenchmark.Config(size=301, questions_per_image=3))
    questions = benchmark.questions()
    assert questions is benchmark.questions()
    assert len(questions) == 301
    assert len({question.id for question in questions}) == 301
    by_skill = Counter(question.skill for question in questions)
    assert set(by_skill) == set(SKILLS)
    assert max(by_skill.values()) - min(by_skill.values()) <= 1
    clusters = Counter(question.cluster for question in questions)
    assert sorted(Counter(clusters.values()).items()) == [(1, 1), (3, 100)]
    for name in clusters:
        together = [question for question in questions if question.cluster == name]
        assert len({question.images for question in together}) == 1
        assert len({question.skill for question in together}) == len(together)
    scenes = [question.images[0].scene for question in questions if isinstance(question.images[0], WorldImage)]
    assert {scene.split for scene in scenes} == {benchmark.split} == {"eval"}


def test_a_larger_benchmark_begins_with_the_smaller_one() -> None:
    small, large = (WorldBenchmark(WorldBenchmark.Config(size=size)).questions() for size in (31, 60))
    assert large[:31] == small


def test_other_images_have_other_ids() -> None:
    settings: list[dict[str, Any]] = [{}, {"seed": 1}, {"image_size": 128}]
    ids = [{q.id for q in WorldBenchmark(WorldBenchmark.Config(size=40, **extra)).questions()} for extra in settings]
    assert len(set.union(*ids)) == 120


def test_responses_are_scored() -> None:
    benchmark = WorldBenchmark.tiny()
    for question in benchmark.questions():
        right = benchmark.score(question, f"{question.references[0].title()}.")
        assert (right.value, right.parsed, right.status) == (1.0, question.references[0], "scored")
        wrong = next(
            answer for answer in SKILLS[cast(SkillName, question.skill)].answers if answer not in question.references
        )
        score = benchmark.score(question, wrong)
        assert (score.value, score.parsed, score.status) == (0.0, wrong, "scored")
        nothing = benchmark.score(question, "I cannot say")
        assert (nothing.value, nothing.parsed, nothing.status) == (0.0, None, "unparsed")


def test_tiny_ones_are_small_and_complete() -> None:
    dataset, benchmark = WorldDataset.tiny(), WorldBenchmark.tiny()
    dataset.check()
    benchmark.check()
    assert len(dataset) <= 16
    assert {question.skill for question in benchmark.questions()} == set(SKILLS)
    assert dataset[0].images[0].load().size == (96, 96)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"skills": []}, "skills"),
        ({"skills": ["taste"]}, "skills"),
        ({"skills": "colour"}, "skills"),
        ({"skills": ["colour", "colour"]}, "skills"),
        ({"image_size": 95}, "image_size"),
        ({"image_size": 1025}, "image_size"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"colour": "red"}, "colour"),
    ],
)
@pytest.mark.parametrize("model", [WorldDataset.Config, WorldBenchmark.Config])
def test_bad_settings_are_refused(model: type[WorldConfig], settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(settings)
    assert {error["loc"][0] for error in caught.value.errors()} == {field}


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (WorldDataset.Config, {"size": 0}),
        (WorldDataset.Config, {"turns": 0}),
        (WorldDataset.Config, {"task": "poems"}),
        (WorldDataset.Config, {"split": "eval"}),
        (WorldBenchmark.Config, {"size": 0}),
        (WorldBenchmark.Config, {"questions_per_image": 0}),
    ],
)
def test_bad_settings_of_one_are_refused(model: type[WorldConfig], settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        model.model_validate(settings)


def test_settings_survive_a_round_trip() -> None:
    config = WorldBenchmark.Config(skills=("digit", "colour"), size=5)
    assert WorldBenchmark.Config.model_validate_json(config.model_dump_json()) == config
    assert WorldConfig.model_validate({"skills": "all"}) == WorldConfig()
    assert set(WorldConfig().skills) == set(SKILLS)
