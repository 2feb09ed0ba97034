"""What the decision about the feature cache rests on, measured here: an encoder's time, and the disk's."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from chiasm.vlm import VLM

MOST_VIEWS = 64
SLOW_SECONDS = 0.2
"""An encoder that takes so long for a single view is timed on no more."""
FILE_BYTES = 2**26


def encoder_seconds(vlm: VLM, index: int, device: torch.device, views: int) -> float:
    """Seconds that an encoder takes for one view, in batches of so many views, at most `MOST_VIEWS`."""
    encoder: Any = vlm.encoders[index]
    image = encoder.geometry.image

    def run(count: int) -> float:
        pixels = torch.zeros(count, 3, image.height, image.width, device=device)
        with torch.no_grad():
            return _timed(lambda: vlm.encode(index, pixels), device)

    first = min(run(1), run(1))
    if first > SLOW_SECONDS:
        return first
    count = max(1, min(views, MOST_VIEWS))
    run(count)  # kernels are chosen and memory is taken
    return min(run(count) for _ in range(2)) / count


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    """Bytes in a second."""

    write: float
    """To the disk itself."""
    read: float
    """From the disk itself."""
    read_again: float
    """From the memory in which the system keeps files that it has read."""


@lru_cache  # a process that runs many trials asks for each of them
def disk_speed(folder: Path, size: int) -> DiskSpeed:
    """Writes and reads a file of at most `FILE_BYTES`, or as large as all that is to be stored; once in a process."""
    count = max(2**16, min(size, FILE_BYTES))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"speed-{uuid.uuid4().hex}"
    data = bytearray(os.urandom(2**16) * (count // 2**16))
    cpu = torch.device("cpu")
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    path.unlink()  # its bytes go with the open file, even if the process is killed
    try:

        def write() -> None:
            os.pwrite(file, data, 0)
            os.fsync(file)

        written = _timed(write, cpu)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        read = _timed(lambda: os.preadv(file, [data], 0), cpu)
        again = _timed(lambda: os.preadv(file, [data], 0), cpu)
    finally:
        os.close(file)
    return DiskSpeed(len(data) / written, len(data) / read, len(data) / again)


def memory_for_files() -> int:
    """Bytes of files that the system may keep in memory: half of what there is."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _timed(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return max(1e-9, time.perf_counter() - started)
