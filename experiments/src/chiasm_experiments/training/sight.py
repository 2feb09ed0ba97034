"""What a stage tells while it trains: metrics of each step, and a trace of a few."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from chiasm_experiments.data.feed import Example
from chiasm_experiments.training.meter import Meter

SETTLING = 3
"""Steps before those that are traced: the first ones compile, allocate and open files."""
ROWS = 40
"""Of the table of operations."""

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Sight:
    """What is to be seen of one stage on this worker.

    Args:
        operations: that the model needs for some examples, forward and backward, and
        peak: those that the device can do in a second. Utilisation is left out without either.
        trace: steps to trace with torch's profiler; 0: none.
        folder: of the trace.
    """

    operations: Callable[[Sequence[Example]], float] | None = None
    peak: float | None = None
    trace: int = 0
    folder: Path | None = None

    def meter(self, device: torch.device) -> Meter:
        """What measures the steps."""
        return Meter(device, self.peak if self.operations else None)

    def needed(self, examples: Sequence[Example]) -> float | None:
        """The operations of a step, where they are wanted."""
        return self.operations(examples) if self.operations and self.peak else None

    def traced(self, items: Iterable[Item], steps: int, device: torch.device) -> Iterator[Item]:
        """The items of the steps that are still to be done, some of which are traced while they are used.

        Writes `trace.json`, for chrome://tracing or Perfetto, and `operations.txt`, the costliest operations. A stage
        too short to settle is traced from its second step on.
        """
        if not self.trace or steps < 2:  # torch wants a step to warm up
            yield from items
            return
        assert self.folder is not None
        with _profiler(self.folder, self.trace, steps, device) as profiler:
            for item in items:
                yield item
                profiler.step()


NOTHING = Sight()


@contextmanager
def _profiler(folder: Path, traced: int, steps: int, device: torch.device) -> Generator[profile]:
    on_gpu = device.type == "cuda"
    before = max(1, min(SETTLING, steps - traced))
    active = min(traced, steps - before)

    def write(finished: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(folder / "trace.json"))
        order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        table = finished.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=80)
        (folder / "operations.txt").write_text(table + "\n", encoding="utf-8")

    # without shapes and stacks, which would make a step several times as long as it is
    with profile(
        activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu],
        schedule=schedule(wait=before - 1, warmup=1, active=active, repeat=1),
        on_trace_ready=write,
        acc_events=True,
    ) as profiler:
        yield profiler
