"""The shared checks of what making and running a module must leave alone."""

from __future__ import annotations

from typing import Any

import torch

from chiasm.testing.check import Check
from chiasm.testing.common import make_tiny, require, some
from chiasm.testing.probe import Probe
from chiasm.testing.process import elsewhere, random_numbers_kept, random_states, seed_all, settings, settings_kept


def effect_checks(probe: Probe) -> tuple[Check, ...]:
    """The shared checks of side effects, for one kind."""

    def inputs_unchanged(cls: Any) -> None:
        """`forward` leaves its inputs as they were: features are kept and used again."""
        for mode in ("eval", "training"):
            module = make_tiny(cls).train(mode == "training")
            inputs = probe.inputs(module, 2)
            before = [item.clone() for item in inputs]
            probe(module, inputs, f" in {mode} mode")
            changed = [i for i, item in enumerate(inputs) if not torch.equal(item, before[i])]
            require(not changed, f"forward in {mode} mode changes its input {changed} in place: work on a new tensor")

    def fixed_tensors(cls: Any) -> None:
        """Its parameters and its state are there from the start: `forward` makes none and replaces none."""
        module = make_tiny(cls)
        before, keys = dict(module.named_parameters()), list(module.state_dict())
        for mode in (False, True):
            probe(module.train(mode), probe.inputs(module, 2))
        after = dict(module.named_parameters())
        new = [name for name, parameter in after.items() if before.get(name) is not parameter]
        new += [name for name in module.state_dict() if name not in keys]
        gone = [name for name in [*before, *keys] if name not in {*after, *module.state_dict()}]
        names = list(dict.fromkeys(new + gone))
        require(
            not names,
            f"forward makes or replaces {some(names)}: make every parameter and buffer in __init__; an optimiser holds "
            "those that were there before the first pass",
        )

    def no_side_effects(cls: Any) -> None:
        """It prints nothing, writes no file, keeps its configuration, and leaves settings and random numbers alone."""
        with elsewhere() as (printed, folder), settings_kept() as before_settings:
            module = make_tiny(cls)
            config = module.config.model_dump()
            probe(module.eval(), probe.inputs(module, 2))  # the first pass may import what draws numbers of its own
            inputs = probe.inputs(module, 2)
            with random_numbers_kept("forward in eval mode"):
                probe(module, inputs)
            before = random_states()
            ends = []
            for mode in (False, True):
                before_modes = {name: part.training for name, part in module.train(mode).named_modules()}
                probe(module, inputs)
                moved = [n or "the module" for n, p in module.named_modules() if before_modes.get(n) is not p.training]
                require(
                    not moved,
                    f"forward in {'training' if mode else 'eval'} mode puts {some(moved)} into "
                    f"{'eval' if mode else 'training'} mode: leave train() and eval() to the caller",
                )
            for seed in (1, 2):
                seed_all(seed)
                probe(module.train(), inputs)
                ends.append(random_states())
            seeded = [name for name in before if ends[0][name] == ends[1][name]]
            require(
                not seeded, f"forward in training mode seeds {some(seeded)}: every step would draw the same numbers"
            )
            require(module.config.model_dump() == config, "forward changes the configuration that it was made from")
            left = [name for name, value in settings().items() if value != before_settings[name]]
            require(not left, f"making and running it changes {some(left)} for the whole process")
            written = sorted(path.name for path in folder.iterdir())
            require(not written, f"making and running it writes {some(written)} into the working directory")
            text = printed.getvalue()
            require(
                not text, f"making and running it prints {text[:60]!r}: standard output is for results; use logging"
            )

    return inputs_unchanged, fixed_tensors, no_side_effects
