"""What every fusion promises.

Shape letters: B images, L layers, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from chiasm.features import Features, FeatureSpec, SequenceSpec, TokenSequence
from chiasm.fusion import Fusion
from chiasm.settings import Settings
from chiasm.testing.check import Check, describe
from chiasm.testing.common import about, calling, check_config, make_tiny, require
from chiasm.testing.errors import ContractError
from chiasm.testing.model_checks import model_check
from chiasm.testing.module_checks import module_checks
from chiasm.testing.places import check_places
from chiasm.testing.plugin_checks import light
from chiasm.testing.probe import Inputs, Probe
from chiasm.testing.sequence_checks import (
    check_input_gradient,
    check_meta,
    check_refused,
    check_sequence,
    check_strides,
    input_gradients,
    move_tokens,
)
from chiasm.testing.spec_checks import MOST_PARAMETERS, accepted, cheap_spec, check_options, count_parameters
from chiasm.testing.stand_ins import StandInAdapter, StandInEncoder, StandInLanguageModel, WidthConfig
from chiasm.vlm import VLM


class _FusionProbe(Probe):
    item = "image"

    def rebuild(self, module: Any, seed: int) -> nn.Module:
        torch.default_generator.manual_seed(seed)
        with calling(f"{type(module).__name__}(config, features, llm_width)"):
            made: nn.Module = type(module)(module.config, module.features, module.llm_width)
        return made

    def inputs(self, module: Any, batch: int) -> Inputs:
        return tuple(torch.randn(batch, spec.layers, spec.tokens, spec.width) for spec in module.features)

    def extremes(self, module: Any) -> dict[str, Inputs]:
        inputs = self.inputs(module, 2)
        zeros, large = tuple(torch.zeros_like(i) for i in inputs), tuple(100 * i for i in inputs)
        return {"features of zeros": zeros, "features of hundreds": large}

    def run(self, module: Any, inputs: Inputs) -> Tensor:
        tokens: Tensor = module(_features(inputs, module.features)).tokens
        return tokens


_probe = _FusionProbe()


def config(cls: type[Fusion]) -> None:
    """`Config` is frozen, refuses unknown fields, and survives JSON and YAML."""
    check_config(cls, Settings, make_tiny(cls).config)


def spec(cls: type[Fusion]) -> None:
    """`forward` gives the tokens, width and grid that `spec` states, for any batch."""
    fusion = make_tiny(cls)
    held = sum(parameter.numel() for parameter in fusion.parameters())
    stated = cheap_spec(lambda: cls.spec(fusion.config, fusion.features, fusion.llm_width), held)
    require(stated == fusion.out, f"spec(tiny().config, ...) is {stated}, tiny().out is {fusion.out}")
    for batch in (1, 2, 3):
        _forward(fusion.eval(), batch)
    _forward(fusion.train(), 2, "in training mode ")


def options(cls: type[Fusion]) -> None:
    """Whatever its options, `spec` refuses them, or states the sequence that comes out."""
    fusion = make_tiny(cls)

    def attempt(config: Settings, when: str) -> None:
        accepted(lambda: cls.spec(config, fusion.features, fusion.llm_width), when)
        if count_parameters(lambda: cls(config, fusion.features, fusion.llm_width)) > MOST_PARAMETERS:
            return
        made = cls(config, fusion.features, fusion.llm_width).eval()
        require(made.config == config, f"{when}the instance has another configuration, {made.config!r}")
        _forward(made, 2, when)

    check_options(fusion, attempt)


def meta(cls: type[Fusion]) -> None:
    """An instance can be made on the meta device, which `chiasm plan` counts parameters on."""
    fusion = make_tiny(cls)
    check_meta(fusion, lambda: cls(fusion.config, fusion.features, fusion.llm_width))


def any_geometry(cls: type[Fusion]) -> None:
    """Whatever geometry it is given, `spec` refuses it with a ValueError that says why, or it works."""
    fusion = make_tiny(cls)
    own = fusion.features
    taller = FeatureSpec(layers=1, grid=(own[0].grid[0] + 1, own[0].grid[1]), width=own[0].width)
    wider = replace(own[0], width=own[0].width * 2)
    deeper = replace(own[0], layers=own[0].layers + 1)
    turned = replace(own[0], grid=(own[0].tokens, 1))
    variants: dict[str, Sequence[FeatureSpec]] = {
        "no encoder": (),
        "one encoder": own[:1],
        "two equal encoders": (own[0], own[0]),
        "three encoders": (own[0], wider, deeper),
        "unequal grids": (own[0], taller),
        "unequal grids, the larger first": (taller, own[0]),
        "another grid of as many tokens": (own[0], turned),
        "one wider encoder": (wider,),
        "one encoder with more layers": (deeper,),
        "grids of as many tokens, one wide and one tall": (replace(own[0], grid=(3, 4)), replace(own[0], grid=(4, 3))),
        "a wide and a tall grid": (replace(own[0], grid=(3, 5)), replace(own[0], grid=(6, 4))),
    }
    for name, features in variants.items():
        try:
            cls.spec(fusion.config, features, fusion.llm_width)
        except ValueError as error:
            require(bool(str(error)), f"spec refuses {name}, {features}, without saying why")
            continue
        except Exception as error:
            raise ContractError(f"spec of {name}, {features}, raised {describe(error)}; wanted a ValueError") from error
        with calling(f"spec accepts {name}, {features}; making the fusion"):
            made = cls(fusion.config, features, fusion.llm_width).eval()
        _forward(made, 2, f"spec accepts {name}, {features}; ")
        _check_layers(made, f"spec accepts {name}; ")
        with about(f"spec accepts {name}, {features}; "):
            _check_places(cls(fusion.config, features, fusion.llm_width).eval())


def refuses_other_features(cls: type[Fusion]) -> None:
    """`forward` refuses features that it was not built for with a ValueError, instead of mixing images."""
    fusion = make_tiny(cls).eval()
    inputs, own = _probe.inputs(fusion, 2), fusion.features
    first = own[0]
    twice = replace(first, grid=(first.grid[0] * 2, first.grid[1]))
    wide = replace(first, width=first.width * 2)
    deep = replace(first, layers=first.layers + 1)
    right = _features(inputs, own)
    wrong = {
        "twice the tokens": [
            *_features([torch.randn(2, twice.layers, twice.tokens, twice.width)], [twice]),
            *right[1:],
        ],
        "twice the width": [*_features([torch.randn(2, wide.layers, wide.tokens, wide.width)], [wide]), *right[1:]],
        "one layer more": [*_features([torch.randn(2, deep.layers, deep.tokens, deep.width)], [deep]), *right[1:]],
        "an encoder too many": [*right, right[-1]],
        "an encoder too few": right[:-1],
    }
    if len(right) > 1:
        wrong["3 images from the first encoder and 2 from the others"] = [
            *_features([torch.randn(3, first.layers, first.tokens, first.width)], [first]),
            *right[1:],
        ]
    for name, features in wrong.items():
        check_refused(lambda given=features: fusion(given), name, "features", "self.features")  # type: ignore[misc]


def uses_every_encoder(cls: type[Fusion]) -> None:
    """Each encoder's features matter, and a gradient reaches them, so that encoders can be trained."""
    fusion = make_tiny(cls)
    inputs = _probe.inputs(fusion, 2)
    names = [f"encoder {k}" for k in range(len(inputs))]

    def run(*given: Tensor) -> Tensor:
        return _probe.run(fusion, given)

    check_input_gradient(fusion.eval(), run, inputs, names)
    with about("in training mode "):
        gradients = input_gradients(fusion.train(), run, inputs, names)
        for name, gradient in zip(names, gradients, strict=True):
            require(gradient is not None and bool(gradient.any()), f"no gradient reaches {name}")


