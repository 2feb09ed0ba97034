"""What the checks of all kinds share."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from chiasm.errors import ChiasmError
from chiasm.settings import Settings
from chiasm.testing.check import describe
from chiasm.testing.errors import ContractError
from chiasm.testing.process import offline

T = TypeVar("T")

SLOW = 5.0
"""Seconds that `tiny()` may take; well under one is asked, but machines differ."""


def require(holds: bool, message: str) -> None:
    """Raises ContractError with the message unless the condition holds."""
    if not holds:
        raise ContractError(message)


@contextmanager
def calling(what: str) -> Iterator[None]:
    """Tells an exception of the component's own code as a broken promise: `what` raised it."""
    try:
        yield
    except ContractError:
        raise
    except Exception as error:
        raise ContractError(f"{what} raised {describe(error)}") from error


@contextmanager
def about(what: str) -> Iterator[None]:
    """Puts words before the message of a broken promise."""
    try:
        yield
    except ContractError as error:
        raise ContractError(f"{what}{error}") from error.__cause__


def make_tiny(cls: type[T]) -> T:
    """A tiny instance of a component class."""
    with calling(f"{cls.__name__}.tiny()"):
        made: T = cls.tiny()  # type: ignore[attr-defined]
    require(isinstance(made, cls), f"tiny() returned a {type(made).__name__}, wanted a {cls.__name__}")
    return made


def check_quick(cls: type) -> None:
    """Makes a tiny instance against the clock, the best of a few attempts as the machine may be busy, and offline."""
    best = SLOW
    for _ in range(3):
        start = time.perf_counter()
        with offline() as asked:
            try:
                make_tiny(cls)
            finally:  # an attempt whose failure is swallowed waits for the network wherever there is one
                if asked:
                    raise ContractError(
                        f"tiny() asks the network for {asked[0]}; wanted no download: choose a small geometry and "
                        "random weights"
                    )
        best = min(best, time.perf_counter() - start)
        if best < SLOW:
            return
    raise ContractError(f"tiny() took over {SLOW:g} s, wanted well under one second: choose a smaller geometry")


def check_config(cls: Any, base: type[Settings], config: Any) -> None:
    """`Config` is a frozen model of the right base that refuses unknown fields, and survives JSON and YAML.

    Args:
        cls: the component class.
        base: what its `Config` subclasses.
        config: the configuration of a tiny instance.
    """
    require(
        isinstance(cls.Config, type) and issubclass(cls.Config, base),
        f"{cls.__name__}.Config is {cls.Config!r}, wanted a subclass of {base.__module__}.{base.__name__}",
    )
    require(
        isinstance(config, cls.Config),
        f"tiny().config is a {type(config).__name__}, wanted a {cls.Config.__name__}: pass it to super().__init__",
    )
    name, settings = cls.Config.__name__, cls.Config.model_config
    require(settings.get("frozen") is True, f"{name} can be changed after it was made; wanted model_config frozen=True")
    require(
        settings.get("extra") == "forbid",
        f"{name} takes unknown fields (extra={settings.get('extra')!r}), so a misspelt option would be ignored; "
        "wanted model_config extra='forbid'",
    )
    for chosen_only in (False, True):  # a run's file holds what was chosen, a manifest holds all
        with calling(f"{name}.model_dump_json()"):
            text = config.model_dump_json(exclude_unset=chosen_only)
        try:
            back = cls.Config.model_validate_json(text)
        except ValidationError as error:
            raise ContractError(f"{name} does not read what it wrote, {text}: {error}") from error
        require(back == config, f"{name} is {back!r} after a round trip through JSON, was {config!r}")
        with calling(f"writing {name} as YAML and reading it"):
            again = cls.Config.model_validate(yaml.safe_load(yaml.safe_dump(json.loads(text))))
        require(again == config, f"{name} is {again!r} after a round trip through YAML, was {config!r}")


def check_missing_checkpoint(cls: Any) -> None:
    """A class with `Config.pretrained`, `spec` and `build` refuses a checkpoint that does not exist."""
    with tempfile.TemporaryDirectory() as folder:
        absent = str(Path(folder) / "no-such-checkpoint")
        try:
            config = cls.Config.model_validate({"pretrained": absent})
            cls.spec(config)
            cls.build(config)
        except (ChiasmError, ValidationError) as error:
            require("no-such-checkpoint" in str(error), f"the error for a missing checkpoint does not name it: {error}")
            return
        except Exception as error:
            raise ContractError(f"a missing checkpoint raised {describe(error)}; wanted a CheckpointError") from error
    raise ContractError(
        "pretrained: a folder that does not exist is accepted, so a run would train on random weights; load it, or "
        "refuse it in Config with `pretrained: None = None`"
    )


def some(names: Sequence[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
