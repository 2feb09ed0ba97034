"""The plugin module: light, and true to the classes that it names."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from chiasm.encoder import Encoder
from chiasm.registry import Registry

NAMES = ["blind", "clip", "dinov2", "dinov3", "internvit", "siglip", "timm"]


@pytest.fixture(scope="module")
def registry():
    return Registry([EntryPoint("encoders", "chiasm_encoders.plugin", "chiasm")])


def test_the_encoders_are_offered(registry):
    assert not registry.broken
    assert registry.names("encoder") == NAMES
    assert all(item.component.summary for item in registry.all())


@pytest.mark.parametrize("name", NAMES)
def test_each_is_an_encoder_that_a_tiny_one_can_be_made_of(registry, name):
    encoder = registry.load("encoder", name).tiny()
    assert isinstance(encoder, Encoder)
    assert encoder.geometry == encoder.spec(encoder.config)
    again = encoder.Config.model_validate(encoder.config.model_dump(mode="json"))
    assert again == encoder.config


def test_listing_imports_nothing_heavy():
    code = (
        "import sys; from chiasm_encoders.plugin import chiasm_components as c; "
        f"assert len(list(c())) == {len(NAMES)}; "
        "print([m for m in ('torch', 'transformers', 'timm', 'numpy', 'PIL', 'pydantic') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
