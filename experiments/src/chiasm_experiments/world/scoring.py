"""Reading an answer from what a model says."""

from __future__ import annotations

import re

from chiasm_experiments.world.questions import SKILLS, SkillName

_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}
_AROUND = " \t\r\n.,;:!?\"'`*()[]"
_TOKEN = re.compile(r"[a-z]+|\d+")
# before a word, a letter may be the article: `a red star`; the rule is the same for all letters, to favour none
_LETTER = re.compile(r"\b[a-d]\b(?!\s+[a-z])")
_FORMS: dict[SkillName, re.Pattern[str]] = {
    "word": re.compile(r"[a-z]+"),
    "small_text": re.compile(r"[a-z]+"),
    "count": re.compile(r"\d+"),
    "digit": re.compile(r"\d+"),
}
"""Responses that are an answer, if a wrong one, though no question of the skill has it."""


def read_answer(skill: SkillName, response: str) -> str | None:
    """The answer that a response gives, None where it gives none or several.

    The whole response is an answer, or exactly one of the skill's answers is a word of it. Case, and marks around the
    response, do not matter; `three` is `3`.
    """
    text = response.lower().strip(_AROUND)
    text = _NUMBERS.get(text, text)
    form = _FORMS.get(skill)
    if text in SKILLS[skill].answers or (form is not None and form.fullmatch(text)):
        return text
    words = _LETTER.findall(text) if skill == "choice" else _TOKEN.findall(text)
    found = {_NUMBERS.get(word, word) for word in words} & set(SKILLS[skill].answers)
    return found.pop() if len(found) == 1 else None
