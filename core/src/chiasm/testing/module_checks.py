"""The checks that encoders, fusions, adapters and language models share: each is a module that maps a batch to tensors.

Shape letters: B items of a batch.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from chiasm.testing.check import Check
from chiasm.testing.common import calling, check_quick, make_tiny, require, some

Inputs = tuple[Tensor, ...]

TOLERANCE = 1e-5
"""Of float32 results that must be equal, as a share of the largest value: sums may run in another order."""


class Probe(ABC):
    """How the shared checks handle the modules of one kind."""

    item: ClassVar[str]
    """What a batch holds, for messages."""
    always_alone: ClassVar[bool] = True
    """Whether items are kept apart in training mode too."""

    @abstractmethod
    def rebuild(self, module: Any, seed: int) -> nn.Module:
        """Another module of the same configuration and geometry, its random weights drawn from a seed."""

    @abstractmethod
    def inputs(self, module: Any, batch: int) -> Inputs:
        """Random inputs, each `[B, ...]`."""

    @abstractmethod
    def run(self, module: Any, inputs: Inputs) -> Tensor:
        """One forward pass to `[B, ...]`."""


def module_checks(probe: Probe) -> tuple[Check, ...]:
    """The shared checks of one kind."""

    def run(module: nn.Module, inputs: Inputs, when: str = "") -> Tensor:
        with calling(f"forward{when}"):
            return probe.run(module, inputs)

    def tiny(cls: Any) -> None:
        """`tiny()` gives a small instance at once, in float32 on the CPU, with finite values."""
        check_quick(cls)
        module = make_tiny(cls)
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            require(tensor.device.type == "cpu", f"{name} of tiny() is on {tensor.device}, wanted the CPU")
            if tensor.is_floating_point():
                require(tensor.dtype == torch.float32, f"{name} of tiny() is {tensor.dtype}, wanted torch.float32")
                require(bool(tensor.isfinite().all()), f"{name} of tiny() holds NaN or infinity; is it initialised?")

    def seeded(cls: Any) -> None:
        """Random weights come from torch's global generator alone, which is left unseeded."""
        module = make_tiny(cls)
        first, again, other = (probe.rebuild(module, seed) for seed in (1, 1, 2))
        before = dict(first.named_parameters())
        unlike = [n for n, p in again.named_parameters() if n not in before or not torch.equal(p, before[n])]
        require(
            not unlike,
            f"two builds from the same seed differ in {some(unlike)}: draw weights from torch's global generator, "
            "and leave none uninitialised",
        )
        drawn = [name for name, parameter in before.items() if len(set(parameter.flatten()[:64].tolist())) > 8]
        same = [n for n, p in other.named_parameters() if n in before and torch.equal(p, before[n])]
        require(
            not drawn or len(same) < len(before),
            f"two builds from different seeds hold the same {some(drawn)}: all seeds of a study would be one; "
            "do not seed within build",
        )
        states = []
        for seed in (1, 2):
            probe.rebuild(module, seed)
            states.append(torch.get_rng_state())
        require(
            not torch.equal(*states), "building seeds torch's global generator; leave that to the caller (fork_rng)"
        )

    def deterministic(cls: Any) -> None:
        """In eval mode the same input gives the same output."""
        module = make_tiny(cls).eval()
        inputs = probe.inputs(module, 2)
        check_close(
            run(module, inputs),
            run(module, inputs),
            "two passes of the same input in eval mode differ: is dropout or other noise active?",
        )

    def batch_independence(cls: Any) -> None:
        """An item's output does not depend on the others in its batch."""
        module = make_tiny(cls).eval()
        inputs = probe.inputs(module, 3)
        together = run(module, inputs)
        require(len(together) == 3, f"forward of 3 {probe.item}s returned a batch of {len(together)}")
        for i in range(3):
            alone = run(module, tuple(item[i : i + 1] for item in inputs))
            check_close(
                together[i : i + 1],
                alone,
                f"{probe.item} {i} of a batch of 3 differs from the same {probe.item} alone: "
                f"{probe.item}s are mixed; look for a reshape, a norm or a mean over the batch axis",
            )
        if not probe.always_alone:
            return
        module.train()
        leaves = tuple(item.clone().requires_grad_() for item in inputs)
        first = run(module, leaves, " in training mode")[0]
        gradients = torch.autograd.grad(first.float().sum(), leaves, allow_unused=True)
        crossed = max((float(g[1:].abs().max()) for g in gradients if g is not None), default=0.0)
        require(
            crossed == 0,
            f"in training mode {probe.item} 0 depends on the others of its batch (gradient {crossed:.2g}): "
            f"{probe.item}s are mixed; batch normalisation does that",
        )

    def frozen(cls: Any) -> None:
        """What is frozen asks for no gradient, and after `eval()` nothing is in training mode or changes."""
        module = make_tiny(cls).requires_grad_(False).train().eval()
        training = [name or "the module" for name, part in module.named_modules() if part.training]
        require(not training, f"after eval() still in training mode: {some(training)}")
        before = {name: value.clone() for name, value in module.state_dict().items()}
        output = run(module, probe.inputs(module, 2), " of a frozen module")
        require(
            not output.requires_grad,
            "frozen by requires_grad_(False), its output still requires a gradient: "
            "some tensor is no registered parameter, or forward sets requires_grad",
        )
        changed = [name for name, value in module.state_dict().items() if not torch.equal(value, before[name])]
        require(not changed, f"a forward pass in eval mode changed {some(changed)}")

    def gradients(cls: Any) -> None:
        """When trained, a gradient reaches every parameter."""
        module = make_tiny(cls).train().requires_grad_(True)
        if next(module.parameters(), None) is None:
            return
        output = run(module, probe.inputs(module, 2), " in training mode")
        require(
            output.requires_grad,
            "every parameter requires a gradient and the output does not: does forward run under torch.no_grad?",
        )
        torch.autograd.backward((output.float() * torch.randn(output.shape)).sum())
        unreached = [name for name, parameter in module.named_parameters() if parameter.grad is None]
        require(
            not unreached,
            f"no gradient reaches {some(unreached)}: leave out what the output does not need, "
            "such as blocks behind the last selected layer",
        )
        sizes = {name: float(p.grad.abs().max()) for name, p in module.named_parameters() if p.grad is not None}
        wild = [name for name, size in sizes.items() if not torch.tensor(size).isfinite()]
        require(not wild, f"the gradient of {some(wild)} is not finite")
        require(any(sizes.values()), "the gradients of all parameters are zero")

    def state(cls: Any) -> None:
        """Saved as safetensors and loaded into another instance, everything that matters is there."""
        module = make_tiny(cls)
        source, target = probe.rebuild(module, 1), probe.rebuild(module, 2)
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        if source.state_dict():
            with tempfile.TemporaryDirectory() as folder:
                file = str(Path(folder) / "part.safetensors")
                with calling("saving it with safetensors.torch.save_model"):
                    save_model(source, file)
                with calling("loading it with safetensors.torch.load_model"):
                    load_model(target, file, strict=True)
        inputs = probe.inputs(module, 2)
        check_close(
            run(target.eval(), inputs),
            run(source.eval(), inputs),
            "another instance with the same state dict gives another output: some tensor that matters is neither a "
            "parameter nor a persistent buffer",
        )

    def bfloat16(cls: Any) -> None:
        """Moved to bfloat16, or under autocast, the output is about the same."""
        module = make_tiny(cls).eval()
        inputs = probe.inputs(module, 2)
        with torch.no_grad():
            exact = run(module, inputs).float()
            with torch.autocast("cpu", torch.bfloat16):
                _check_about(run(module, inputs, " under bfloat16 autocast"), exact, "under bfloat16 autocast")
            module.to(torch.bfloat16)
            moved = tuple(item.to(torch.bfloat16) if item.is_floating_point() else item for item in inputs)
            _check_about(run(module, moved, " in bfloat16"), exact, "in bfloat16")

    return tiny, seeded, deterministic, batch_independence, frozen, gradients, state, bfloat16


def check_close(found: Tensor, wanted: Tensor, message: str, tolerance: float = TOLERANCE) -> None:
    """Raises ContractError where two tensors differ by more than rounding; the message gets the difference."""
    require(found.shape == wanted.shape, f"{message} (shapes {tuple(found.shape)} and {tuple(wanted.shape)})")
    if not found.numel():
        return
    scale = max(1.0, float(wanted.detach().abs().max()))
    difference = float((found.detach().float() - wanted.detach().float()).abs().max())
    # written so that NaN fails
    require(difference <= tolerance * scale, f"{message} (by {difference:.2g}, allowed {tolerance * scale:.2g})")


def _check_about(found: Tensor, exact: Tensor, when: str) -> None:
    require(
        found.dtype in (torch.bfloat16, torch.float32),
        f"forward {when} returned {found.dtype}, wanted torch.bfloat16 or torch.float32",
    )
    error = float((found.float() - exact).norm() / exact.norm().clamp(min=1e-12))
    require(error < 0.1, f"forward {when} is off by {error:.2g} of the float32 output's norm, allowed 0.1")
