"""The world's questions: answers follow from the scene, and nothing follows from the text."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable

import numpy as np
import pytest
from scipy import stats
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.naive_bayes import MultinomialNB

from chiasm_experiments.interfaces import Question
from chiasm_experiments.world.benchmark import WorldBenchmark
from chiasm_experiments.world.dataset import WorldDataset
from chiasm_experiments.world.questions import SKILLS, SkillName
from chiasm_experiments.world.render import WorldImage
from chiasm_experiments.world.scene import COLOURS, KINDS, WORDS, Scene
from chiasm_experiments.world.scoring import read_answer

PATTERNS: dict[SkillName, str] = {
    "choice": r"(?s).*\nAnswer with a letter\.",
    "colour": r"What colour is the (\w+)\?",
    "shape": r"Which shape is (\w+)\?",
    "count": r"How many (\w+?)(?:(?<=cross)es|s) are there\?",
    "position": r"Is the (\w+) (left or right of|above or below) the (\w+)\?",
    "existence": r"Is there an? (\w+) (\w+)\?",
    "word": r"What is the large word\?",
    "small_text": r"What is the small word\?",
    "digit": r"Which digit is written\?",
}
CHANCE: dict[SkillName, float] = {
    "colour": 1 / 8, "shape": 1 / 8, "count": 1 / 5, "position": 1 / 2, "existence": 1 / 2,
    "word": 1 / 20, "small_text": 1 / 20, "digit": 1 / 10, "choice": 1 / 4,
}  # fmt: skip
Pairs = dict[SkillName, list[tuple[str, str]]]


def skill_of(text: str) -> SkillName:
    return next(skill for skill, pattern in PATTERNS.items() if re.fullmatch(pattern, text))


def truth(text: str, scene: Scene) -> str:
    """The answer, worked out from the text and the scene."""
    skill = skill_of(text)
    if skill == "choice":
        question, *options, _ = text.split("\n")
        right = truth(question, scene)
        [letter] = [option[0].lower() for option in options if option[3:] == right]
        return letter
    if skill in ("word", "small_text"):
        [word] = [word.text for word in scene.words if word.large == (skill == "word")]
        return word
    if skill == "digit":
        assert scene.digit is not None
        return str(scene.digit.value)
    match = re.fullmatch(PATTERNS[skill], text)
    assert match is not None
    if skill == "colour":
        [colour] = [shape.colour for shape in scene.shapes if shape.kind == match[1]]
        return colour
    if skill == "shape":
        [kind] = [shape.kind for shape in scene.shapes if shape.colour == match[1]]
        return kind
    if skill == "count":
        return str([shape.kind for shape in scene.shapes].count(match[1]))
    if skill == "existence":
        return "yes" if any((s.colour, s.kind) == (match[1], match[2]) for s in scene.shapes) else "no"
    [a], [b] = ([shape for shape in scene.shapes if shape.kind == kind] for kind in (match[1], match[3]))
    if match[2].startswith("left"):
        assert abs(a.x - b.x) > a.radius + b.radius
        return "left" if a.x < b.x else "right"
    assert abs(a.y - b.y) > a.radius + b.radius
    return "above" if a.y < b.y else "below"


@pytest.fixture(scope="module")
def asked() -> tuple[Question, ...]:
    """Every skill on every image: within a skill the questions are independent."""
    config = WorldBenchmark.Config(size=9 * 2500, questions_per_image=9, image_size=96)
    return tuple(WorldBenchmark(config).questions())


@pytest.fixture(scope="module")
def evaluation(asked: tuple[Question, ...]) -> Pairs:
    found: Pairs = defaultdict(list)
    for question in asked:
        found[skill_of(question.text)].append((question.text, question.references[0]))
    return found


@pytest.fixture(scope="module")
def training() -> Pairs:
    found: Pairs = defaultdict(list)
    for sample in WorldDataset(WorldDataset.Config(task="dialogues", size=5000, turns=9)):
        for turn in sample.turns:
            assert turn.answer is not None
            found[skill_of(turn.question)].append((turn.question, turn.answer))
    return found


def possible(skill: SkillName, text: str) -> tuple[str, ...]:
    if skill == "position":
        return ("left", "right") if "left" in text else ("above", "below")
    return SKILLS[skill].answers


def test_questions_state_their_skill_and_chance(asked: tuple[Question, ...]) -> None:
    assert set(SKILLS) == set(CHANCE)
    for question in asked:
        assert question.skill == skill_of(question.text)
        assert question.chance == pytest.approx(CHANCE[question.skill])
        assert question.references[0] in possible(question.skill, question.text)
        assert len(possible(question.skill, question.text)) == round(1 / question.chance)


def test_answers_are_true(asked: tuple[Question, ...]) -> None:
    for question in asked:
        image = question.images[0]
        assert isinstance(image, WorldImage)
        assert question.references == (truth(question.text, image.scene),)


def test_turns_of_dialogues_are_true() -> None:
    for sample in WorldDataset(WorldDataset.Config(task="dialogues", size=500, turns=12)):
        image = sample.images[0]
        assert isinstance(image, WorldImage)
        assert [turn.answer for turn in sample.turns] == [truth(turn.question, image.scene) for turn in sample.turns]


def test_colours_can_be_read_from_the_pixels(asked: tuple[Question, ...]) -> None:
    questions = [question for question in asked if question.skill == "shape"][:60]
    for question in questions:
        match = re.fullmatch(PATTERNS["shape"], question.text)
        image = question.images[0]
        assert match is not None
        assert isinstance(image, WorldImage)
        pixels = np.asarray(image.load())
        rows, columns = np.nonzero((pixels == COLOURS[match[1]]).all(axis=2))
        [shape] = [shape for shape in image.scene.shapes if shape.kind == question.references[0]
                   and shape.colour == match[1]]  # fmt: skip
        centre = (rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2
        assert np.allclose(centre, (shape.y * 0.096, shape.x * 0.096), atol=2.5)


@pytest.mark.parametrize("skill", CHANCE)
def test_answers_are_uniform(skill: SkillName, evaluation: Pairs, training: Pairs) -> None:
    for pairs in (evaluation[skill], training[skill]):
        sides: dict[tuple[str, ...], list[tuple[str, str]]] = defaultdict(list)
        for text, answer in pairs:
            sides[possible(skill, text)].append((text, answer))
        for answers, side in sides.items():
            assert uniformity([("any", answer) for _, answer in side], answers) > 1e-3
            # hardly any two texts of a choice are equal; it is left to the predictors below
            assert skill == "choice" or uniformity(side, answers) > 1e-3


def uniformity(pairs: Iterable[tuple[str, str]], answers: tuple[str, ...]) -> float:
    """p of the hypothesis that, whatever the text, each answer is equally likely; rare texts are left out."""
    tables: dict[str, Counter[str]] = defaultdict(Counter)
    for text, answer in pairs:
        tables[text][answer] += 1
    statistic, freedom = 0.0, 0
    for table in tables.values():
        counts = np.array([table[answer] for answer in answers])
        if (expected := counts.sum() / len(answers)) >= 3:
            statistic += float(((counts - expected) ** 2 / expected).sum())
            freedom += len(answers) - 1
    assert freedom, "no text is frequent enough"
    return float(stats.chi2.sf(statistic, freedom))


@pytest.mark.parametrize("skill", CHANCE)
def test_the_most_frequent_answer_to_a_text_scores_at_chance(
    skill: SkillName, evaluation: Pairs, training: Pairs
) -> None:
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for text, answer in training[skill]:
        seen[text][answer] += 1
    favourite = Counter(answer for _, answer in training[skill]).most_common(1)[0][0]
    guesses = [seen[text].most_common(1)[0][0] if text in seen else favourite for text, _ in evaluation[skill]]
    at_chance(skill, guesses, evaluation[skill])


@pytest.mark.parametrize("skill", CHANCE)
def test_a_model_of_the_text_scores_at_chance(skill: SkillName, evaluation: Pairs, training: Pairs) -> None:
    words = CountVectorizer(ngram_range=(1, 3), token_pattern=r"\w+")
    texts, answers = zip(*training[skill], strict=True)
    model = MultinomialNB().fit(words.fit_transform(texts), answers)
    guesses = model.predict(words.transform([text for text, _ in evaluation[skill]]))
    at_chance(skill, list(guesses), evaluation[skill])


def test_the_most_frequent_option_scores_at_chance(evaluation: Pairs, training: Pairs) -> None:
    def options(text: str) -> dict[str, str]:
        return {line[0].lower(): line[3:] for line in text.split("\n")[1:5]}

    right = Counter(options(text)[answer] for text, answer in training["choice"])
    guesses = [max(options(text).items(), key=lambda item: right[item[1]])[0] for text, _ in evaluation["choice"]]
    at_chance("choice", guesses, evaluation["choice"])


def at_chance(skill: SkillName, guesses: list[str], pairs: list[tuple[str, str]]) -> None:
    hits = sum(guess == answer for guess, (_, answer) in zip(guesses, pairs, strict=True))
    low, high = stats.binom.interval(0.999, len(pairs), CHANCE[skill])
    assert len(pairs) == 2500
    assert low <= hits <= high, f"{skill}: {hits / len(pairs):.3f}, chance {CHANCE[skill]:.3f}"


def test_existence_asks_as_pope_does(asked: tuple[Question, ...]) -> None:
    questions = [question for question in asked if question.skill == "existence"]
    variants = Counter((question.metadata["variant"], question.references[0]) for question in questions)
    assert stats.chisquare(list(variants.values())).pvalue > 1e-3
    table = Counter((question.text, question.references[0]) for question in questions)
    texts = {text for text, _ in table}
    assert len(texts) == len(COLOURS) * len(KINDS)
    counts = np.array([[table[text, answer] for text in texts] for answer in ("yes", "no")])
    assert stats.chi2_contingency(counts).pvalue > 1e-3, "the texts of yes and no differ"
    for question in questions:
        match = re.fullmatch(PATTERNS["existence"], question.text)
        image = question.images[0]
        assert match is not None
        assert isinstance(image, WorldImage)
        both = {match[1], match[2]} <= {word for s in image.scene.shapes for word in (s.colour, s.kind)}
        if question.references == ("no",):
            assert both == (question.metadata["variant"] == "adversarial")


def test_options_are_four_and_differ(asked: tuple[Question, ...]) -> None:
    for question in asked:
        if question.skill == "choice":
            options = [line[3:] for line in question.text.split("\n")[1:5]]
            assert len(set(options)) == 4
            assert set(options) <= set(COLOURS if question.metadata["variant"] == "colour" else KINDS)


@pytest.mark.parametrize(
    ("skill", "response", "answer"),
    [
        ("colour", "red", "red"),
        ("colour", " Red.\n", "red"),
        ("colour", "**Red**", "red"),
        ("colour", "The star is red.", "red"),
        ("colour", "red, a dark red", "red"),
        ("colour", "red or blue", None),
        ("colour", "teal", None),
        ("colour", "reddish", None),
        ("colour", "", None),
        ("shape", "It is a circle", "circle"),
        ("count", "3", "3"),
        ("count", "Three", "3"),
        ("count", "There are three circles.", "3"),
        ("count", "three, that is 3", "3"),
        ("count", "2 or 3", None),
        ("count", "13", "13"),
        ("count", "seven", "7"),
        ("count", "There are 13 of them", None),
        ("count", "none", None),
        ("digit", "zero", "0"),
        ("digit", "The digit is 7.", "7"),
        ("position", "left", "left"),
        ("position", "It is left of the circle", "left"),
        ("position", "left or right", None),
        ("existence", "Yes, there is.", "yes"),
        ("existence", "No", "no"),
        ("existence", "yes and no", None),
        ("existence", "not really", None),
        ("word", "FISH", "fish"),
        ("word", '"fish"', "fish"),
        ("word", "zebra", "zebra"),
        ("word", "The word is fish.", "fish"),
        ("word", "the word is zebra", None),
        ("small_text", "moon", "moon"),
        ("choice", "B", "b"),
        ("choice", "b.", "b"),
        ("choice", "(b)", "b"),
        ("choice", "B. red", "b"),
        ("choice", "A. red", "a"),
        ("choice", "(a) red", "a"),
        ("choice", "a)", "a"),
        ("choice", "The answer is B.", "b"),
        ("choice", "It is a star, so C", "c"),
        ("choice", "a red star", None),
        ("choice", "a or b", "b"),
        ("choice", "A, B", None),
        ("choice", "E", None),
        ("choice", "red", None),
    ],
)
def test_an_answer_is_read_from_a_response(skill: SkillName, response: str, answer: str | None) -> None:
    assert read_answer(skill, response) == answer


@pytest.mark.parametrize("skill", SKILLS)
def test_every_answer_is_read_as_itself(skill: SkillName) -> None:
    for answer in SKILLS[skill].answers:
        assert read_answer(skill, answer) == read_answer(skill, f" {answer.upper()}. ") == answer


def test_words_are_of_one_length_and_differ_from_other_answers() -> None:
    assert {len(word) for word in WORDS} == {4}
    others = {
        answer for name, skill in SKILLS.items() if name not in ("word", "small_text") for answer in skill.answers
    }
    assert not others & set(WORDS)
