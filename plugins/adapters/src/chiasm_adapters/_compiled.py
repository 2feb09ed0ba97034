"""Functions that move more bytes than they compute: compiled on a GPU, where separate operations would read and write
the same numbers again and again."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def compiled_on_gpu(function: Callable[P, R]) -> Callable[P, R]:
    """A function of tensors that `torch.compile` compiles when it is first called with one on a GPU.

    Elsewhere it runs as it is written; so it does where nothing can be compiled, which is said once.
    """
    state: dict[str, Any] = {"call": None}

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        if not (isinstance(first, Tensor) and first.is_cuda) or torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if state["call"] is None:
            state["call"] = torch.compile(function)
        try:
            result: R = state["call"](*args, **kwargs)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # no C compiler, no Triton: the result is the same, later
            if state["call"] is function:
                raise
            warnings.warn(f"{function.__name__} cannot be compiled and runs slower: {error}", stacklevel=2)
            state["call"] = function
            return function(*args, **kwargs)
        return result

    return call
