"""What tests of this folder share."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session")
def cluster():
    """Ray with two CPUs, once for all tests of this process."""
    import ray

    os.environ["RAY_AUTH_MODE"] = "disabled"
    # Ray Train's own knob: how soon the end of a run on several workers is noticed
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()
