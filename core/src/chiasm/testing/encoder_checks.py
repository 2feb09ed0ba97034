"""What every encoder promises.

Shape letters: B images, H and W pixels, L layers, N patch tokens, D width, (h, w) the grid.
"""

from __future__ import annotations

import random
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from chiasm.encoder import Encoder, EncoderConfig, EncoderSpec, Layers
from chiasm.features import Features
from chiasm.image import Resize
from chiasm.testing.check import Check, describe
from chiasm.testing.common import calling, check_config, check_missing_checkpoint, make_tiny, require
from chiasm.testing.errors import ContractError
from chiasm.testing.module_checks import Inputs, Probe, check_close, module_checks
from chiasm.testing.plugin_checks import light

SIZES = ((1, 1), (7, 5), (64, 64), (97, 61), (200, 5), (5, 200))
"""Width and height of the images that are preprocessed: one pixel, odd ones, and strips."""

CELLS = 32
"""Places of the grid that are looked at."""


class _EncoderProbe(Probe):
    item = "image"
    always_alone = False  # a convolutional encoder that is trained may normalise over its batch

    def rebuild(self, module: Any, seed: int) -> nn.Module:
        return _build(module, module.config, seed)

    def inputs(self, module: Any, batch: int) -> Inputs:
        return (_pixels(module, batch),)

    def run(self, module: Any, inputs: Inputs) -> Tensor:
        return _features(module, inputs[0]).tokens


def config(cls: type[Encoder]) -> None:
    """`Config` is frozen, refuses unknown fields, and survives JSON."""
    check_config(cls, EncoderConfig, make_tiny(cls).config)


def spec(cls: type[Encoder]) -> None:
    """`spec` states the geometry of an instance, without making its weights."""
    encoder = make_tiny(cls)
    before = torch.get_rng_state()
    with calling("spec(tiny().config)"):
        stated = cls.spec(encoder.config)
    require(
        torch.equal(torch.get_rng_state(), before),
        "spec draws random numbers: it seems to make weights; make them under torch.device('meta')",
    )
    require(isinstance(stated, EncoderSpec), f"spec returned a {type(stated).__name__}, wanted an EncoderSpec")
    require(stated == encoder.geometry, f"spec(tiny().config) is {stated}, tiny().geometry is {encoder.geometry}")
    sizes = {"layers": stated.features.layers, "width": stated.width, "depth": stated.depth}
    sizes |= {"rows of the grid": stated.grid[0], "columns of the grid": stated.grid[1]}
    for name, value in sizes.items():
        require(value >= 1, f"spec states {name} = {value}, wanted at least 1")
    require(stated.flops >= 0, f"spec states flops = {stated.flops}")


def parameters(cls: type[Encoder]) -> None:
    """`spec` states how many parameters an instance holds."""
    encoder = make_tiny(cls)
    found = sum(parameter.numel() for parameter in encoder.parameters())
    require(
        found == encoder.geometry.parameters,
        f"tiny() holds {found} parameters, its spec states parameters = {encoder.geometry.parameters}",
    )


def preprocess(cls: type[Encoder]) -> None:
    """Images of any shape become `[B, 3, H, W]` float32 as `spec` states, under every resize policy, each alone."""
    encoder = make_tiny(cls)
    images = _images()
    image = encoder.geometry.image
    wanted = (len(images), 3, image.height, image.width)
    policies: tuple[Resize, ...] = get_args(Resize)
    for policy in policies:
        with calling(f"preprocess of images of {SIZES} pixels with resize={policy!r}"):
            pixels = encoder.preprocess(images, policy)
        _check_pixels(pixels, wanted, policy)
        last = encoder.preprocess(images[-1:], policy)
        check_close(pixels[-1:], last, f"preprocess with resize={policy!r} gives an image other pixels among others")
    require(images == _images(), "preprocess changed the images that it was given")


