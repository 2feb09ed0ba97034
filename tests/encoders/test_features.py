"""Features equal transformers' hidden states, less the prefix tokens that each architecture has."""

from __future__ import annotations

import pytest
import torch

from chiasm.errors import ConfigError

PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def hidden(checkpoint):
    """The patches of transformers' hidden states, index 0 the embedding: `[B, N, D]` each."""
    with torch.no_grad():
        states = checkpoint.reference(PIXELS, output_hidden_states=True).hidden_states
    assert len(states) == 4
    assert states[0].shape == (2, checkpoint.case.prefix + 16, 32)
    return [state[:, checkpoint.case.prefix :] for state in states]


@pytest.mark.parametrize("layer", [1, 2, 3, -1, -2, -3])
def test_every_layer_equals_transformers(checkpoint, hidden, layer):
    encoder = checkpoint.build(layers=layer)
    with torch.no_grad():
        features = encoder(PIXELS)
    assert features.tokens.shape == (2, 1, 16, 32)
    assert features.tokens.dtype == torch.float32
    assert features.grid == (4, 4)
    assert features.spec == encoder.geometry.features
    index = layer if layer > 0 else layer + 4
    torch.testing.assert_close(features.tokens[:, 0], hidden[index], rtol=0, atol=1e-5)
    assert len(encoder.tower.blocks) == index


@pytest.mark.parametrize(("layers", "indices"), [("all", [1, 2, 3]), ([3, 1], [3, 1]), ([-1, -2], [3, 2]), ([2], [2])])
def test_layers_come_in_the_order_asked(checkpoint, hidden, layers, indices):
    with torch.no_grad():
        features = checkpoint.build(layers=layers)(PIXELS)
    assert features.tokens.shape == (2, len(indices), 16, 32)
    wanted = torch.stack([hidden[index] for index in indices], dim=1)
    torch.testing.assert_close(features.tokens, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layers", [4, -4, [1, 4], [1, -3], [2, 2]])
def test_a_layer_out_of_range_or_named_twice_is_refused(family, layers):
    with pytest.raises(ConfigError, match="3 blocks"):
        family.case.encoder.spec(family.config(layers=layers))
    with pytest.raises(ConfigError, match="3 blocks"):
        family.build(layers=layers)


@pytest.mark.parametrize("name", ["siglip", "siglip-whole", "dinov2", "dinov2-registers"])
def test_the_final_norm_is_transformers_last_hidden_state(checkpoints, name):
    checkpoint = checkpoints(name)
    with torch.no_grad():
        wanted = checkpoint.reference(PIXELS).last_hidden_state[:, checkpoint.case.prefix :]
        given = checkpoint.build(final_norm=True)(PIXELS).tokens[:, 0]
        raw = checkpoint.build()(PIXELS).tokens[:, 0]
    torch.testing.assert_close(given, wanted, rtol=0, atol=1e-5)
    assert not torch.allclose(raw, wanted, atol=1e-2)


@pytest.mark.parametrize("layers", [-1, -2, [3, 1], "all"])
def test_spec_agrees_with_what_is_built(checkpoint, layers):
    config = checkpoint.config(layers=layers)
    spec = checkpoint.case.encoder.spec(config)
    encoder = checkpoint.case.encoder.build(config)
    assert encoder.geometry == spec
    assert spec.depth == 3
    assert spec.parameters == sum(parameter.numel() for parameter in encoder.parameters())
    with torch.no_grad():
        assert encoder(PIXELS[:1]).spec == spec.features


def test_all_that_is_built_learns(family):
    encoder = family.build(layers=-2)
    encoder(PIXELS).tokens.square().sum().backward()
    assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []


def test_an_image_does_not_depend_on_its_batch(family):
    encoder = family.build(layers="all")
    assert not encoder.training
    with torch.no_grad():
        both = encoder(PIXELS).tokens
        alone = torch.cat([encoder(PIXELS[:1]).tokens, encoder(PIXELS[1:]).tokens])
    torch.testing.assert_close(both, alone, rtol=0, atol=1e-5)


def test_dtype_moves(family):
    encoder = family.build().to(torch.bfloat16)
    with torch.no_grad():
        assert encoder(PIXELS.bfloat16()).tokens.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(2, 3, 16, 20), (2, 3, 32, 32), (2, 1, 16, 16)])
def test_pixels_of_another_size_are_refused(family, shape):
    with pytest.raises(ValueError, match=r"wanted \[B, 3, 16, 16\]"):
        family.build()(torch.zeros(shape))


def test_positions_of_dinov3_are_not_scaled_at_random_where_it_is_trained(checkpoints):
    encoder = checkpoints("dinov3").build()
    given = encoder(PIXELS).tokens
    assert torch.equal(encoder.train()(PIXELS).tokens, given)
