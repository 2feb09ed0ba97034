"""Which stages the trials of a study have in common, and which trial had better wait for another's."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from chiasm.config import RunConfig
from chiasm_experiments.training.files import has_parts
from chiasm_experiments.training.shared import stage_folder

if TYPE_CHECKING:
    from chiasm_experiments.study.cells import Trial


class Sharing:
    """What the trials of one study have in common.

    Args:
        trials: all of the study.
        folder: of its trials' folders.
    """

    def __init__(self, trials: Sequence[Trial], folder: Path) -> None:
        self.folder = folder
        self.stages = {trial.name: [stage.name for stage in trial.run.stages] for trial in trials}
        self.prefixes = {trial.name: prefixes(trial.run) for trial in trials}
        owners = Counter(prefix for own in self.prefixes.values() for prefix in own)
        self.common = {name: sum(owners[prefix] > 1 for prefix in own) for name, own in self.prefixes.items()}
        """For each trial how many of its first stages another has too."""

    def would_wait(self, name: str, running: Iterable[str]) -> bool:
        """Whether a trial's first common stage that is not finished is being trained by a running one."""
        return any(self._trains(other, name) for other in running if other != name)

    def _trains(self, other: str, name: str) -> bool:
        """Whether a running trial has a stage before it that another trial needs next."""
        together = sum(a == b for a, b in zip(self.prefixes[other], self.prefixes[name], strict=False))
        return any(not self._finished(other, stage) for stage in self.stages[other][:together])

    def _finished(self, trial: str, stage: str) -> bool:
        return has_parts(stage_folder(self.folder / trial / "stages" / stage))


def prefixes(run: RunConfig) -> list[str]:
    """For each stage of a run all settings that its result depends on; equal ones are one stage to train."""
    values = run.model_dump(mode="json", exclude={"stages", "evaluate", "evaluation_batch_size"})
    stages = run.model_dump(mode="json")["stages"]
    return [json.dumps([values, stages[: index + 1]], sort_keys=True) for index in range(len(stages))]
