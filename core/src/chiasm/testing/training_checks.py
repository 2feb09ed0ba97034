"""The shared checks of what learns and what does not."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from chiasm.testing.check import Check
from chiasm.testing.common import calling, make_tiny, require, some
from chiasm.testing.probe import Inputs, Probe

DRAWS = 3
"""Inputs and weights that are tried before a gradient of zero counts as none."""


def training_checks(probe: Probe) -> tuple[Check, ...]:
    """The shared checks of training, for one kind."""

    def frozen(cls: Any) -> None:
        """What is frozen asks for no gradient, and after `eval()` nothing is in training mode or changes."""
        module = make_tiny(cls)
        for name in ("train", "eval"):
            require(getattr(module, name)() is module, f"{name}() does not return the module, as torch's does")
        module.requires_grad_(False).train()
        thawed = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        require(not thawed, f"frozen by requires_grad_(False), {some(thawed)} requires a gradient again after train()")
        module.eval()
        training = [name or "the module" for name, part in module.named_modules() if part.training]
        require(not training, f"after eval() still in training mode: {some(training)}")
        before = _tensors(module)
        output = probe(module, probe.inputs(module, 2), " of a frozen module")
        require(
            not output.requires_grad,
            "frozen by requires_grad_(False), its output still requires a gradient: "
            "some tensor is no registered parameter, or train or forward sets requires_grad",
        )
        thawed = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        require(not thawed, f"frozen by requires_grad_(False), {some(thawed)} requires a gradient again after a pass")
        after = _tensors(module)
        changed = [name for name, value in before.items() if name in after and not torch.equal(value, after[name])]
        require(not changed, f"a forward pass in eval mode changed {some(changed)}")

    def gradients(cls: Any) -> None:
        """When trained, a gradient reaches every parameter, in every step."""
        module = make_tiny(cls).requires_grad_(True)
        if next(module.parameters(), None) is None:
            return
        with (
            torch.no_grad()
        ):  # a run is evaluated between two steps: nothing that it leaves behind may be without graph
            probe(module.eval(), probe.inputs(module, 2))
        module.train()
        _step(probe, module, probe.inputs(module, 2))
        unreached = [name for name, parameter in module.named_parameters() if parameter.grad is None]
        require(
            not unreached,
            f"no gradient reaches {some(unreached)}: leave out what the output does not need, "
            "such as blocks behind the last selected layer",
        )
        reached: set[str] = set()
        for _ in range(DRAWS):
            wild = [name for name, p in module.named_parameters() if not (p.grad is None or p.grad.isfinite().all())]
            require(not wild, f"the gradient of {some(wild)} is not finite")
            reached |= {name for name, p in module.named_parameters() if p.grad is not None and bool(p.grad.any())}
            module.zero_grad(set_to_none=True)
            with torch.no_grad():  # some parts start as the identity, and let no gradient through until they learn
                for parameter in module.parameters():
                    parameter.add_(0.05 * torch.randn(parameter.shape))
            with calling("a training step after another (does forward keep a graph of an earlier call? detach it)"):
                _step(probe, module, probe.inputs(module, 2))
        require(bool(reached), "the gradients of all parameters are zero")
        still = [name for name, _ in module.named_parameters() if name not in reached]
        require(not still, f"the gradient of {some(still)} is zero whatever the input: no output depends on it")

    def finite(cls: Any) -> None:
        """Rare inputs, such as zeros, give finite outputs and gradients."""
        for name, inputs in probe.extremes(make_tiny(cls)).items():
            module = make_tiny(cls).eval()
            output = probe(module, inputs, f" of {name}")
            require(bool(output.isfinite().all()), f"forward of {name} gives NaN or infinity")
            output = probe(module.train().requires_grad_(True), inputs, f" of {name} in training mode")
            if not output.requires_grad:
                continue
            torch.autograd.backward(output.float().mean())
            wild = [n for n, p in module.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
            require(not wild, f"forward of {name} gives {some(wild)} a gradient that is not finite")

    return frozen, gradients, finite


def _step(probe: Probe, module: nn.Module, inputs: Inputs) -> None:
    output = probe(module, inputs, " in training mode")
    require(
        output.requires_grad,
        "every parameter requires a gradient and the output does not: does forward run under torch.no_grad, or keep "
        "what it computed under it?",
    )
    torch.autograd.backward((output.float() * torch.randn(output.shape)).sum())


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers, those too that are in no state dict."""
    return {name: value.detach().clone() for name, value in [*module.named_parameters(), *module.named_buffers()]}
