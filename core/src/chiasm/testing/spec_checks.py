"""What every kind promises of `spec`: it costs nothing, and whatever the options it agrees with the instance."""

from __future__ import annotations

import contextlib
import types
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chiasm.errors import ChiasmError
from chiasm.settings import Settings
from chiasm.testing.check import describe
from chiasm.testing.common import calling, require
from chiasm.testing.errors import ContractError

MOST_VARIANTS = 40
"""Changed options that are tried."""

MOST_PARAMETERS = 2_000_000
"""Of a variant that is made: an option may ask for a model of full size."""

_APART = frozenset({"pretrained", "layers"})
"""Fields that have checks of their own."""

T = TypeVar("T")


def cheap_spec(spec: Callable[[], T], parameters: int) -> T:
    """Calls `spec`; raises ContractError where it makes weights.

    Args:
        spec: the call.
        parameters: of the instance that it describes.
    """
    before = torch.get_rng_state()
    with calling("spec"), _Made() as made:
        stated = spec()
    require(
        torch.equal(torch.get_rng_state(), before),
        "spec draws random numbers: it seems to make weights; make them under torch.device('meta')",
    )
    require(
        made.numbers < max(50, 0.9 * parameters),
        f"spec makes tensors of {made.numbers} numbers, an instance has {parameters} parameters: it seems to make "
        "weights; make them under torch.device('meta')",
    )
    return stated


class _Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the numbers in tensors with data that are made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        known = {id(item) for item in tree_leaves((args, kwargs)) if isinstance(item, Tensor)}
        fresh = [item for item in tree_leaves(made) if isinstance(item, Tensor) and id(item) not in known]
        # what shares its memory with another is a view
        self.numbers += sum(i.numel() for i in fresh if i.device.type != "meta" and not i._is_view())
        return made


def check_options(module: Any, attempt: Callable[[Any, str], None]) -> None:
    """Tries the options of a tiny instance one by one.

    Args:
        module: a tiny instance.
        attempt: states the spec of a configuration, makes its instance where that is small, and raises ContractError
            where they disagree; the second argument begins its messages. What the spec refuses is no fault.
    """
    for count, (name, value, offered, config) in enumerate(variants(module.config)):
        if count == MOST_VARIANTS:
            return
        when = f"with {name} = {value!r} "
        try:
            attempt(config, when)
        except (ChiasmError, ImportError):  # refused, or it needs what is not installed here
            continue
        except Exception as error:
            crashed = not isinstance(error, ContractError) or error.__cause__ is not None
            if crashed and not offered:
                continue  # an arbitrary number need not work; a choice that is offered must
            text = str(error) if isinstance(error, ContractError) else f"its spec is stated, then {describe(error)}"
            raise ContractError(text if text.startswith(when) else when + text) from error


def accepted(spec: Callable[[], T], when: str) -> T:
    """The spec of a variant.

    Raises:
        ChiasmError: it is refused.
        ContractError: it is refused by an exception of the wrong kind.
    """
    try:
        return spec()
    except ChiasmError:
        raise
    except ValueError as error:
        raise ChiasmError(str(error)) from error
    except Exception as error:
        raise ContractError(f"{when}spec raised {describe(error)}; wanted a ConfigError") from error


def count_parameters(make: Callable[[], nn.Module]) -> int:
    """Parameters of a module, made without data."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make().parameters())


def variants(config: Settings) -> Iterator[tuple[str, Any, bool, Settings]]:
    """Configurations that differ from one in one option, and are valid: the option, its value, and if that is offered
    by its type rather than made up here."""
    given = config.model_dump(exclude_unset=True)
    for name, value, offered, change in _changes(config):
        try:
            changed = type(config).model_validate(given | change)
        except ValidationError:
            continue
        if changed != config:
            yield name, value, offered, changed


def _changes(config: Settings) -> Iterator[tuple[str, Any, bool, dict[str, Any]]]:
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if name in _APART:
            continue
        if isinstance(value, Settings):
            for inner, other, offered, change in _changes(value):
                yield f"{name}.{inner}", other, offered, {name: value.model_dump(exclude_unset=True) | change}
        else:
            for other, offered in _others(field.annotation, value):
                yield name, other, offered, {name: other}


def _others(annotation: Any, value: Any) -> Iterator[tuple[Any, bool]]:
    """Other values of an option, by its type, and if its type offers them one by one."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        yield from _others(arguments[0], value)
    elif origin in (typing.Union, types.UnionType):
        for argument in arguments:
            yield from _others(argument, value)
    elif origin is Literal:
        yield from ((choice, True) for choice in arguments if choice != value)
    elif annotation is bool:
        yield from ((choice, True) for choice in (True, False) if choice is not value)
    elif annotation is type(None):
        yield None, False
    elif value is None and isinstance(annotation, type) and issubclass(annotation, Settings):
        with contextlib.suppress(ValidationError):  # some have a field without a default
            yield annotation(), False
    elif annotation is int:
        known = isinstance(value, int) and not isinstance(value, bool)
        # an odd one too, which patches and heads may not divide
        yield from ((other, False) for other in ((2 * value, value // 2, value + 1) if known else (4,)) if other)
    elif origin is tuple and isinstance(value, tuple) and len(value) == 2 and all(type(i) is int for i in value):
        yield (value[0], 2 * value[1]), False
        yield (2 * value[0], value[1]), False
