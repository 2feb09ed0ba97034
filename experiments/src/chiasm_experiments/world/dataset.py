"""`WorldDataset`: captions or dialogues about generated scenes."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field

from chiasm.sample import Sample
from chiasm_experiments.interfaces import Dataset
from chiasm_experiments.world.config import WorldConfig
from chiasm_experiments.world.language import askable, caption, dialogue
from chiasm_experiments.world.questions import SKILLS
from chiasm_experiments.world.render import WorldImage
from chiasm_experiments.world.sampling import draw_contents, draw_scene, stream
from chiasm_experiments.world.scene import Split


class WorldDatasetConfig(WorldConfig):
    """Training data of the built-in world."""

    task: Literal["captions", "dialogues"] = "captions"
    """`captions`: one request for a description; `dialogues`: questions in the benchmark's form. Both show the same
    images for the same seed and skills."""
    size: int = Field(default=10_000, ge=1, le=2**31)
    """Samples, each with an image of its own."""
    turns: int = Field(default=4, ge=1, le=32)
    """At most this many questions in a dialogue, no two alike; a scene with less to ask has fewer."""


class WorldDataset(Dataset):
    """Scenes of the training split. Sample i is drawn from (seed, i) alone; its image is drawn when it is loaded."""

    Config = WorldDatasetConfig
    config: WorldDatasetConfig
    split: Split = "train"

    @classmethod
    def tiny(cls) -> Self:
        return cls(WorldDatasetConfig(task="dialogues", size=8, image_size=96))

    def __len__(self) -> int:
        return self.config.size

    def __getitem__(self, index: int) -> Sample:
        config = self.config
        if not 0 <= index < config.size:
            raise IndexError(f"sample {index} of a data set of {config.size}")
        rng = stream(config.seed, self.split, index)
        # one skill is sure to find what it needs, so no image is empty
        skill = config.skills[rng.integers(len(config.skills))]
        contents = draw_contents(SKILLS[skill].needs, config.contents, rng)
        scene = draw_scene(contents, self.split, rng)
        image = WorldImage(scene, config.image_size)
        if config.task == "captions":
            turns = [caption(scene, rng)]
        else:
            turns = dialogue(scene, askable(config.skills, contents), config.turns, rng)
        return Sample(f"world-{config.task}-{config.seed}-{index}", tuple(turns), (image,))
