"""Drivers of a study that are killed, and two at once, through Ray; `benchmarks/kill_study.py` has more moments."""

from __future__ import annotations

import os
import re
import signal
import time
from collections import Counter

import pytest

from killing import GRID, SEARCH, Killed, Run, Steps, cluster, kill_driver

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ray_cluster():
    with cluster() as made:
        yield made


def logged(steps):
    """Once so many steps stand in the logs."""
    return lambda run: Steps.read(run.out).count >= steps


def judge(killed: Killed | None, ray_cluster) -> None:
    assert killed is not None, "it ended before it was killed"
    assert killed.problems == []
    # a checkpoint after every step: of each of two trials no more than the step that was being written, and the next
    assert killed.lost <= 4
    assert ray_cluster.leftovers() == {"actors": [], "placement_groups": [], "all_free": True}


def test_a_search_whose_driver_is_killed_loses_and_repeats_nothing(tmp_path, ray_cluster):
    run = Run(tmp_path, SEARCH)
    judge(kill_driver(run, ray_cluster, logged(60)), ray_cluster)


def test_a_grid_that_sigterm_stops_and_whose_next_driver_is_killed_loses_and_repeats_nothing(tmp_path, ray_cluster):
    """SIGTERM writes checkpoints and leaves the rest, and so costs no step at all."""
    run = Run(tmp_path, GRID)
    process = run.drive(ray_cluster.environment)
    assert run.wait_for(lambda: logged(40)(run), process)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert time.monotonic() - asked < 25  # a cluster kills after 30
    # one of the two may just have ended
    assert re.search("SIGTERM: [12] running trials write their checkpoints and end", run.said)
    steps, before = Steps.read(run.out), run.complete()
    # both trials are taken up, and others are begun
    killed = kill_driver(run, ray_cluster, logged(steps.count + 60))
    judge(killed, ray_cluster)
    now = Steps.read(run.out).lines
    assert all(now[name][step] == line for name, lines in steps.lines.items() for step, line in lines.items())
    assert before.items() <= run.complete().items()


def test_two_drivers_share_a_study(tmp_path, ray_cluster):
    run = Run(tmp_path, GRID)
    drivers = [run.drive(ray_cluster.environment) for _ in range(2)]
    killed = False
    while any(driver.poll() is None for driver in drivers):
        if not killed and len(run.complete()) >= 2 and drivers[0].poll() is None:
            os.kill(drivers[0].pid, signal.SIGKILL)
            killed = True
        time.sleep(0.05)
    assert killed
    assert drivers[1].returncode == 0, run.said[-3000:]
    ended = Counter(line.partition(":")[0] for line in run.said.splitlines() if ": accuracy" in line)
    assert set(ended) <= set(run.complete())
    assert max(ended.values()) == 1
    assert len(run.complete()) == 8