def features(cls: type[Encoder]) -> None:
    """`forward` gives the layers, tokens, grid and width that `spec` states, for any batch."""
    encoder = make_tiny(cls).eval()
    stated = encoder.geometry.features
    for batch in (1, 2, 3):
        found = _features(encoder, _pixels(encoder, batch))
        require(isinstance(found, Features), f"forward returned a {type(found).__name__}, wanted Features")
        wanted = (batch, stated.layers, stated.tokens, stated.width)
        shape = tuple(found.tokens.shape)
        require(shape == wanted, f"forward returned {shape}, declared (B, L, N, D) = {wanted}")
        require(found.grid == stated.grid, f"forward returned the grid {found.grid}, declared {stated.grid}")
        require(
            found.tokens.dtype == torch.float32,
            f"forward of float32 pixels returned {found.tokens.dtype}, wanted torch.float32",
        )
        require(bool(found.tokens.isfinite().all()), "forward returned NaN or infinity")


def sees_the_image(cls: type[Encoder]) -> None:
    """Another image gives other features, where the encoder has any parameter."""
    encoder = make_tiny(cls).eval()
    if next(encoder.parameters(), None) is None:
        return
    first, second = _features(encoder, _pixels(encoder, 2)).tokens
    require(
        not torch.allclose(first, second, rtol=1e-4, atol=1e-7),
        "two different images have the same features: forward does not use its pixels",
    )


def places(cls: type[Encoder]) -> None:
    """Token n stands for the n-th cell of the grid, row by row."""
    encoder = make_tiny(cls).eval()
    (rows, columns), image = encoder.geometry.grid, encoder.geometry.image
    cells = [(i, j) for i in range(rows) for j in range(columns)]
    cells = random.Random(0).sample(cells, min(CELLS, len(cells)))
    base = torch.randn(1, 3, image.height, image.width)
    changed = base.repeat(len(cells), 1, 1, 1)
    for pixels, (i, j) in zip(changed, cells, strict=True):
        top, bottom = i * image.height // rows, (i + 1) * image.height // rows
        left, right = j * image.width // columns, (j + 1) * image.width // columns
        pixels[:, top:bottom, left:right] += torch.randn(3, bottom - top, right - left)
    with torch.no_grad():
        difference = _features(encoder, changed).tokens - _features(encoder, base).tokens
    moved_BN = difference.float().norm(dim=-1).sum(dim=1)
    # some tokens move more than others whatever is changed, say those in the middle of a convolution's map
    moved_BN /= moved_BN.mean(dim=0, keepdim=True).clamp(min=1e-12)
    orders = {"row by row": [i * columns + j for i, j in cells]}
    orders["column by column"] = [j * rows + i for i, j in cells]
    orders["rows from the bottom"] = [(rows - 1 - i) * columns + j for i, j in cells]
    orders["columns from the right"] = [i * columns + columns - 1 - j for i, j in cells]
    for shift in range(1, 9):
        orders[f"{shift} places late, behind a prefix token"] = [i * columns + j + shift for i, j in cells]
        orders[f"{shift} places early"] = [i * columns + j - shift for i, j in cells]
    scores = {}
    for name, order in orders.items():
        own = [moved_BN[b, token] for b, token in enumerate(order) if 0 <= token < rows * columns]
        scores[name] = float(torch.stack(own).mean()) if 2 * len(own) >= len(cells) else 0.0
    likeliest = max(scores, key=lambda name: scores[name])
    # far-reaching layers with random weights may tell nothing; a wrong order stands out by far
    require(
        scores[likeliest] < 1.3 * scores["row by row"] or scores[likeliest] < 1.3,
        f"tokens seem to stand {likeliest}, wanted row by row: a change in a cell of the grid moves the token there "
        f"{scores[likeliest]:.1f} times as much as others, and its own {scores['row by row']:.1f} times",
    )


