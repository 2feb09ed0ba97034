"""The shared checks of moving a module: to a file and back, to another dtype, to another device."""

from __future__ import annotations

import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chiasm.testing.check import Check, place
from chiasm.testing.common import calling, make_tiny, require, some
from chiasm.testing.errors import ContractError
from chiasm.testing.probe import Probe, check_close

_MIXES = ("aten::copy_", "aten::_to_copy", "aten::index.", "aten::index_put", "aten::_index_put", "aten::_unsafe_index")
"""Operations that take tensors of two devices: copies, and indices."""


def moving_checks(probe: Probe) -> tuple[Check, ...]:
    """The shared checks of moving, for one kind."""

    def state(cls: Any) -> None:
        """Saved as safetensors and loaded into another instance, everything that matters is there."""
        module = make_tiny(cls)
        source, target = probe.rebuild(module, 1), probe.rebuild(module, 2)
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        inputs = probe.inputs(module, 2)
        probe(target.eval(), inputs)  # what it may keep of its old weights must not outlive them
        others = [name for name, value in source.state_dict().items() if not isinstance(value, Tensor)]
        require(not others, f"the state dict holds {some(others)}, which are no tensors; a file holds tensors only")
        if source.state_dict():
            with tempfile.TemporaryDirectory() as folder:
                file = str(Path(folder) / "part.safetensors")
                with calling("saving it with safetensors.torch.save_model"):
                    save_model(source, file)
                with calling("loading it with safetensors.torch.load_model"):
                    load_model(target, file, strict=True)
        check_close(
            probe(target.eval(), inputs),
            probe(source.eval(), inputs),
            "another instance with the same state dict gives another output: some tensor that matters is neither a "
            "parameter nor a persistent buffer, or what was computed from old weights is kept",
        )

    def bfloat16(cls: Any) -> None:
        """Moved to bfloat16, it gives about the same in bfloat16; under autocast too."""
        module = make_tiny(cls).eval()
        inputs = probe.inputs(module, 2)
        with torch.no_grad():
            exact = probe(module, inputs).float()
            with torch.autocast("cpu", torch.bfloat16):
                _check_about(probe(module, inputs, " under bfloat16 autocast"), exact, "under bfloat16 autocast")
            module.to(torch.bfloat16)
            fixed = [name for name, p in module.named_parameters() if p.dtype != torch.bfloat16]
            require(not fixed, f"moved to bfloat16, {some(fixed)} is still of another dtype")
            moved = tuple(item.to(torch.bfloat16) if item.is_floating_point() else item for item in inputs)
            found = probe(module, moved, " in bfloat16")
            _check_about(found, exact, "in bfloat16")
        require(
            found.dtype == torch.bfloat16 or not probe.keeps_dtype,
            f"moved to bfloat16, forward of bfloat16 returned {found.dtype}: the next part would get another dtype "
            "than its weights have, and twice the memory; end in the dtype of the weights or of the input",
        )

    def device(cls: Any) -> None:
        """Moved to another device, everything it needs moves along, and what `forward` makes is made there."""
        module = make_tiny(cls).eval()
        inputs = tuple(item.to("meta") for item in probe.inputs(module, 2))  # a device that every machine has
        with calling("to('meta')"):
            module.to("meta")
        tensors = [*module.named_parameters(), *module.named_buffers()]
        left = [name for name, tensor in tensors if tensor.device.type != "meta"]
        require(not left, f"moved to another device, {some(left)} stayed on the CPU")
        try:
            with torch.no_grad(), _Devices():  # type: ignore[no-untyped-call]
                output = probe.run(module, inputs)
        except ContractError:
            raise
        except Exception:  # what looks at values cannot run without any; nothing more can be said of it here
            return
        require(
            output.device.type == "meta",
            f"moved to another device with its input, forward returned a tensor on {output.device}: name no device",
        )

    def precision(cls: Any) -> None:
        """In float32 every step is computed in float32, and nothing is rounded to half of it on the way."""
        module = make_tiny(cls).eval()
        inputs = probe.inputs(module, 2)
        if any(item.is_floating_point() and item.dtype != torch.float32 for item in module.parameters()):
            return  # `tiny` tells
        with torch.no_grad(), _Halves():  # type: ignore[no-untyped-call]
            probe(module, inputs)

    return state, bfloat16, device, precision


class _Halves(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses to make numbers of 16 bits and fewer."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for item in tree_leaves(made):
            if isinstance(item, Tensor) and item.is_floating_point() and item.dtype.itemsize < 4:
                raise ContractError(
                    f"in float32, forward computes {func.name().removeprefix('aten::')} in {item.dtype}"
                    f"{place(traceback.extract_stack())}: three digits of the result are left; compute in the dtype of "
                    "the weights"
                )
        return made


class _Devices(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses operations on tensors of two devices, as a GPU would; the meta device itself lets many pass."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name()
        tensors = [item for item in tree_leaves((args, kwargs)) if isinstance(item, Tensor)]
        here = [item for item in tensors if item.device.type != "meta" and item.ndim]  # numbers may be anywhere
        moved = [item for item in tensors if item.device.type == "meta" and item.ndim]
        if name == "aten::_to_copy" and moved and str(kwargs.get("device") or "meta") != "meta":
            return torch.zeros(moved[0].shape, dtype=kwargs.get("dtype") or moved[0].dtype)
        if here and moved and not name.startswith(_MIXES):
            raise _two_devices(name, here[0])
        return func(*args, **kwargs)


def _two_devices(name: str, tensor: Tensor) -> ContractError:
    where = place(traceback.extract_stack())
    return ContractError(
        f"moved to another device with its input, forward gives {name.removeprefix('aten::')} a tensor of shape "
        f"{tuple(tensor.shape)} that is on the CPU{where}: register it as a parameter or buffer, or make it on the "
        "device of the input"
    )


def _check_about(found: Tensor, exact: Tensor, when: str) -> None:
    require(
        found.dtype in (torch.bfloat16, torch.float32),
        f"forward {when} returned {found.dtype}, wanted torch.bfloat16 or torch.float32",
    )
    error = float((found.float() - exact).norm() / exact.norm().clamp(min=1e-12))
    require(error < 0.1, f"forward {when} is off by {error:.2g} of the float32 output's norm, allowed 0.1")
