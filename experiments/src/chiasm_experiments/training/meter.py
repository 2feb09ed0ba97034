"""The metrics of every optimiser step, measured without making the device wait."""

from __future__ import annotations

import resource
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Metrics = dict[str, float]
Value = Tensor | float
"""A number, or a scalar on the device that is not read yet."""


class Meter:
    """Takes what each step came to and gives its metrics back, in order, once the device has them.

    A device works behind the program that feeds it, and asking it for a number holds the program up until it has caught
    up. So the numbers of a step are copied behind its back, and its time is measured by the device's own clock: from
    the end of the step before to the end of this one. What stands in between and the step's begin is time without
    data. On the CPU all of it is known at once.

    Args:
        device: that trains.
        peak: operations in a second that the device can do at most; None: no utilisation is given.
    """

    def __init__(self, device: torch.device, peak: float | None = None) -> None:
        self.peak = peak
        self._clock: _Clock = _CudaClock() if device.type == "cuda" else _HostClock()
        self._memory = _PeakMemory(device)
        self._pending: deque[_Step] = deque()
        self._ended: _Mark = self._clock.mark()
        self._begun: _Mark = self._ended

    def restart(self) -> None:
        """What was done since the last step belongs to no step."""
        self._ended = self._clock.mark()

    def begin(self) -> None:
        """The samples of the next step are there."""
        self._begun = self._clock.mark()

    def end(
        self,
        step: int,
        *,
        loss: Value,
        gradient_norm: Value,
        lr: float,
        tokens: Value,
        samples: Value,
        positions: Value,
        flops: float | None = None,
    ) -> None:
        """All work of a step is on its way.

        Args:
            step: counted from 1.
            loss: mean over its supervised tokens.
            gradient_norm: before clipping.
            lr: of the first group of parameters.
            tokens: supervised ones, of all workers.
            samples: of all workers.
            positions: of all workers, padding left out.
            flops: operations that the model needs for this worker's samples; None: not known.
        """
        values = {
            "loss": loss,
            "gradient_norm": gradient_norm,
            "lr": lr,
            "tokens": tokens,
            "samples": samples,
            "positions": positions,
        }
        copied = _Copied(values)
        before, self._ended = self._ended, self._clock.mark()
        self._pending.append(_Step(step, copied, before, self._begun, self._ended, flops))

    def ready(self) -> Iterator[tuple[int, Metrics]]:
        """The steps that are through, with their metrics; waits for none."""
        while self._pending and self._pending[0].ended.reached():
            yield self._finish(self._pending.popleft())

    def flush(self) -> Iterator[tuple[int, Metrics]]:
        """The metrics of all steps given so far; waits until the device has done them."""
        while self._pending:
            self._pending[0].ended.wait()
            yield self._finish(self._pending.popleft())

    def _finish(self, step: _Step) -> tuple[int, Metrics]:
        values = step.values.read()
        seconds = max(step.ended.since(step.before), 1e-9)
        metrics = {name: values[name] for name in ("loss", "lr", "gradient_norm")}
        for name in ("tokens", "samples", "positions"):
            metrics[f"{name}_per_second"] = values[name] / seconds
        if self.peak is not None and step.flops is not None:
            metrics["model_flop_utilisation"] = step.flops / seconds / self.peak
        metrics["data_wait"] = min(1.0, max(0.0, step.begun.since(step.before) / seconds))
        metrics["step_seconds"] = seconds
        metrics["peak_memory_bytes"] = self._memory.read()
        return step.number, metrics


class _Mark(Protocol):
    """A moment in the work of a device."""

    def reached(self) -> bool: ...

    def wait(self) -> None: ...

    def since(self, earlier: _Mark) -> float:
        """Seconds from an earlier mark of the same clock to this one, both reached."""
        ...


class _Clock(Protocol):
    def mark(self) -> _Mark: ...


@dataclass(frozen=True, slots=True)
class _Step:
    number: int
    values: _Copied
    before: _Mark
    begun: _Mark
    ended: _Mark
    flops: float | None


class _Copied:
    """Numbers, those on a device on their way to the host's memory."""

    def __init__(self, values: dict[str, Value]) -> None:
        self._known = {name: float(value) for name, value in values.items() if not _on_device(value)}
        away = {name: value for name, value in values.items() if isinstance(value, Tensor) and _on_device(value)}
        self._names = list(away)
        self._copy: Tensor | None = None
        if away:
            stacked = torch.stack([value.detach().to(torch.float64).reshape(()) for value in away.values()])
            self._copy = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True)
            self._copy.copy_(stacked, non_blocking=True)

    def read(self) -> dict[str, float]:
        """The numbers; the step's end has been reached."""
        copied = [] if self._copy is None else self._copy.tolist()
        return self._known | dict(zip(self._names, copied, strict=True))


def _on_device(value: Value) -> bool:
    return isinstance(value, Tensor) and value.is_cuda


@dataclass(frozen=True, slots=True)
class _HostMark:
    at: float

    def reached(self) -> bool:
        return True

    def wait(self) -> None:
        return

    def since(self, earlier: _Mark) -> float:
        assert isinstance(earlier, _HostMark)
        return self.at - earlier.at


class _HostClock:
    def mark(self) -> _HostMark:
        return _HostMark(time.perf_counter())


class _CudaMark:
    def __init__(self) -> None:
        self.event: torch.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.event.record()

    def reached(self) -> bool:
        return bool(self.event.query())

    def wait(self) -> None:
        self.event.synchronize()

    def since(self, earlier: _Mark) -> float:
        assert isinstance(earlier, _CudaMark)
        return float(earlier.event.elapsed_time(self.event)) / 1000


class _CudaClock:
    def mark(self) -> _CudaMark:
        return _CudaMark()


class _PeakMemory:
    """The most memory that was held: of the device, or of this process on the CPU. Read at most twice a second."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.value = 0.0
        self.read_at = -1.0

    def read(self) -> float:
        """Bytes."""
        now = time.monotonic()
        if now - self.read_at > 0.5:
            self.read_at = now
            if self.device.type == "cuda":
                self.value = float(torch.cuda.max_memory_allocated(self.device))
            else:
                unit = 1 if sys.platform == "darwin" else 1024
                self.value = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
        return self.value
