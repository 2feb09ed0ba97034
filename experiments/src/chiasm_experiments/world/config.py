"""The settings that the data set and the benchmark share."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BeforeValidator, Field

from chiasm.settings import Settings
from chiasm_experiments.world.questions import SKILLS, SkillName
from chiasm_experiments.world.render import MIN_SIZE
from chiasm_experiments.world.sampling import CONTENTS, Content

ALL_SKILLS: tuple[SkillName, ...] = get_args(SkillName)


def _expand(skills: Any) -> Any:
    return ALL_SKILLS if skills == "all" else skills


def _distinct(skills: tuple[SkillName, ...]) -> tuple[SkillName, ...]:
    twice = [skill for i, skill in enumerate(skills) if skill in skills[:i]]
    if twice:
        raise ValueError(f"skill {twice[0]!r} is named twice; name each once")
    return skills


Skills = Annotated[tuple[SkillName, ...], Field(min_length=1), AfterValidator(_distinct), BeforeValidator(_expand)]


class WorldConfig(Settings):
    """Which scenes are drawn, and how."""

    skills: Skills = ALL_SKILLS
    """What is asked, or `all`; scenes hold nothing that none of these skills needs."""
    image_size: int = Field(default=224, ge=MIN_SIZE, le=1024)
    """Side of the square images in pixels. The scenes do not depend on it; small text has the same height in pixels
    whatever the size, so it asks for resolution."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Another seed draws other scenes of the same split."""

    @property
    def contents(self) -> tuple[Content, ...]:
        """All that the skills need."""
        needed = {need for skill in self.skills for need in SKILLS[skill].needs}
        return tuple(content for content in CONTENTS if content in needed)
