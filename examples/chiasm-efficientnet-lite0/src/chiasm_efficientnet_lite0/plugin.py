"""What this distribution offers to Chiasm."""

from collections.abc import Iterator

from chiasm.plugin import Component, hookimpl


@hookimpl
def chiasm_components() -> Iterator[Component]:
    """One encoder."""
    target = "chiasm_efficientnet_lite0.encoder:EfficientNetLite0"
    yield Component("encoder", "efficientnet-lite0", target, "EfficientNet-Lite0, ImageNet weights from a package")
