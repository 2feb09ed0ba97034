"""What the parts of a model have in common as modules."""

from __future__ import annotations

from typing import Any

from torch import nn


class PartModule(nn.Module):
    """A module that takes no submodule or parameter under a name that its interface uses.

    torch finds submodules only where a class has no attribute of that name: one that is hidden would be held, saved
    and counted, and never run.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module | nn.Parameter) and hasattr(type(self), name):
            raise AttributeError(
                f"{type(self).__name__}: a {type(value).__name__} named {name!r} would be hidden by "
                f"{type(self).__name__}.{name}, which the interface uses; name it otherwise"
            )
        super().__setattr__(name, value)