def layers(cls: type[Encoder]) -> None:
    """`layers` is honoured in the order asked, or refused; a layer that does not exist is refused."""
    encoder = make_tiny(cls).eval()
    depth = encoder.geometry.depth
    for outside in (depth + 1, -depth - 1):
        chosen = _select(encoder, outside)
        require(
            chosen is None,
            f"layers: {outside} is accepted although spec states {depth} blocks; refuse it with "
            "chiasm.encoder.select_layers",
        )
    every = _select(encoder, "all")
    if every is None:
        return
    with torch.no_grad():  # some blocks start as the identity
        for parameter in every.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    pixels = _pixels(encoder, 2)
    all_BLND = _features(every, pixels).tokens
    require(all_BLND.shape[1] == depth, f"layers: all gives {all_BLND.shape[1]} layers, spec states {depth} blocks")
    alike = [block for block in range(1, depth) if torch.equal(all_BLND[:, block - 1], all_BLND[:, block])]
    require(
        not alike or next(every.parameters(), None) is None,
        f"layers: all gives the same features for blocks {alike[0] if alike else ''} and the next",
    )
    choices: list[tuple[Layers, list[int]]] = [(-1, [-1]), (-depth, [0]), ((depth, 1), [-1, 0]), ((1, depth), [0, -1])]
    for choice, blocks in choices if depth > 1 else choices[:2]:
        one = _select(encoder, choice)
        if one is None or not _share_weights(one, every):
            continue
        check_close(
            _features(one, pixels).tokens,
            all_BLND[:, blocks],
            f"layers: {choice} does not give what `all` gives at blocks {[b % depth + 1 for b in blocks]}",
        )


def missing_checkpoint(cls: type[Encoder]) -> None:
    """A checkpoint that does not exist is refused, never replaced by random weights."""
    check_missing_checkpoint(cls)


def _build(encoder: Encoder, config: EncoderConfig, seed: int) -> Encoder:
    if config.pretrained is not None:  # its weights are no random ones
        return make_tiny(type(encoder))
    torch.default_generator.manual_seed(seed)
    with calling("build(tiny().config)"):
        return type(encoder).build(config)


def _select(encoder: Encoder, chosen: Layers) -> Encoder | None:
    """The encoder with other layers, None where they are refused."""
    cls = type(encoder)
    fields = encoder.config.model_dump(exclude_unset=True) | {"layers": chosen}
    try:
        config = cls.Config.model_validate(fields)
        cls.spec(config)
    except ValueError:
        return None
    except Exception as error:
        raise ContractError(f"spec with layers: {chosen} raised {describe(error)}, wanted a ConfigError") from error
    return _build(encoder, config, 1).eval()


def _share_weights(encoder: Encoder, source: Encoder) -> bool:
    """Gives an encoder the weights of one with more layers; False where their names do not match."""
    weights = source.state_dict()
    own = encoder.state_dict()
    if any(name not in weights or weights[name].shape != value.shape for name, value in own.items()):
        return False
    encoder.load_state_dict({name: weights[name] for name in own})
    return True


def _features(encoder: Encoder, pixels: Tensor) -> Features:
    with calling(f"forward of {pixels.dtype} pixels {tuple(pixels.shape)}"):
        features: Features = encoder(pixels)
    return features


def _images() -> list[Image.Image]:
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]


def _pixels(encoder: Encoder, batch: int) -> Tensor:
    """Coarse noise, whose differences survive patches and averages."""
    noise = np.random.default_rng(1)
    image = encoder.geometry.image
    images = [
        Image.fromarray(noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((image.width, image.height))
        for _ in range(batch)
    ]
    with calling("preprocess"):
        return encoder.preprocess(images)


def _check_pixels(pixels: Tensor, wanted: tuple[int, ...], policy: str) -> None:
    shape = tuple(pixels.shape)
    require(shape == wanted, f"preprocess with resize={policy!r} returned {shape}, declared (B, 3, H, W) = {wanted}")
    require(
        pixels.dtype == torch.float32,
        f"preprocess with resize={policy!r} returned {pixels.dtype}, wanted torch.float32",
    )
    require(bool(pixels.isfinite().all()), f"preprocess with resize={policy!r} returned NaN or infinity")


CHECKS: tuple[Check, ...] = (
    config,
    spec,
    parameters,
    preprocess,
    features,
    sees_the_image,
    places,
    layers,
    missing_checkpoint,
    *module_checks(_EncoderProbe()),
    light,
)
