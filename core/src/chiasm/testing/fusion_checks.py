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
from chiasm.testing.common import calling, check_config, make_tiny, require
from chiasm.testing.errors import ContractError
from chiasm.testing.module_checks import Inputs, Probe, module_checks
from chiasm.testing.plugin_checks import light
from chiasm.testing.sequence_checks import check_input_gradient, check_meta, check_refused, check_sequence


class _FusionProbe(Probe):
    item = "image"

    def rebuild(self, module: Any, seed: int) -> nn.Module:
        torch.default_generator.manual_seed(seed)
        with calling(f"{type(module).__name__}(config, features, llm_width)"):
            made: nn.Module = type(module)(module.config, module.features, module.llm_width)
        return made

    def inputs(self, module: Any, batch: int) -> Inputs:
        return tuple(torch.randn(batch, spec.layers, spec.tokens, spec.width) for spec in module.features)

    def run(self, module: Any, inputs: Inputs) -> Tensor:
        tokens: Tensor = module(_features(inputs, module.features)).tokens
        return tokens


_probe = _FusionProbe()


def config(cls: type[Fusion]) -> None:
    """`Config` is frozen, refuses unknown fields, and survives JSON."""
    check_config(cls, Settings, make_tiny(cls).config)


def spec(cls: type[Fusion]) -> None:
    """`forward` gives the tokens, width and grid that `spec` states, for any batch."""
    fusion = make_tiny(cls)
    before = torch.get_rng_state()
    with calling("spec"):
        stated = cls.spec(fusion.config, fusion.features, fusion.llm_width)
    require(torch.equal(torch.get_rng_state(), before), "spec draws random numbers: it seems to make weights")
    require(stated == fusion.out, f"spec(tiny().config, ...) is {stated}, tiny().out is {fusion.out}")
    for batch in (1, 2, 3):
        _forward(fusion.eval(), batch)


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
    fusion = make_tiny(cls).eval()
    names = [f"encoder {k}" for k in range(len(fusion.features))]
    check_input_gradient(lambda *inputs: _probe.run(fusion, inputs), _probe.inputs(fusion, 2), names)


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
    meta,
    any_geometry,
    refuses_other_features,
    uses_every_encoder,
    *module_checks(_probe),
    light,
)
