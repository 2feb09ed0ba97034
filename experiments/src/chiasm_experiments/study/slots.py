"""How many trials run at once: what the nodes hold, and how many share a GPU that one of them leaves idle."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

GIB = 2**30
CONTEXT_BYTES = 0.75 * GIB
"""Memory of a GPU that each process takes beside its tensors: CUDA's context and the code of kernels."""
FRAGMENTS = 1.15
"""Memory that torch reserves, at most, to what its tensors took."""
EPSILON = 1e-6


def trials_per_gpu(busy: float | None, peak_bytes: int | None, memory_bytes: int | None, most: int) -> int:
    """How many trials like a measured one share a GPU.

    Args:
        busy: share of its training time that the measured trial kept a whole GPU busy; None: not known.
        peak_bytes: the most that its tensors took; None: not known.
        memory_bytes: of the GPU; None: not known.
        most: a limit.
    """
    if busy is None or peak_bytes is None or memory_bytes is None:
        return 1
    by_time = math.floor(1 / max(busy, EPSILON) + EPSILON)
    by_memory = math.floor(memory_bytes / (peak_bytes * FRAGMENTS + CONTEXT_BYTES))
    return max(1, min(by_time, by_memory, most))


def memory_fraction(share: float, memory_bytes: int) -> float:
    """The fraction of a GPU's memory that torch may reserve in a process that has a share of it."""
    return max(0.01, share - CONTEXT_BYTES / memory_bytes)


def count_slots(nodes: Sequence[Mapping[str, float]], cpus: float, gpus: float, workers: int) -> int:
    """Trials that the nodes hold at once.

    Args:
        nodes: what each has, `CPU` and `GPU`.
        cpus: of a worker.
        gpus: of a worker; shares of one worker lie on one GPU.
        workers: of a trial, on any nodes.
    """

    def fits(node: Mapping[str, float]) -> int:
        found = [_times(node.get("CPU", 0), cpus)]
        if gpus:
            whole = int(node.get("GPU", 0))
            found.append(whole * _times(1, gpus) if gpus < 1 else _times(whole, gpus))
        return min(found)

    return sum(map(fits, nodes)) // workers


def _times(total: float, amount: float) -> int:
    return math.floor(total / amount + EPSILON)
