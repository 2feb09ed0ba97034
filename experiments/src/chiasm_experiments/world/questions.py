"""The skills: what is asked about a scene.

Each skill obeys one law: given the text of a question, every possible answer is equally likely. It follows from
symmetry. Some change of scenes, which their distribution does not feel, turns any answer into any other and leaves the
text as it is: colours change places for `colour`, kinds for `shape`, the mirror for `position`. Whatever picks a
question among those that a scene allows must be blind to that change too. So an image-blind model scores at chance,
however well it knows how often each answer occurs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, product
from typing import Literal, NamedTuple

from numpy.random import Generator

from chiasm_experiments.world.sampling import Content, shuffled
from chiasm_experiments.world.scene import COLOURS, KINDS, MAX_COUNT, WORDS, Scene, Shape

SkillName = Literal["colour", "shape", "count", "position", "existence", "word", "small_text", "digit", "choice"]

LETTERS = ("a", "b", "c", "d")


class Asked(NamedTuple):
    """A question with its answer; `variant` names the sort of question where a skill has several."""

    text: str
    answer: str
    variant: str = ""


@dataclass(frozen=True, slots=True)
class Skill:
    """What a scene must hold to be asked, the possible answers, and the questions.

    Args:
        needs: contents without which there is no question; with them there is at least one.
        answers: all answers that its questions have.
        ask: the scene's questions in random order, no two with the same text.
        one_of: how many of the answers one text leaves possible, if not all.
    """

    needs: tuple[Content, ...]
    answers: tuple[str, ...]
    ask: Callable[[Scene, Generator], Iterator[Asked]]
    one_of: int | None = None

    @property
    def chance(self) -> float:
        """Expected score of any guess that sees the text alone."""
        return 1 / (self.one_of or len(self.answers))


def plural(noun: str) -> str:
    """`circle` -> `circles`, `cross` -> `crosses`."""
    return noun + ("es" if noun.endswith("s") else "s")


def with_article(noun: str) -> str:
    """`red star` -> `a red star`, `orange star` -> `an orange star`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _colour(scene: Scene, rng: Generator) -> Iterator[Asked]:
    for shape in shuffled(_alone_in_kind(scene), rng):
        yield Asked(f"What colour is the {shape.kind}?", shape.colour)


def _shape(scene: Scene, rng: Generator) -> Iterator[Asked]:
    for shape in shuffled(_alone_in_colour(scene), rng):
        yield Asked(f"Which shape is {shape.colour}?", shape.kind)


def _count(scene: Scene, rng: Generator) -> Iterator[Asked]:
    assert scene.counted is not None
    number = sum(shape.kind == scene.counted for shape in scene.shapes)
    yield Asked(f"How many {plural(scene.counted)} are there?", str(number))


def _position(scene: Scene, rng: Generator) -> Iterator[Asked]:
    for pair in shuffled(list(combinations(_alone_in_kind(scene), 2)), rng):
        a, b = shuffled(pair, rng)
        # along the axis on which they lie further apart, they cannot overlap
        if abs(a.x - b.x) > abs(a.y - b.y):
            answer, variant = ("left" if a.x < b.x else "right"), "horizontal"
            yield Asked(f"Is the {a.kind} left or right of the {b.kind}?", answer, variant)
        else:
            answer, variant = ("above" if a.y < b.y else "below"), "vertical"
            yield Asked(f"Is the {a.kind} above or below the {b.kind}?", answer, variant)


def _existence(scene: Scene, rng: Generator) -> Iterator[Asked]:
    """POPE's questions, half of them yes. An adversarial no asks for a colour and a kind that are there, but apart."""
    pairs = {(shape.colour, shape.kind) for shape in scene.shapes}
    colours, kinds = {colour for colour, _ in pairs}, {kind for _, kind in pairs}
    present: list[tuple[str, str]] = []
    absent: dict[str, list[tuple[str, str]]] = {"random": [], "adversarial": []}
    for colour, kind in shuffled(list(product(COLOURS, KINDS)), rng):
        if (colour, kind) in pairs:
            present.append((colour, kind))
        else:
            absent["adversarial" if colour in colours and kind in kinds else "random"].append((colour, kind))
    # the coins fall before the questions are looked for, so all three lists must have one left
    while present and all(absent.values()):
        exists, adversarial = (rng.random(2) < 0.5).tolist()
        variant = "adversarial" if adversarial else "random"
        colour, kind = (present if exists else absent[variant]).pop()
        yield Asked(f"Is there {with_article(f'{colour} {kind}')}?", "yes" if exists else "no", variant)


def _word(scene: Scene, rng: Generator) -> Iterator[Asked]:
    yield from (Asked("What is the large word?", word.text) for word in scene.words if word.large)


def _small_text(scene: Scene, rng: Generator) -> Iterator[Asked]:
    yield from (Asked("What is the small word?", word.text) for word in scene.words if not word.large)


def _digit(scene: Scene, rng: Generator) -> Iterator[Asked]:
    assert scene.digit is not None
    yield Asked("Which digit is written?", str(scene.digit.value))


def _choice(scene: Scene, rng: Generator) -> Iterator[Asked]:
    questions = [(asked, tuple(COLOURS), "colour") for asked in _colour(scene, rng)]
    questions += [(asked, KINDS, "shape") for asked in _shape(scene, rng)]
    for asked, possible, variant in shuffled(questions, rng):
        wrong = shuffled([option for option in possible if option != asked.answer], rng)[: len(LETTERS) - 1]
        options = shuffled([asked.answer, *wrong], rng)
        lines = [f"{letter.upper()}. {option}" for letter, option in zip(LETTERS, options, strict=True)]
        text = "\n".join([asked.text, *lines, "Answer with a letter."])
        yield Asked(text, LETTERS[options.index(asked.answer)], variant)


def _alone_in_kind(scene: Scene) -> list[Shape]:
    number = Counter(shape.kind for shape in scene.shapes)
    return [shape for shape in scene.shapes if number[shape.kind] == 1]


def _alone_in_colour(scene: Scene) -> list[Shape]:
    number = Counter(shape.colour for shape in scene.shapes)
    return [shape for shape in scene.shapes if number[shape.colour] == 1]


SKILLS: dict[SkillName, Skill] = {
    "colour": Skill(("shapes",), tuple(COLOURS), _colour),
    "shape": Skill(("shapes",), KINDS, _shape),
    "count": Skill(("shapes", "group"), tuple(str(n) for n in range(1, MAX_COUNT + 1)), _count),
    "position": Skill(("shapes",), ("left", "right", "above", "below"), _position, one_of=2),
    "existence": Skill(("shapes",), ("yes", "no"), _existence),
    "word": Skill(("large_word",), WORDS, _word),
    "small_text": Skill(("small_word",), WORDS, _small_text),
    "digit": Skill(("digit",), tuple("0123456789"), _digit),
    "choice": Skill(("shapes",), LETTERS, _choice),
}
