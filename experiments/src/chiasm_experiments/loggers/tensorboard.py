"""Metrics as TensorBoard's event files in the run's folder: `tensorboard --logdir RUN/tensorboard`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from chiasm.plugin import hookimpl

FOLDER = "tensorboard"
FLUSH_SECONDS = 10


class TensorBoard:
    """One of TensorBoard's runs for each stage, so that stages lie over each other, and one for the scores."""

    def __init__(self) -> None:
        self.writers: dict[str, SummaryWriter] = {}

    @hookimpl
    def chiasm_run_started(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        """Writes the configuration as text."""
        text = json.dumps(manifest["run"], indent=2)
        self._writer(folder, "run").add_text("run", f"```json\n{text}\n```", 0)

    @hookimpl
    def chiasm_metrics(self, folder: Path, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Writes a step; what an earlier process wrote from this step on, before it was killed, is hidden."""
        writer = self._writer(folder, stage, purge=step)
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    @hookimpl
    def chiasm_stage_ended(self, folder: Path, stage: str) -> None:
        """Closes the stage's file."""
        if stage in self.writers:
            self.writers.pop(stage).close()

    @hookimpl
    def chiasm_run_ended(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        """Writes the scores and closes all files."""
        for benchmark, score in manifest.get("scores", {}).items():
            self._writer(folder, "run").add_scalar(f"score/{benchmark}", score, 0)
        while self.writers:
            self.writers.popitem()[1].close()

    def _writer(self, folder: Path, name: str, purge: int | None = None) -> SummaryWriter:
        if name not in self.writers:
            place = str(folder / FOLDER / name)
            # files are named for the second in which they begin, and a later one of the same name would replace it
            self.writers[name] = SummaryWriter(
                place, purge_step=purge, flush_secs=FLUSH_SECONDS, filename_suffix=f".{purge or 0}"
            )
        return self.writers[name]
