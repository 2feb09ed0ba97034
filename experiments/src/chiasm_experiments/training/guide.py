"""Who accompanies a run: is told how far it is, may ask it to stop, and judges it at its rungs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from chiasm.errors import ChiasmError
from chiasm_experiments.training.busy import Busy

STEP = "step_seconds"
"""A metric that every step has, and nothing else."""


class StoppedError(ChiasmError):
    """A run was asked to stop and did; called again it goes on from its checkpoint."""


class Guide(Protocol):
    """Accompanies a run on its first worker."""

    def progress(self, what: str, step: int, steps: int, metrics: Mapping[str, float]) -> None:
        """Told of every step: what is done (a stage's name or `evaluate`), the step, the steps in all, its metrics."""

    def stopping(self) -> bool:
        """Whether the run is to write a checkpoint and end. Cheap: asked after every step."""
        ...

    def report(self, rung: int, share: float, scores: Sequence[float | None]) -> bool:
        """Whether the run is to go on after a rung; False prunes it. The run waits for the answer.

        Args:
            rung: counted from 0.
            share: of the last stage's steps that are done.
            scores: of the questions asked there, in the same order in every run; None: not scored.
        """
        ...


class Unguided:
    """Says nothing, and lets the run go on."""

    def progress(self, what: str, step: int, steps: int, metrics: Mapping[str, float]) -> None:
        """Nobody is told."""

    def stopping(self) -> bool:
        """Never."""
        return False

    def report(self, rung: int, share: float, scores: Sequence[float | None]) -> bool:
        """Goes on."""
        return True


class Measured:
    """A guide that also notes when the first step ended, and how busy steps keep the device.

    Args:
        guide: asked and told all the same.
        device: that trains.
    """

    def __init__(self, guide: Guide, device: torch.device) -> None:
        self.guide = guide
        self.busy = Busy(device)
        self.began = time.time()
        """Seconds since the epoch."""
        self.started = time.perf_counter()
        self.first_step_seconds: float | None = None
        """From the start to the end of the first step that this process took; None where it took none."""

    def progress(self, what: str, step: int, steps: int, metrics: Mapping[str, float]) -> None:
        """Passes it on."""
        if STEP in metrics:
            if self.first_step_seconds is None:
                self.first_step_seconds = time.perf_counter() - self.started
            self.busy.step()
        self.guide.progress(what, step, steps, metrics)

    def stopping(self) -> bool:
        """Passes it on."""
        return self.guide.stopping()

    def report(self, rung: int, share: float, scores: Sequence[float | None]) -> bool:
        """Passes it on."""
        return self.guide.report(rung, share, scores)
