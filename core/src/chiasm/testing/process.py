"""What a whole process shares, that a component must leave alone: random numbers, settings, folder, output, network."""

from __future__ import annotations

import io
import os
import random
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import numpy as np
import torch

from chiasm.testing.errors import ContractError


@contextmanager
def random_numbers_kept(what: str) -> Iterator[None]:
    """Raises ContractError where what is inside draws or seeds numbers of a global generator."""
    seed_all(3)  # what seeds them would leave them as it did before
    before = random_states()
    yield
    after = random_states()
    changed = [name for name in before if before[name] != after[name]]
    if changed:
        raise ContractError(
            f"{what} draws or seeds {', '.join(changed)}: random numbers that are drawn after it, in training say, "
            "would be others"
        )


def random_states() -> dict[str, Any]:
    """The states of the global generators, comparable."""
    numbers: Any = np.random.get_state()
    return {
        "torch's generator": torch.get_rng_state().numpy().tobytes(),
        "Python's random": random.getstate(),
        "NumPy's random": (numbers[1].tobytes(), numbers[2]),
    }


def seed_all(seed: int) -> None:
    """Seeds the global generators of random numbers."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def settings() -> dict[str, Any]:
    """What torch and the process have set for everyone."""
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


@contextmanager
def settings_kept() -> Iterator[dict[str, Any]]:
    """Puts back what a component may have changed, so that the checks after it run as before."""
    before, states = settings(), (random.getstate(), np.random.get_state())
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


@contextmanager
def elsewhere() -> Iterator[tuple[io.StringIO, Path]]:
    """An empty working directory, and what is printed."""
    home, printed = Path.cwd(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            with redirect_stdout(printed):
                yield printed, Path(folder)
        finally:
            os.chdir(home)


@contextmanager
def offline() -> Iterator[list[str]]:
    """Refuses connections to other machines; gives a list that gets what was asked for."""
    asked: list[str] = []

    def refuse(*given: Any, **options: Any) -> NoReturn:
        asked.append(repr(next((item for item in given if not isinstance(item, socket.socket)), options)))
        raise OSError(f"no network in a check: {asked[-1]} was asked for")

    with (
        mock.patch.object(socket, "getaddrinfo", refuse),
        mock.patch.object(socket.socket, "connect", refuse),
        mock.patch.object(socket.socket, "connect_ex", refuse),
    ):
        yield asked
