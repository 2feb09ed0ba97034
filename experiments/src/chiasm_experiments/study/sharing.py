"""Which stages the trials of a study have in common, and which trial had better wait for another's."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
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
        folder: of the trials' folders.
        trials: all of the study; None where they are not known beforehand, and any may share any stage.
    """

    def __init__(self, folder: Path, trials: Iterable[Trial] | None) -> None:
        self.folder = folder
        self.stages: dict[str, list[str]] = {}
        self.prefixes: dict[str, list[str]] = {}
        self.seen: dict[str, str] = {}
        self._owners: Counter[str] | None = None
        self._viewers: Counter[str] | None = None
        if trials is not None:
            trials = list(trials)
            self._owners = Counter(prefix for trial in trials for prefix in prefixes(trial.run))
            self._viewers = Counter(features(trial.run) for trial in trials)

    def add(self, name: str, trial: Trial) -> None:
        """Tells of a trial under its name in the folder, before anything is asked about it."""
        if name not in self.stages:
            self.stages[name] = [stage.name for stage in trial.run.stages]
            self.prefixes[name] = prefixes(trial.run)
            self.seen[name] = features(trial.run)

    def common(self, name: str) -> int | None:
        """How many of a trial's first stages another has too; None: any of them may be another's."""
        if self._owners is None:
            return None
        return sum(self._owners[prefix] > 1 for prefix in self.prefixes[name])

    def alike(self, name: str) -> int:
        """How many trials want the same features of the same images, this one among them; at least two of a study whose
        trials are not known beforehand."""
        return 2 if self._viewers is None else max(1, self._viewers[self.seen[name]])

    def would_wait(self, name: str, running: Iterable[str]) -> bool:
        """Whether a trial's first common stage that is not finished is being trained by a running one."""
        return any(self._trains(other, name) for other in running if other != name)

    def _trains(self, other: str, name: str) -> bool:
        """Whether a running trial has a stage before it that another trial needs next."""
        together = sum(a == b for a, b in zip(self.prefixes[other], self.prefixes[name], strict=False))
        return any(not self._finished(other, stage) for stage in self.stages[other][:together])

    def _finished(self, trial: str, stage: str) -> bool:
        return has_parts(stage_folder(self.folder / trial / "stages" / stage))


def features(run: RunConfig) -> str:
    """What the features of a run's encoders depend on, which images they are of, and whether they stay the same."""
    encoders = [
        (ref.model_dump(mode="json"), None if ref.options.get("pretrained") is not None else run.seed)
        for ref in run.vision.encoders
    ]
    data = [stage.model_dump(mode="json", include={"data"}) for stage in run.stages]
    trained = "encoders" in run.trained
    image = run.vision.image.model_dump(mode="json")
    return json.dumps([encoders, trained, image, data, run.precision], sort_keys=True)


def prefixes(run: RunConfig) -> list[str]:
    """For each stage of a run all settings that its result depends on; equal ones are one stage to train."""
    values = run.model_dump(mode="json", exclude={"stages", "evaluate", "evaluation_batch_size"})
    stages = run.model_dump(mode="json")["stages"]
    return [json.dumps([values, stages[: index + 1]], sort_keys=True) for index in range(len(stages))]