def memory_layout(cls: type[Fusion]) -> None:
    """Features that are not contiguous in memory are taken too, as encoders give them."""
    fusion = make_tiny(cls).eval()
    check_strides(lambda *inputs: _probe.run(fusion, inputs), _probe.inputs(fusion, 2))


def features_kept(cls: type[Fusion]) -> None:
    """The list of features stays as it was."""
    fusion = make_tiny(cls).eval()
    given = _features(_probe.inputs(fusion, 2), fusion.features)
    before = list(given)
    with calling("forward"):
        fusion(given)
    require(
        len(given) == len(before) and all(a is b for a, b in zip(given, before, strict=True)),
        f"forward changes the list of features that it is given: {len(before)} before, {len(given)} after",
    )


def places(cls: type[Fusion]) -> None:
    """Where a grid is stated, token n stands for its n-th cell, row by row."""
    _check_places(make_tiny(cls).eval())


def _check_places(fusion: Fusion) -> None:
    grid = fusion.out.grid
    if grid is None:
        return
    inputs = _probe.inputs(fusion, 1)
    for k, feature in enumerate(fusion.features):
        moved = move_tokens(lambda changed: _probe(fusion, tuple(changed)), inputs, k, feature.grid)
        with about(f"the features of encoder {k}: "):
            check_places(moved, grid, fusion.out.tokens)


def _check_layers(fusion: Fusion, after: str) -> None:
    """Every layer of every encoder's features matters."""
    inputs = _probe.inputs(fusion, 2)
    with about(after):
        gradients = input_gradients(
            fusion, lambda *given: _probe.run(fusion, given), inputs, [f"encoder {k}" for k in range(len(inputs))]
        )
    for k, gradient in enumerate(gradients):
        unused = [i for i in range(inputs[k].shape[1]) if gradient is None or not gradient[:, i].any()]
        require(
            not unused,
            f"{after}no gradient reaches layer {unused[0] if unused else ''} of the {inputs[k].shape[1]} that encoder "
            f"{k} gives: use every layer that a run selects, or refuse more than one in spec",
        )


def _model(fusion: Fusion) -> VLM:
    encoders = [StandInEncoder.of(feature) for feature in fusion.features]
    adapter = StandInAdapter(StandInAdapter.Config(), fusion.out, fusion.llm_width)
    return VLM(encoders, fusion, adapter, StandInLanguageModel(WidthConfig(width=fusion.llm_width)))


def _features(tokens: Sequence[Tensor], specs: Sequence[FeatureSpec]) -> list[Features]:
    return [Features(item, spec.grid) for item, spec in zip(tokens, specs, strict=True)]


def _forward(fusion: Fusion, batch: int, after: str = "") -> None:
    inputs = _features(_probe.inputs(fusion, batch), fusion.features)
    with calling(f"{after}forward of {batch} images"):
        sequence: TokenSequence = fusion(inputs)
    declared: SequenceSpec = fusion.out
    check_sequence(sequence, declared, batch, after)


CHECKS: tuple[Check, ...] = (
    config,
    spec,
    options,
    meta,
    any_geometry,
    refuses_other_features,
    uses_every_encoder,
    memory_layout,
    features_kept,
    places,
    *module_checks(_probe),
    model_check("fusion", _model),
    light,
)
