"""The shared checks of what making and running a module must leave alone."""

from __future__ import annotations

import contextlib
import io
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chiasm.testing.check import Check
from chiasm.testing.common import make_tiny, require, some
from chiasm.testing.probe import Probe


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
        with _elsewhere() as (printed, folder), _settings_kept() as settings:
            module = make_tiny(cls)
            config = module.config.model_dump()
            probe(module.eval(), probe.inputs(module, 2))  # the first pass may import what draws numbers of its own
            inputs = probe.inputs(module, 2)
            _seed(3)
            before = _random_states()
            probe(module, inputs)
            after = _random_states()
            changed = [name for name in before if before[name] != after[name]]
            require(
                not changed,
                f"forward in eval mode draws or seeds {some(changed)}: an evaluation would change what training draws",
            )
            ends = []
            for seed in (1, 2):
                _seed(seed)
                probe(module.train(), inputs)
                ends.append(_random_states())
            seeded = [name for name in before if ends[0][name] == ends[1][name]]
            require(
                not seeded, f"forward in training mode seeds {some(seeded)}: every step would draw the same numbers"
            )
            require(module.config.model_dump() == config, "forward changes the configuration that it was made from")
            left = [name for name, value in _settings().items() if value != settings[name]]
            require(not left, f"making and running it changes {some(left)} for the whole process")
            written = sorted(path.name for path in folder.iterdir())
            require(not written, f"making and running it writes {some(written)} into the working directory")
            text = printed.getvalue()
            require(
                not text, f"making and running it prints {text[:60]!r}: standard output is for results; use logging"
            )

    return inputs_unchanged, fixed_tensors, no_side_effects


def _random_states() -> dict[str, Any]:
    numbers: Any = np.random.get_state()
    return {
        "torch's generator": torch.get_rng_state().numpy().tobytes(),
        "Python's random": random.getstate(),
        "NumPy's random": (numbers[1].tobytes(), numbers[2]),
    }


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def _settings() -> dict[str, Any]:
    return {
        "torch's gradient mode": torch.is_grad_enabled(),
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": torch.get_default_device(),
        "torch's deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "torch's matmul precision": torch.get_float32_matmul_precision(),
        "torch's number of threads": torch.get_num_threads(),
        "torch's autocast": torch.is_autocast_enabled("cpu"),
        "the working directory": str(Path.cwd()),
    }


@contextlib.contextmanager
def _settings_kept() -> Iterator[dict[str, Any]]:
    """Puts back what a component may have changed, so that the checks after it run as before."""
    before, states = _settings(), (random.getstate(), np.random.get_state())
    try:
        yield before
    finally:
        torch.set_grad_enabled(before["torch's gradient mode"])
        torch.set_default_dtype(before["torch's default dtype"])
        if torch.get_default_device() != before["torch's default device"]:
            torch.set_default_device(before["torch's default device"])
        torch.use_deterministic_algorithms(before["torch's deterministic algorithms"])
        torch.set_float32_matmul_precision(before["torch's matmul precision"])
        torch.set_num_threads(before["torch's number of threads"])
        torch.set_autocast_enabled("cpu", before["torch's autocast"])
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextlib.contextmanager
def _elsewhere() -> Iterator[tuple[io.StringIO, Path]]:
    """An empty working directory, and what is printed."""
    home, printed = Path.cwd(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            with contextlib.redirect_stdout(printed):
                yield printed, Path(folder)
        finally:
            os.chdir(home)
