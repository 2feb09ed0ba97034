"""What both parts of two_gpus.py share: how large everything is, and the cluster that it runs on.

Shape letters: none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from speed import REAL, TINY, Scale


@dataclass(frozen=True)
class Plan:
    """How large everything is.

    Args:
        batches: samples of a step of stage 1, of stage 2, and of stage 2 in full, over all GPUs.
        images: of the data set of training.
        trials: of a study of halves.
        steps: of a trial.
        gpus: of a whole worker: 1, or 0 on the CPU.
    """

    scale: Scale
    batches: tuple[int, int, int]
    images: int
    trials: int
    steps: int
    gpus: int


LARGE = Plan(REAL, (32, 16, 8), 640, 12, 120, 1)
SMALL = Plan(TINY, (4, 4, 2), 40, 8, 30, 0)


@contextmanager
def cluster(plan: Plan, gpus: int) -> Iterator[str]:
    """Ray with so many GPUs, or CPUs where there are none; its address."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    given = {"num_cpus": 16 * gpus, "num_gpus": gpus} if plan.gpus else {"num_cpus": gpus, "num_gpus": 0}
    context = ray.init("local", include_dashboard=False, log_to_driver=False, logging_level="error", **given)
    try:
        yield context.address_info["gcs_address"]
    finally:
        ray.shutdown()


def hold_half(half: int) -> None:
    """Leaves this process one of the two GPUs and half of the cores, before it has used any."""
    os.environ["CUDA_VISIBLE_DEVICES"] = str(half)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[half * len(cores) // 2 : (half + 1) * len(cores) // 2])
