"""`WorldBenchmark`: questions about generated scenes, balanced over the skills."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Self, cast

from pydantic import Field

from chiasm_experiments.interfaces import Benchmark, Question, Score
from chiasm_experiments.world.config import WorldConfig
from chiasm_experiments.world.questions import SKILLS, SkillName
from chiasm_experiments.world.render import WorldImage
from chiasm_experiments.world.sampling import draw_contents, draw_scene, stream
from chiasm_experiments.world.scene import Split
from chiasm_experiments.world.scoring import read_answer


class WorldBenchmarkConfig(WorldConfig):
    """Questions of the built-in world."""

    size: int = Field(default=1000, ge=1, le=2**31)
    """Questions, the same number of each skill to within one; a larger benchmark begins with the smaller one's."""
    questions_per_image: int = Field(default=2, ge=1)
    """At most this many questions share an image, each of another skill."""


class WorldBenchmark(Benchmark):
    """Scenes of the evaluation split, each asked for several skills."""

    Config = WorldBenchmarkConfig
    config: WorldBenchmarkConfig

    @classmethod
    def tiny(cls) -> Self:
        return cls(WorldBenchmarkConfig(size=18, image_size=96))

    @property
    def split(self) -> Split:
        return "eval"

    def questions(self) -> Sequence[Question]:
        return self._questions

    def score(self, question: Question, response: str) -> Score:
        """1 for the right answer, 0 for another; `unparsed` and 0 where none can be read (see `read_answer`)."""
        parsed = read_answer(cast(SkillName, question.skill), response)
        if parsed is None:
            return Score(0.0, None, "unparsed")
        return Score(float(parsed in question.references), parsed)

    @cached_property
    def _questions(self) -> tuple[Question, ...]:
        skills, size = self.config.skills, self.config.size
        per_image = min(self.config.questions_per_image, len(skills))
        found: list[Question] = []
        for number in range(0, size, per_image):
            found += self._ask(number, [skills[i % len(skills)] for i in range(number, number + per_image)])
        return tuple(found[:size])

    def _ask(self, number: int, skills: Sequence[SkillName]) -> list[Question]:
        """One question of each of the skills about one new scene; `number` is the first question's."""
        rng = stream(self.config.seed, self.split, number)
        needed = {need for skill in skills for need in SKILLS[skill].needs}
        scene = draw_scene(draw_contents(needed, self.config.contents, rng), self.split, rng)
        image = WorldImage(scene, self.config.image_size)
        questions = []
        for i, skill in enumerate(skills, start=number):
            asked = next(SKILLS[skill].ask(scene, rng))
            # only an equal image and an equal text give an equal id, so unlike benchmarks are never paired
            content = hashlib.sha256(f"{scene.digest} {image.size} {asked.text}".encode()).hexdigest()
            questions.append(
                Question(
                    id=f"{i:05d}-{skill}-{content[:12]}",
                    text=asked.text,
                    references=(asked.answer,),
                    images=(image,),
                    cluster=scene.digest[:16],
                    skill=skill,
                    chance=SKILLS[skill].chance,
                    metadata={"variant": asked.variant} if asked.variant else {},
                )
            )
        return questions
