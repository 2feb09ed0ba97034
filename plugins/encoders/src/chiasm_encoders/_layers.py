"""Selection of layers with the error that `Encoder.spec` promises."""

from __future__ import annotations

from chiasm.encoder import Layers, select_layers
from chiasm.errors import ConfigError


def chosen_layers(layers: Layers, depth: int) -> tuple[int, ...]:
    """The selected blocks as indices 1..depth, in the order asked.

    Raises:
        ConfigError: an index is out of range, or named twice.
    """
    try:
        return select_layers(layers, depth)
    except ValueError as error:
        raise ConfigError(f"layers: {error}") from None
