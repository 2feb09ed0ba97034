"""What a plugin module needs: `from chiasm.plugin import Component, hookimpl`.

Light: it imports neither torch nor pydantic.
"""

import pluggy

from chiasm.component import Component, Kind

hookimpl = pluggy.HookimplMarker("chiasm")
"""Marks a function of a plugin module as the implementation of the hook of the same name."""

__all__ = ["Component", "Kind", "hookimpl"]
