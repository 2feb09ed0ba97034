"""The checks that encoders, fusions, adapters and language models share, less those of training, moving and effects."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from chiasm.testing.check import Check
from chiasm.testing.common import check_quick, make_tiny, require, some
from chiasm.testing.effect_checks import effect_checks
from chiasm.testing.memory_checks import memory_checks
from chiasm.testing.moving_checks import moving_checks
from chiasm.testing.probe import Probe, check_close
from chiasm.testing.training_checks import training_checks

MOST_NUMBERS = 20_000_000
"""That `tiny()` may hold in its parameters and buffers."""


def module_checks(probe: Probe) -> tuple[Check, ...]:
    """All shared checks of one kind."""

    def tiny(cls: Any) -> None:
        """`tiny()` gives a small instance at once, in float32 on the CPU, with finite values."""
        check_quick(cls)
        module = make_tiny(cls)
        held = sum(t.numel() for t in [*module.parameters(), *module.buffers()] if not is_lazy(t))
        require(
            held <= MOST_NUMBERS,
            f"tiny() holds {held:,} numbers, wanted a small instance of {MOST_NUMBERS:,} at most: it is made dozens of "
            "times in a test",
        )
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            require(not is_lazy(tensor), f"{name} of tiny() has no shape before the first pass: state its size")
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
        memory = {p.data_ptr() for p in before.values() if p.numel()}
        shared = [n for n, p in other.named_parameters() if p.numel() and p.data_ptr() in memory]
        require(
            not shared or other is first,
            f"two instances share the memory of {some(shared)}: training one would change the other; make parameters "
            "in __init__, not in the class or the module",
        )
        for what, make in (("building", lambda seed: probe.rebuild(module, seed)), ("tiny()", lambda _: cls.tiny())):
            states = []
            for seed in (1, 2):
                torch.default_generator.manual_seed(seed)
                make(seed)
                states.append(torch.get_rng_state())
            require(
                not torch.equal(*states), f"{what} seeds torch's global generator; leave that to the caller (fork_rng)"
            )

    def deterministic(cls: Any) -> None:
        """In eval mode the same input gives the same output, whatever was run between."""
        module = make_tiny(cls).eval()
        inputs, others = probe.inputs(module, 2), probe.inputs(module, 2)
        first = probe(module, inputs)
        kept = first.detach().clone()
        check_close(
            probe(module, inputs),
            kept,
            "two passes of the same input in eval mode differ: is dropout or other noise active?",
        )
        probe(module, others)
        check_close(
            first,
            kept,
            "a later pass overwrites an earlier output: forward hands out a tensor that it keeps; return a new one",
            0.0,
        )
        check_close(
            probe(module, inputs),
            kept,
            "the same input in eval mode gives another output after other inputs: forward keeps something of them",
        )
        _check_fresh(probe, module)

    def batch_independence(cls: Any) -> None:
        """An item's output does not depend on the others in its batch, nor on their number and order."""
        module = make_tiny(cls).eval()
        inputs = probe.inputs(module, 3)
        together = probe(module, inputs)
        require(len(together) == 3, f"forward of 3 {probe.item}s returned a batch of {len(together)}")
        mixed = f"{probe.item}s are mixed; look for a reshape, a norm, a softmax or a mean over the batch axis"
        for i in range(3):
            alone = probe(module, tuple(item[i : i + 1] for item in inputs))
            check_close(
                together[i : i + 1],
                alone,
                f"{probe.item} {i} of a batch of 3 differs from the same {probe.item} alone: {mixed}",
            )
        order = [2, 0, 1, 0]
        check_close(
            probe(module, tuple(item[order] for item in inputs)),
            together[order],
            f"{probe.item}s in the order {order} differ from the same {probe.item}s in order: {mixed}",
        )
        if not probe.always_alone:
            return
        module.train()
        leaves = tuple(item.clone().requires_grad_() for item in inputs)
        first = probe(module, leaves, " in training mode")[0]
        if not first.requires_grad:
            return  # other checks tell
        gradients = torch.autograd.grad(first.float().sum(), leaves, allow_unused=True)
        crossed = max((float(g[1:].abs().max()) for g in gradients if g is not None), default=0.0)
        require(
            crossed == 0,
            f"in training mode {probe.item} 0 depends on the others of its batch (gradient {crossed:.2g}): "
            f"{probe.item}s are mixed; batch normalisation does that",
        )

    return (
        tiny,
        seeded,
        deterministic,
        batch_independence,
        *training_checks(probe),
        *moving_checks(probe),
        *effect_checks(probe),
        *memory_checks(probe),
    )


@torch.no_grad()
def _check_fresh(probe: Probe, module: nn.Module) -> None:
    """An instance that has run gives what one gives that has not, whatever memory its input lies in."""
    used, fresh = (probe.rebuild(module, 1).eval() for _ in range(2))
    own = used.state_dict()
    if any(name not in own or not torch.equal(own[name], value) for name, value in fresh.state_dict().items()):
        return  # `seeded` tells
    inputs, others = probe.inputs(module, 2), probe.inputs(module, 2)
    place = tuple(item.clone() for item in others)
    probe(used, place)
    for item, value in zip(place, inputs, strict=True):
        item.copy_(value)
    wanted = probe(fresh, inputs)
    keeps = "forward keeps something of them (a cache by shape, by address or by size?)"
    check_close(probe(used, place), wanted, f"an input in the memory of an earlier one gives another output: {keeps}")
    check_close(
        probe(used, inputs), wanted, f"after other inputs an instance gives another output than a new one: {keeps}"
    )
