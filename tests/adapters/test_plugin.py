"""What the plugin announces, and that announcing it is light."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
import torch

from chiasm.features import Features, TokenSequence
from chiasm.registry import Registry

NAMES = {
    "fusion": [
        "additive",
        "concat_channels",
        "concat_tokens",
        "cross_attention",
        "interleave",
        "layer_scale",
        "project_attention",
        "project_sum",
        "single",
        "sva",
    ],
    "adapter": [
        "avg_pool",
        "c_abstractor",
        "identity",
        "linear",
        "mlp",
        "pixel_shuffle",
        "qformer",
        "resampler",
        "token_packer",
        "transformer",
    ],
}


@pytest.fixture(scope="module")
def registry():
    return Registry([EntryPoint("adapters", "chiasm_adapters.plugin", "chiasm")])


def test_the_listing_imports_nothing_heavy():
    code = (
        "import sys; from chiasm_adapters import plugin; list(plugin.chiasm_components());"
        "print(sorted({'torch', 'pydantic', 'numpy', 'timm', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("kind", NAMES)
def test_everything_announced_loads_and_every_option_is_described(registry, kind):
    assert registry.broken == {}
    assert registry.names(kind) == NAMES[kind]
    for name in NAMES[kind]:
        assert registry.get(kind, name).component.summary
        cls = registry.load(kind, name)
        cls.Config()  # every option has a default
        undescribed = [key for key, field in cls.Config.model_fields.items() if not field.description]
        assert undescribed == []
        assert cls.Config.model_validate(cls.tiny().config.model_dump(mode="json")) == cls.tiny().config


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in NAMES for name in NAMES[kind]])
def test_a_batch_of_no_image_gives_no_tokens_and_a_gradient_of_zero(registry, kind, name, dtype):
    """A worker whose samples are text alone waits for none that has images, and the reverse."""
    part = registry.load(kind, name).tiny().to(dtype)
    if kind == "fusion":
        out = part([Features(torch.zeros(0, s.layers, s.tokens, s.width, dtype=dtype), s.grid) for s in part.features])
    else:
        spec = part.sequence
        out = part(TokenSequence(torch.zeros(0, spec.tokens, spec.width, dtype=dtype), spec.grid))
    assert (out.tokens.shape, out.tokens.dtype) == ((0, part.out.tokens, part.out.width), dtype)
    assert out.spec == part.out
    parameters = dict(part.named_parameters())
    if parameters:
        out.tokens.sum().backward()
    assert {
        key: None if p.grad is None else p.grad.abs().max().item() for key, p in parameters.items()
    } == dict.fromkeys(parameters, 0)
