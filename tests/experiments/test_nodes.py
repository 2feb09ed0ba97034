"""Nodes that have other versions than the driver are refused before the first trial."""

from __future__ import annotations

import platform
from importlib.metadata import version

import pytest
import ray

from chiasm.errors import ConfigError
from chiasm_experiments.study import nodes
from chiasm_experiments.study.nodes import check_nodes, differences, versions


def test_versions_are_of_what_results_depend_on():
    found = versions(["no-such-package"])
    assert found["python"] == platform.python_version()
    assert found["no-such-package"] is None
    for name in ("chiasm", "chiasm-encoders", "chiasm-adapters", "chiasm-llms", "chiasm-experiments", "torch", "timm"):
        assert found[name] == version(name)


def test_differences_name_node_package_and_both_versions():
    here = {"torch": "2.14", "chiasm": "0.1", "mine": "1", "python": "3.11.7"}
    there = {"torch": "2.11", "chiasm": "0.1", "python": "3.11.7", "theirs": "3"}
    assert differences(here, {"one (1.2.3.4)": dict(here), "two (1.2.3.5)": there}) == [
        "two (1.2.3.5): mine is not installed there and 1 here",
        "two (1.2.3.5): theirs is 3 there and not installed here",
        "two (1.2.3.5): torch is 2.11 there and 2.14 here",
    ]


@pytest.mark.slow
def test_every_node_of_the_cluster_is_asked(cluster, monkeypatch):
    check_nodes()
    monkeypatch.setattr(nodes, "versions", lambda: versions() | {"torch": "1.0"})
    with pytest.raises(ConfigError) as refused:
        check_nodes()
    torch = version("torch")
    (node,) = ray.nodes()
    assert f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}): torch is {torch} there and 1.0 here" in str(
        refused.value
    )
    assert "install the same versions on every node" in str(refused.value)
