"""The errors that chiasm raises for its users.

Every message says what was given, what was wanted and what to do. The command line prints them without a
traceback; any other exception is a defect of chiasm or of a plugin and keeps its traceback.
"""

from __future__ import annotations


class ChiasmError(Exception):
    """Base of all errors that a user can cause and mend."""


class ConfigError(ChiasmError, ValueError):
    """A configuration has an unknown field, a wrong type or a value out of range."""


class CombinationError(ConfigError):
    """Parts that are each valid do not fit together, say grids that differ."""


class PluginError(ChiasmError):
    """A plugin cannot be imported or does not keep its interface."""


class UnknownComponentError(PluginError, LookupError):
    """No installed component has the asked kind and name."""


class DuplicateComponentError(PluginError):
    """Two distributions own the same kind and name."""


class CheckpointError(ChiasmError, OSError):
    """Weights are missing, unreadable or of another architecture."""


class DataError(ChiasmError, ValueError):
    """A data set is missing, empty or has an unreadable sample."""
