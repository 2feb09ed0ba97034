"""Numbers that workers tell each other while their GPUs are busy."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from chiasm_experiments.training import workers
from chiasm_experiments.training.workers import Workers, host_group

META = torch.device("meta")
"""A device that can answer nothing."""


@pytest.fixture
def world(tmp_path, monkeypatch):
    """One worker in a group that is said to be of GPUs alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(workers, "_groups", {})
    yield
    dist.destroy_process_group()


def test_workers_of_one_machine_sum_numbers_without_their_gpus(world, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    group = host_group(1)
    assert group is not dist.group.WORLD
    assert host_group(1) is group
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(workers, "_groups", {dist.group.WORLD: group})
    assert Workers(0, 2, META).sums(2, 0.5) == [2.0, 0.5]
    assert Workers(0, 2, META).most(3) == 3


@pytest.mark.parametrize("local", ["1", None])
def test_between_machines_they_talk_as_they_do_already(world, monkeypatch, local):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert host_group(2) is None


def test_a_group_with_a_way_for_the_cpu_is_used_as_it_is(world, monkeypatch):
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    assert host_group(2) is dist.group.WORLD
