"""How busy training keeps its GPU, as the driver counts it: the share of time in which any kernel ran."""

from __future__ import annotations

import time

import torch

SAMPLE_SECONDS = 0.25
"""Between two readings; the driver's own period is between 1/6 s and 1 s."""


class Busy:
    """Readings of one run's GPU, taken as its steps end.

    Args:
        device: that trains; of a CPU nothing is read.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._readings: list[int] | None = [] if device.type == "cuda" else None
        self._read = 0.0

    @property
    def share(self) -> float | None:
        """In [0, 1], counting other processes on the GPU too; None where the driver does not say."""
        return sum(self._readings) / len(self._readings) / 100 if self._readings else None

    def step(self) -> None:
        """A step has ended."""
        now = time.monotonic()
        if self._readings is None or now - self._read < SAMPLE_SECONDS:
            return
        self._read = now
        try:
            self._readings.append(torch.cuda.utilization(self.device))
        except Exception:  # the driver's library has errors of its own for what a machine does not tell, say under MIG
            self._readings = None
