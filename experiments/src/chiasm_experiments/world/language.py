"""What is said about a scene: captions for the first stage, dialogues for the second."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Sequence

from numpy.random import Generator

from chiasm.sample import Turn
from chiasm_experiments.world.questions import SKILLS, SkillName, plural, with_article
from chiasm_experiments.world.sampling import Content, shuffled
from chiasm_experiments.world.scene import Scene, Shape, Word

BRIEF = "Describe the image briefly."
DETAILED = "Describe the image in detail."

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")


def brief_caption(scene: Scene) -> str:
    """All that a scene holds, equal shapes counted together: `Two red stars, a blue ring and the large word tree.`"""
    number = Counter((shape.colour, shape.kind) for shape in _in_reading_order(scene.shapes))
    parts = [
        with_article(f"{colour} {kind}") if n == 1 else f"{_NUMBERS[n]} {colour} {plural(kind)}"
        for (colour, kind), n in number.items()
    ]
    parts += [_word(word) for word in scene.words]
    if scene.digit is not None:
        parts.append(f"the digit {scene.digit.value}")
    return _sentence(parts)


def detailed_caption(scene: Scene) -> str:
    """All that a scene holds and where: `A red star at the top left and the digit 7 in the centre.`"""
    parts = [f"{with_article(f'{s.colour} {s.kind}')} {where(s.x, s.y)}" for s in _in_reading_order(scene.shapes)]
    parts += [f"{_word(word)} {where(word.x, word.y)}" for word in scene.words]
    if scene.digit is not None:
        parts.append(f"the digit {scene.digit.value} {where(scene.digit.x, scene.digit.y)}")
    return _sentence(parts)


def where(x: int, y: int) -> str:
    """The ninth of the image in which a point (in thousandths) lies: `at the top left`, `in the centre`."""
    place = " ".join(filter(None, (("top", "", "bottom")[_third(y)], ("left", "", "right")[_third(x)])))
    return f"at the {place}" if place else "in the centre"


def caption(scene: Scene, rng: Generator) -> Turn:
    """A request for a description, brief or detailed, and the description."""
    brief = rng.random() < 0.5
    return Turn(BRIEF, brief_caption(scene)) if brief else Turn(DETAILED, detailed_caption(scene))


def askable(skills: Sequence[SkillName], contents: Collection[Content]) -> list[SkillName]:
    """Those of the skills that a scene with these contents can be asked."""
    return [skill for skill in skills if all(need in contents for need in SKILLS[skill].needs)]


def dialogue(scene: Scene, skills: Sequence[SkillName], turns: int, rng: Generator) -> list[Turn]:
    """At most `turns` questions, no two alike; the skills, in random order, take turns as long as they have any.

    As in any conversation, one answer may give away part of a later one; a benchmark asks each question alone.
    """
    waiting = deque(SKILLS[skill].ask(scene, rng) for skill in shuffled(skills, rng))
    said: list[Turn] = []
    while waiting and len(said) < turns:
        questions = waiting.popleft()
        asked = next(questions, None)
        if asked is not None:
            said.append(Turn(asked.text, asked.answer))
            waiting.append(questions)
    return said


def _third(coordinate: int) -> int:
    return min(3 * coordinate // 1000, 2)


def _in_reading_order(shapes: Sequence[Shape]) -> list[Shape]:
    return sorted(shapes, key=lambda shape: (_third(shape.y), shape.x))


def _word(word: Word) -> str:
    return f"the {'large' if word.large else 'small'} word {word.text}"


def _sentence(parts: Sequence[str]) -> str:
    """`[a, b, c]` -> `A, b and c.`"""
    *first, last = parts
    text = f"{', '.join(first)} and {last}" if first else last
    return f"{text[0].upper()}{text[1:]}."
