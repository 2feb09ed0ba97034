"""Compiled on a GPU alone; where nothing can be compiled the function runs as it is written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from chiasm_adapters._compiled import compiled_on_gpu


def test_on_the_cpu_a_function_runs_as_it_is_written(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *_: pytest.fail("compiled on the CPU"))
    assert compiled_on_gpu(torch.neg)(torch.ones(2)).tolist() == [-1, -1]


def test_on_a_gpu_it_is_compiled_once_and_without_a_compiler_it_still_runs(monkeypatch):
    made = []

    def broken(function):
        made.append(function)

        def call(*_):
            raise RuntimeError("no compiler")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda self: True))

    @compiled_on_gpu
    def negative(x: Tensor) -> Tensor:
        return -x

    with pytest.warns(UserWarning, match="negative cannot be compiled and runs slower: no compiler"):
        assert negative(torch.ones(1)).item() == -1
    assert negative(torch.ones(1)).item() == -1
    assert len(made) == 1
