"""The plugin module: light, and true to the classes that it names."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from chiasm.encoder import Encoder
from chiasm.registry import Registry

NAMES = ["blind", "clip", "dinov2", "dinov3", "internvit", "siglip", "timm"]
PRESETS = ["clip-l-336", "clip-bigg-224", "siglip-b-512", "siglip-so400m-384", "siglip2-b-512", "siglip2-so400m-384"]
PRESETS += ["internvit-300m-448", "internvit-6b-448", "dinov2-b", "dinov2-l", "dinov2-g"]
PRESETS += ["dinov2-b-reg", "dinov2-l-reg", "dinov2-g-reg", "dinov3-b", "dinov3-l"]


@pytest.fixture(scope="module")
def registry():
    return Registry([EntryPoint("encoders", "chiasm_encoders.plugin", "chiasm")])


def test_the_encoders_are_offered(registry):
    assert not registry.broken
    assert registry.names("encoder") == sorted(NAMES + PRESETS)
    assert all(item.component.summary for item in registry.all())


@pytest.mark.parametrize("name", NAMES + PRESETS)
def test_each_is_an_encoder_that_a_tiny_one_can_be_made_of(registry, name):
    encoder = registry.load("encoder", name).tiny()
    assert isinstance(encoder, Encoder)
    assert encoder.geometry == encoder.spec(encoder.config)
    again = encoder.Config.model_validate(encoder.config.model_dump(mode="json"))
    assert again == encoder.config


def test_listing_imports_nothing_heavy():
    code = (
        "import sys; from chiasm_encoders.plugin import chiasm_components as c; "
        f"assert len(list(c())) == {len(NAMES + PRESETS)}; "
        "print([m for m in ('torch', 'transformers', 'timm', 'numpy', 'PIL', 'pydantic') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
