"""Every pair of choices of any two axes: the plan refuses a combination with a reason, or it trains and answers."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).parents[1] / "benchmarks" / "all_pairs.py"


@pytest.fixture(scope="module")
def pairs():
    spec = importlib.util.spec_from_file_location("all_pairs", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["all_pairs"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["all_pairs"]


@pytest.mark.parametrize("sizes", [(3, 2), (4, 4, 4), (12, 10, 11, 5, 4), (1, 5, 2)])
def test_a_pairwise_design_holds_every_pair_in_few_rows(pairs, sizes):
    rows = pairs.pairwise(sizes)
    for a, b in itertools.combinations(range(len(sizes)), 2):
        assert {(row[a], row[b]) for row in rows} == set(itertools.product(range(sizes[a]), range(sizes[b])))
    most = sorted(sizes)[-1] * sorted(sizes)[-2]
    assert most <= len(rows) <= 1.5 * most


@pytest.mark.slow
def test_every_pair_is_refused_by_the_plan_or_learns(pairs):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small only wait for each other's threads
    try:
        every = pairs.levels()
        outcomes = [pairs.attempt(names, every) for names in pairs.pairs()]
    finally:
        torch.set_num_threads(threads)
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    assert not failed, "\n".join(f"{outcome.names}: {outcome.reason}" for outcome in failed)
    refused = [outcome for outcome in outcomes if outcome.status == "refused"]
    assert refused
    assert all("choose" in outcome.reason or "set " in outcome.reason for outcome in refused), refused
    # every choice of every axis works somewhere
    for axis, name in enumerate(pairs.AXES):
        learned = {outcome.names[axis] for outcome in outcomes if outcome.status == "trained"}
        assert learned == set(every[name]), name
