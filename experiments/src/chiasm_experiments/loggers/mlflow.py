"""Metrics to MLflow: where `MLFLOW_TRACKING_URI` says, an experiment for each study and a run for each trial."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from chiasm.plugin import hookimpl

RUN_FILE = "mlflow.json"
"""In the run's folder: the id of its run, so that a run that was killed is taken up in the same place."""
SEND_SECONDS = 5.0
MOST_METRICS, MOST_PARAMS = 1000, 100
"""In one message (MLflow's limits)."""
LONGEST_PARAM = 6000
STATUS = {"complete": "FINISHED", "pruned": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MLflow:
    """Collects metrics for some seconds and sends them in the background."""

    def __init__(self) -> None:
        self.client = MlflowClient()
        self.run_id = ""
        self.waiting: list[Metric] = []
        self.sent = time.monotonic()

    @hookimpl
    def chiasm_run_started(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        """Makes a run, or takes the folder's own up again."""
        file = folder / RUN_FILE
        if file.is_file():
            self.run_id = json.loads(file.read_text(encoding="utf-8"))["run_id"]
            self.client.update_run(self.run_id, status="RUNNING")
            return
        study = manifest["study"] or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "chiasm"
        experiment = self.client.get_experiment_by_name(study)
        experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(study)
        tags = {"folder": str(folder)}
        self.run_id = self.client.create_run(experiment_id, run_name=manifest["trial"], tags=tags).info.run_id
        file.write_text(json.dumps({"run_id": self.run_id}), encoding="utf-8")
        flat = {**dict(_flatten(manifest["run"])), "workers": manifest["workers"], **dict(_flatten(manifest["cell"]))}
        params = [Param(name, str(value)[:LONGEST_PARAM]) for name, value in flat.items()]
        for first in range(0, len(params), MOST_PARAMS):
            self.client.log_batch(self.run_id, params=params[first : first + MOST_PARAMS])

    @hookimpl
    def chiasm_metrics(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Collects a step."""
        now = int(time.time() * 1000)
        self.waiting += [Metric(f"{stage}/{name}", value, now, step) for name, value in metrics.items()]
        if time.monotonic() - self.sent > SEND_SECONDS or len(self.waiting) > MOST_METRICS - 100:
            self._send(wait=False)

    @hookimpl
    def chiasm_run_ended(self, manifest: Mapping[str, Any]) -> None:
        """Sends the rest and the scores."""
        now = int(time.time() * 1000)
        self.waiting += [Metric(f"score/{name}", value, now, 0) for name, value in manifest.get("scores", {}).items()]
        self._send(wait=True)
        if manifest["error"]:
            self.client.log_batch(self.run_id, tags=[RunTag("error", str(manifest["error"])[-LONGEST_PARAM:])])
        self.client.set_terminated(self.run_id, STATUS[manifest["status"]])

    def _send(self, *, wait: bool) -> None:
        while self.waiting:
            some, self.waiting = self.waiting[:MOST_METRICS], self.waiting[MOST_METRICS:]
            self.client.log_batch(self.run_id, metrics=some, synchronous=wait)
        self.sent = time.monotonic()


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings and lists, with their paths."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _flatten(item, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        for i, item in enumerate(value):
            yield from _flatten(item, f"{path}.{i}")
    else:
        yield path, value
