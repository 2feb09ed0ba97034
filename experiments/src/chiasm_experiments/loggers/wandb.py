"""Metrics to Weights & Biases, in the project that `WANDB_PROJECT` names."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb

from chiasm.plugin import hookimpl

ID_FILE = "wandb.id"
"""In the run's folder, so that a run that was killed is taken up in the same place."""


class WandB:
    """One of W&B's runs for each run, grouped by study; it sends in a process of its own."""

    def __init__(self) -> None:
        self.run: Any = None
        self.stages: set[str] = set()

    @hookimpl
    def chiasm_run_started(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        """Begins a run, or takes the folder's own up again."""
        file = folder / ID_FILE
        if not file.is_file():
            file.write_text(uuid.uuid4().hex[:16], encoding="utf-8")
        self.run = wandb.init(
            id=file.read_text(encoding="utf-8"),
            resume="allow",
            name=manifest["trial"],
            group=manifest["study"],
            config={"run": manifest["run"], "cell": manifest["cell"], "environment": manifest["environment"]},
            dir=str(folder),
            reinit="create_new",
        )

    @hookimpl
    def chiasm_metrics(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Sends a step; each stage has an axis of its own, as its steps begin at 1 again."""
        if stage not in self.stages:
            self.stages.add(stage)
            self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self.run.log({f"{stage}/step": step} | {f"{stage}/{name}": value for name, value in metrics.items()})

    @hookimpl
    def chiasm_run_ended(self, manifest: Mapping[str, Any]) -> None:
        """Sends the scores and ends the run."""
        for name, value in manifest.get("scores", {}).items():
            self.run.summary[f"score/{name}"] = value
        self.run.finish(exit_code=0 if manifest["status"] in ("complete", "pruned") else 1)
