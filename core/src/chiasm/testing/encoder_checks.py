"""What every encoder promises.

Shape letters: B images, H and W pixels, L layers, N patch tokens, D width, (h, w) the grid.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from chiasm.encoder import Encoder, EncoderConfig, EncoderSpec, Layers
from chiasm.features import Features, Grid
from chiasm.testing.check import Check, describe
from chiasm.testing.common import about, calling, check_config, check_missing_checkpoint, make_tiny, require
from chiasm.testing.errors import ContractError
from chiasm.testing.model_checks import model_check
from chiasm.testing.module_checks import module_checks
from chiasm.testing.places import Cell, check_places
from chiasm.testing.plugin_checks import light
from chiasm.testing.preprocess_checks import PREPROCESS_CHECKS
from chiasm.testing.probe import Inputs, Probe, check_close
from chiasm.testing.spec_checks import MOST_PARAMETERS, accepted, cheap_spec, check_options
from chiasm.testing.stand_ins import FlatConfig, StandInAdapter, StandInFusion, StandInLanguageModel
from chiasm.vlm import VLM

FLOPS_APART = 0.6, 1.7
"""Shares of the counted operations that `spec` may state: formulas leave out small terms, or round them up."""

OTHER_FLOPS = 5
"""Operations of each pixel and each number of the features that the count leaves out."""

MOST_PIXELS, MOST_TOKENS = 300_000, 2048
"""Of a variant that is run: an option may ask for images of full size."""


class _EncoderProbe(Probe):
    item = "image"
    always_alone = False  # a convolutional encoder that is trained may normalise over its batch

    def rebuild(self, module: Any, seed: int) -> nn.Module:
        return _build(module, module.config, seed)

    def inputs(self, module: Any, batch: int) -> Inputs:
        return (_pixels(module, batch),)

    def extremes(self, module: Any) -> dict[str, Inputs]:
        image = module.geometry.image
        plain = [Image.new("RGB", (image.width, image.height), colour) for colour in ("black", "white")]
        with calling("preprocess"):
            return {"a black and a white image": (module.preprocess(plain),)}

    def run(self, module: Any, inputs: Inputs) -> Tensor:
        return _features(module, inputs[0]).tokens


_probe = _EncoderProbe()


def config(cls: type[Encoder]) -> None:
    """`Config` is frozen, refuses unknown fields, and survives JSON and YAML."""
    check_config(cls, EncoderConfig, make_tiny(cls).config)


def spec(cls: type[Encoder]) -> None:
    """`spec` states the geometry of an instance, without making its weights."""
    encoder = make_tiny(cls)
    stated = cheap_spec(lambda: cls.spec(encoder.config), sum(p.numel() for p in encoder.parameters()))
    require(isinstance(stated, EncoderSpec), f"spec returned a {type(stated).__name__}, wanted an EncoderSpec")
    require(stated == encoder.geometry, f"spec(tiny().config) is {stated}, tiny().geometry is {encoder.geometry}")
    sizes = {"layers": stated.features.layers, "width": stated.width, "depth": stated.depth}
    sizes |= {"rows of the grid": stated.grid[0], "columns of the grid": stated.grid[1]}
    for name, value in sizes.items():
        require(value >= 1, f"spec states {name} = {value}, wanted at least 1")
    for name, number in (sizes | {"parameters": stated.parameters, "flops": stated.flops}).items():
        require(isinstance(number, int) and number >= 0, f"spec states {name} = {number!r}, wanted a whole number")
    built = _build(encoder, encoder.config, 1)
    require(
        isinstance(built, cls) and built.config == encoder.config and built.geometry == stated,
        f"build(tiny().config) gives a {type(built).__name__} with {built.config!r} and {built.geometry}; wanted the "
        f"configuration that it was given, {encoder.config!r}, and the geometry that spec states",
    )


def parameters(cls: type[Encoder]) -> None:
    """`spec` states how many parameters an instance holds."""
    _check_parameters(make_tiny(cls), "tiny()")


def flops(cls: type[Encoder]) -> None:
    """`spec` states about the operations that the matrix products and convolutions of one view take."""
    encoder = make_tiny(cls).eval()
    _check_flops(encoder, "")
    first = _select(encoder, 1)  # what the layers behind it take is not spent
    if first is not None:
        _check_flops(first, "with layers: 1 ")


def features(cls: type[Encoder]) -> None:
    """`forward` gives the layers, tokens, grid and width that `spec` states, for any batch."""
    encoder = make_tiny(cls)
    for mode in ("eval", "training"):
        for batch in (1, 2, 3) if mode == "eval" else (3,):  # a trained norm may want more than one image
            _check_features(encoder.train(mode == "training"), batch, f"in {mode} mode ")


def options(cls: type[Encoder]) -> None:
    """Whatever its options, `spec` refuses them, or states the features and parameters that an instance has."""

    def attempt(config: EncoderConfig, when: str) -> None:
        stated = accepted(lambda: cls.spec(config), when)
        pixels = stated.image.height * stated.image.width
        if stated.parameters > MOST_PARAMETERS or pixels > MOST_PIXELS or stated.features.tokens > MOST_TOKENS:
            return
        torch.default_generator.manual_seed(1)
        made = cls.build(config).eval()
        require(made.geometry == stated, f"{when}spec states {stated}, the instance has {made.geometry}")
        require(made.config == config, f"{when}the instance has another configuration, {made.config!r}")
        _check_parameters(made, f"{when}an instance")
        _check_features(made, 2, when)
        if stated.grid != tiny.geometry.grid:  # where a square grid shows nothing, one that is not may
            with about(when):
                _check_places(made)

    tiny = make_tiny(cls)
    check_options(tiny, attempt)


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
    _check_places(make_tiny(cls).eval())


def _check_places(encoder: Encoder) -> None:
    image = encoder.geometry.image

    def moved(grid: Grid, cells: list[Cell]) -> Tensor:
        base = torch.randn(1, 3, image.height, image.width)
        changed = base.repeat(len(cells), 1, 1, 1)
        for pixels, (i, j) in zip(changed, cells, strict=True):
            top, bottom = i * image.height // grid[0], (i + 1) * image.height // grid[0]
            left, right = j * image.width // grid[1], (j + 1) * image.width // grid[1]
            pixels[:, top:bottom, left:right] += torch.randn(3, bottom - top, right - left)
        with torch.no_grad():
            difference = _features(encoder, changed).tokens - _features(encoder, base).tokens
        moved_PN: Tensor = difference.float().norm(dim=-1).sum(dim=1)
        return moved_PN

    check_places(moved, encoder.geometry.grid, encoder.geometry.features.tokens)


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
    choices: list[tuple[Layers, list[int]]] = [
        (-1, [-1]),
        (-depth, [0]),
        (1, [0]),
        ((depth, 1), [-1, 0]),
        ((1, depth), [0, -1]),
        ((-1, -2), [-1, -2]),
    ]
    for choice, blocks in choices if depth > 1 else choices[:3]:
        one = _select(encoder, choice)
        if one is None:
            continue
        _check_parameters(one, f"with layers: {choice} an instance")
        _check_features(one, 2, f"with layers: {choice} ")
        if not _share_weights(one, every):
            continue
        found_BLND = _features(one, pixels).tokens
        given = [_nearest(found_BLND[:, i], all_BLND) for i in range(found_BLND.shape[1])]
        wanted = [block % depth + 1 for block in blocks]
        check_close(
            found_BLND,
            all_BLND[:, blocks],
            f"layers: {choice} does not give what `all` gives at blocks {wanted}, in that order; "
            + ("it is nearest to that" if given == wanted else f"it looks like blocks {given}"),
        )


def missing_checkpoint(cls: type[Encoder]) -> None:
    """A checkpoint that does not exist is refused, never replaced by random weights."""
    check_missing_checkpoint(cls)


def _check_parameters(encoder: Encoder, what: str) -> None:
    found = sum(parameter.numel() for parameter in encoder.parameters())
    stated = encoder.geometry.parameters
    require(found == stated, f"{what} holds {found} parameters, its spec states parameters = {stated}")


def _check_flops(encoder: Encoder, when: str) -> None:
    stated, image, feature = encoder.geometry.flops, encoder.geometry.image, encoder.geometry.features
    if stated <= 1:  # stands for "not known"
        return
    pixels = torch.zeros(1, 3, image.height, image.width)
    # by matrices, as the counter knows no attention of the CPU
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        _features(encoder, pixels)
    counted = counter.get_total_flops()
    where = "count 2 for each multiply-add, of one view, up to the last selected layer"
    hint = "; a multiply-add counts two" if 0.47 <= stated / max(1, counted) <= 0.53 else ""
    # what is no matrix product is not counted here: it may be stated, and is little
    most = FLOPS_APART[1] * counted + OTHER_FLOPS * (pixels.numel() + feature.tokens * feature.width)
    require(
        FLOPS_APART[0] * counted <= stated <= most,
        f"{when}spec states flops = {stated:,}, the matrix products and convolutions of forward take {counted:,}"
        f"{hint}: {where}",
    )


def _check_features(encoder: Encoder, batch: int, when: str) -> None:
    stated = encoder.geometry.features
    found = _features(encoder, _pixels(encoder, batch))
    require(isinstance(found, Features), f"{when}forward returned a {type(found).__name__}, wanted Features")
    wanted, shape = (batch, stated.layers, stated.tokens, stated.width), tuple(found.tokens.shape)
    require(shape == wanted, f"{when}forward returned {shape}, declared (B, L, N, D) = {wanted}")
    require(found.grid == stated.grid, f"{when}forward returned the grid {found.grid}, declared {stated.grid}")
    require(
        found.tokens.dtype == torch.float32,
        f"{when}forward of float32 pixels returned {found.tokens.dtype}, wanted torch.float32",
    )
    require(bool(found.tokens.isfinite().all()), f"{when}forward returned NaN or infinity")


def _model(encoder: Encoder) -> VLM:
    fusion = StandInFusion(FlatConfig(), [encoder.geometry.features], 8)
    adapter = StandInAdapter(StandInAdapter.Config(), fusion.out, 8)
    return VLM([encoder], fusion, adapter, StandInLanguageModel.tiny())


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


def _nearest(found_BND: Tensor, all_BLND: Tensor) -> int:
    """The block, from 1 on, whose features are nearest."""
    return int((all_BLND - found_BND.unsqueeze(1)).flatten(2).norm(dim=2).mean(dim=0).argmin()) + 1


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


def _pixels(encoder: Encoder, batch: int) -> Tensor:
    """Coarse noise, whose differences survive patches and averages."""
    noise = np.random.default_rng(int(torch.randint(1 << 30, ())))
    image = encoder.geometry.image
    images = [
        Image.fromarray(noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((image.width, image.height))
        for _ in range(batch)
    ]
    with calling("preprocess"):
        return encoder.preprocess(images)


CHECKS: tuple[Check, ...] = (
    config,
    spec,
    parameters,
    flops,
    options,
    *PREPROCESS_CHECKS,
    features,
    sees_the_image,
    places,
    layers,
    missing_checkpoint,
    *module_checks(_probe),
    model_check("encoders", _model),
    light,
)
