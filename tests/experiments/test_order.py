"""The order of samples and the schedule are pure functions of the seed and the step."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from chiasm.config import ComponentRef, StageConfig
from chiasm_experiments.data.order import Order
from chiasm_experiments.training.optim import make_schedule


def test_every_epoch_takes_every_sample_once():
    order = Order(size=10, batch_size=4, seed=3, stage=0)
    assert order.steps(2) == 5
    taken = [index for step in range(order.steps(2)) for index in order.step(step)]
    assert Counter(taken[:10]) == Counter(range(10))
    assert Counter(taken[10:]) == Counter(range(10))
    assert taken[:10] != taken[10:]


def test_a_batch_may_be_larger_than_the_data():
    order = Order(size=3, batch_size=8, seed=0, stage=0)
    assert order.steps(1) == 1
    assert Counter(order.step(0)) == {0: 3, 1: 3, 2: 2} or sorted(Counter(order.step(0)).values()) == [2, 3, 3]


def test_seeds_and_stages_draw_different_orders_and_each_is_repeatable():
    orders = {(s, g): tuple(Order(100, 10, s, g).step(0)) for s in range(3) for g in range(2)}
    assert len(set(orders.values())) == 6
    assert orders[1, 1] == tuple(Order(100, 10, 1, 1).step(0))


def stage(**fields) -> StageConfig:
    base = {"name": "s", "data": [ComponentRef(name="x")], "train": ["adapter"], "lr": 1.0, "batch_size": 1}
    return StageConfig.model_validate(base | fields)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_schedule_counts_steps_of_the_whole_stage(schedule):
    steps, warmup = 50, 5
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = make_schedule(optimizer, stage(schedule=schedule, warmup=0.1), steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    for step, rate in enumerate(rates):
        if step < warmup:
            wanted = 2.0 * (step + 1) / warmup
        elif schedule == "constant":
            wanted = 2.0
        else:
            wanted = 1.0 + math.cos(math.pi * (step - warmup) / (steps - warmup))
        assert rate == pytest.approx(wanted, abs=1e-12)
    if schedule == "cosine":
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
