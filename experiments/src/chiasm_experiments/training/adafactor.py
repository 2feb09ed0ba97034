"""Adafactor with a given learning rate, as OmniFusion's released code trains with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.optimization import Adafactor as Published


class Adafactor(Published):  # type: ignore[misc]
    """transformers' Adafactor (arXiv 1804.04235) with `relative_step` off and `scale_parameter` on.

    It differs from torch's own where the released code relies on it: no 1 / sqrt(step) caps the learning rate, and the
    small constant is added to the squared gradient. Each update is as large as its parameter's root mean square, at
    least 1e-3, times the learning rate; no first moment is kept, and of a matrix two vectors of second moments.

    The numbers are those of the base class. What it asks a GPU for in each step, the parameter's scale, stays on it.
    """

    def __init__(self, params: Iterable[Tensor] | Iterable[dict[str, Any]], **given: Any) -> None:
        super().__init__(params, scale_parameter=True, relative_step=False, **given)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; the state is made here, so that all of it is tensors, which a checkpoint can hold."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    self.state[parameter] = _start(parameter)
        loss: float | None = super().step(closure)
        return loss

    @staticmethod
    def _get_lr(param_group: dict[str, Any], param_state: dict[str, Any]) -> Tensor:
        # the base class compares on the host, which waits for the device once for each parameter
        rms: Tensor = param_state["RMS"]
        rate: float = param_group["lr"]
        return rms.clamp(min=param_group["eps"][1]) * rate


def _start(parameter: Tensor) -> dict[str, Tensor]:
    """The state before the first step; the count stays on the host, where it is read."""
    state = {"step": torch.tensor(0.0), "RMS": torch.zeros((), device=parameter.device)}
    if parameter.ndim < 2:
        return state | {"exp_avg_sq": torch.zeros_like(parameter)}
    row, column = parameter.shape[:-1], parameter.shape[:-2] + parameter.shape[-1:]
    return state | {"exp_avg_sq_row": parameter.new_zeros(row), "exp_avg_sq_col": parameter.new_zeros(column)}
