"""The image-blind control."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from chiasm.errors import ConfigError
from chiasm_encoders.blind import BlindEncoder


def _build(**options):
    return BlindEncoder.build(BlindEncoder.Config.model_validate(options))


def test_every_image_has_the_same_features():
    encoder = _build(grid=[2, 3], width=5)
    pixels = encoder.preprocess([Image.new("RGB", (50, 20), colour) for colour in ("white", "black", "red")], "pad")
    tokens = encoder(pixels).tokens
    assert tokens.shape == (3, 1, 6, 5)
    assert torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[0], tokens[2])
    assert torch.linalg.matrix_rank(tokens[0, 0]) == 5  # tokens differ among themselves


def test_it_costs_nothing():
    spec = BlindEncoder.spec(BlindEncoder.Config())
    assert (spec.grid, spec.width, spec.depth, spec.parameters, spec.flops) == ((4, 4), 64, 1, 0, 0)
    encoder = BlindEncoder.tiny()
    assert encoder.geometry == spec
    assert list(encoder.parameters()) == []
    assert encoder.state_dict() == {}
    assert encoder(encoder.preprocess([])).tokens.shape == (0, 1, 16, 64)


def test_layers_are_those_of_the_encoder_that_it_replaces():
    encoder = _build(depth=24, layers=[-2, 3])
    tokens = encoder(torch.zeros(1, 3, 4, 4)).tokens
    assert tokens.shape == (1, 2, 16, 64)
    assert torch.equal(tokens[:, 0], tokens[:, 1])
    with pytest.raises(ConfigError, match="1 blocks"):
        _build(layers=-2)


def test_dtype_moves():
    assert BlindEncoder.tiny().bfloat16()(torch.zeros(1, 3, 4, 4)).tokens.dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{"pretrained": "some/thing"}, {"grid": [0, 4]}, {"width": 0}, {"heads": 2}])
def test_impossible_settings_are_refused(options):
    with pytest.raises(ValidationError):
        BlindEncoder.Config.model_validate(options)
