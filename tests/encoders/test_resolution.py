"""Another resolution: position embeddings are interpolated, and the rest is as it was."""

from __future__ import annotations

import inspect
import json

import pytest
import torch

from chiasm.errors import ConfigError
from chiasm_encoders.siglip import SiglipEncoder

SIZES = [32, 24, 12]


def _reference(checkpoint, pixels):
    """Transformers' hidden states of pixels of any size, less the prefix tokens."""
    options = {"output_hidden_states": True}
    if "interpolate_pos_encoding" in inspect.signature(checkpoint.reference.embeddings.forward).parameters:
        options["interpolate_pos_encoding"] = True  # others interpolate where they must
    with torch.no_grad():
        states = checkpoint.reference(pixels, **options).hidden_states
    return torch.stack([state[:, checkpoint.case.prefix :] for state in states[1:]], dim=1)


@pytest.mark.parametrize("size", SIZES)
def test_every_layer_equals_transformers_at_another_resolution(family, size):
    encoder = family.build(image_size=size, layers="all")
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))
    with torch.no_grad():
        features = encoder(pixels)
    assert features.grid == (size // 4, size // 4)
    assert features.spec == encoder.geometry.features
    torch.testing.assert_close(features.tokens, _reference(family, pixels), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_spec_knows_it(family, size):
    encoder = family.build(image_size=size)
    image = encoder.geometry.image
    assert encoder.geometry == type(encoder).spec(encoder.config)
    assert (image.height, image.width) == (size, size)
    assert encoder.geometry.parameters == sum(parameter.numel() for parameter in encoder.parameters())
    native = type(encoder).spec(family.config())
    assert (native.flops < encoder.geometry.flops) == (size > 16)
    assert encoder.preprocess([]).shape == (0, 3, size, size)
    encoder(torch.randn(1, 3, size, size)).tokens.square().sum().backward()
    assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []


def test_the_own_resolution_changes_nothing(family):
    pixels = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(family.build(image_size=16)(pixels).tokens, family.build()(pixels).tokens)


def test_random_weights_have_it_too(family):
    encoder = type(family.build())
    shape = {"image_size": 16, "patch_size": 4, "width": 32, "depth": 2, "heads": 2, "mlp_width": 64}
    config = encoder.Config.model_validate({"shape": shape, "image_size": 24})
    with torch.no_grad():
        assert encoder.build(config)(torch.zeros(1, 3, 24, 24)).grid == (6, 6)


@pytest.mark.parametrize(("size", "near"), [(30, "28 or 32"), (3, "4")])
def test_a_size_that_cuts_patches_is_refused(family, size, near):
    for call in (type(family.build()).spec, type(family.build()).build):
        with pytest.raises(
            ConfigError, match=f"image_size {size} is not a multiple of the patch of 4 pixels; try {near}"
        ):
            call(family.config(image_size=size))


def test_a_checkpoint_that_cuts_its_own_patches_may_have_a_whole_number(tmp_path):
    """SigLIP so400m has 384 pixels and patches of 14."""
    fields = {"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14, "hidden_size": 48}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    for size, grid in [(None, 27), (384, 27), (378, 27), (448, 32)]:
        spec = SiglipEncoder.spec(SiglipEncoder.Config(pretrained=str(tmp_path), image_size=size))
        assert (spec.image.height, spec.grid) == (size or 384, (grid, grid))
