"""Random weights, and what `spec` knows without any."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from chiasm_encoders.clip import ClipEncoder
from chiasm_encoders.dinov2 import Dinov2Encoder
from chiasm_encoders.dinov3 import Dinov3Encoder
from chiasm_encoders.internvit import InternVitEncoder
from chiasm_encoders.siglip import SiglipEncoder

ENCODERS = [ClipEncoder, SiglipEncoder, Dinov2Encoder, Dinov3Encoder, InternVitEncoder]
SHAPE = {"image_size": 32, "patch_size": 8, "width": 48, "depth": 4, "heads": 3, "mlp_width": 96}

each_encoder = pytest.mark.parametrize("encoder", ENCODERS, ids=lambda cls: cls.__name__)


@each_encoder
def test_tiny_is_what_it_says(encoder):
    tiny = encoder.tiny()
    with torch.no_grad():
        features = tiny(tiny.preprocess([]).new_zeros(2, 3, 16, 16))
    assert features.spec == tiny.geometry.features
    assert features.tokens.isfinite().all()


@each_encoder
def test_shape_is_the_geometry(encoder):
    spec = encoder.spec(encoder.Config.model_validate({"shape": SHAPE, "layers": -2}))
    assert (spec.image.height, spec.image.width) == (32, 32)
    assert (spec.grid, spec.width, spec.depth) == ((4, 4), 48, 4)


@pytest.mark.parametrize(
    ("encoder", "size", "grid", "width", "depth", "millions"),
    [
        (ClipEncoder, 336, 24, 1024, 24, 303.5),
        (SiglipEncoder, 512, 32, 768, 12, 86.4),
        (Dinov2Encoder, 518, 37, 1024, 24, 304.4),
        (Dinov3Encoder, 224, 14, 1024, 24, 303.1),
        (InternVitEncoder, 448, 32, 3200, 45, 5536.5),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_defaults_are_the_published_geometry(encoder, size, grid, width, depth, millions):
    spec = encoder.spec(encoder.Config())
    assert (spec.image.height, spec.image.width) == (size, size)
    assert (spec.grid, spec.width, spec.depth) == ((grid, grid), width, depth)
    assert spec.parameters / 1e6 == pytest.approx(millions, rel=2e-3)


@each_encoder
@pytest.mark.parametrize("layers", [-1, 2])
def test_flops_are_those_that_torch_counts(encoder, layers):
    config = encoder.Config.model_validate({"shape": SHAPE, "layers": layers})
    _assert_flops(encoder.build(config), 32)


@pytest.mark.parametrize("name", ["dinov2-registers", "dinov2-swiglu", "dinov3-gated"])
def test_flops_of_other_architectures(checkpoints, name):
    _assert_flops(checkpoints(name).build(), 16)


def _assert_flops(encoder, size):
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:  # torch does not count its fused CPU attention
        encoder(torch.zeros(1, 3, size, size))
    assert encoder.geometry.flops == pytest.approx(counter.get_total_flops(), rel=0.02)


@each_encoder
def test_weights_come_from_the_generator_and_not_from_the_layers(encoder):
    def build(layers):
        torch.manual_seed(7)
        return encoder.build(encoder.Config.model_validate({"shape": SHAPE, "layers": layers})).state_dict()

    whole, part = build(-1), build(-3)
    assert len(part) < len(whole)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in part.items())


@each_encoder
def test_spec_draws_nothing(encoder):
    before = torch.get_rng_state()
    encoder.spec(encoder.Config.model_validate({"shape": SHAPE}))
    assert torch.equal(before, torch.get_rng_state())


def test_registers_are_removed():
    encoder = Dinov2Encoder.build(Dinov2Encoder.Config.model_validate({"shape": {**SHAPE, "registers": 5}}))
    assert encoder.prefix == 6
    with torch.no_grad():
        assert encoder(torch.zeros(1, 3, 32, 32)).tokens.shape == (1, 1, 16, 48)


@pytest.mark.parametrize(
    ("encoder", "change", "message"),
    [
        (ClipEncoder, {"patch_size": 7}, "image_size 32 is not a multiple of patch_size 7"),
        (SiglipEncoder, {"heads": 5}, "width 48 is not a multiple of heads 5"),
        (Dinov2Encoder, {"mlp_width": 100}, "mlp_width 100 is not a multiple of width 48"),
        (Dinov3Encoder, {"heads": 8}, "width 48 over 8 heads gives each 6 channels; wanted a multiple of 4"),
        (InternVitEncoder, {"depth": 0}, "greater than 0"),
        (ClipEncoder, {"registers": 1}, "Extra inputs"),
    ],
    ids=str,
)
def test_an_impossible_shape_is_refused(encoder, change, message):
    with pytest.raises(ValidationError, match=message):
        encoder.Config.model_validate({"shape": {**SHAPE, **change}})


@each_encoder
def test_shape_beside_pretrained_is_refused(encoder):
    with pytest.raises(ValidationError, match="not both"):
        encoder.Config.model_validate({"pretrained": "someone/something", "shape": SHAPE})
