"""What every adapter promises.

Shape letters: B images, N tokens, D width in, E width of the language model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from chiasm.adapter import Adapter
from chiasm.features import FeatureSpec, Grid, SequenceSpec, TokenSequence
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
from chiasm.testing.stand_ins import FlatConfig, StandInEncoder, StandInFusion, StandInLanguageModel, WidthConfig
from chiasm.vlm import VLM


class _AdapterProbe(Probe):
    item = "image"

    def rebuild(self, module: Any, seed: int) -> nn.Module:
        torch.default_generator.manual_seed(seed)
        with calling(f"{type(module).__name__}(config, sequence, llm_width)"):
            made: nn.Module = type(module)(module.config, module.sequence, module.llm_width)
        return made

    def inputs(self, module: Any, batch: int) -> Inputs:
        return (torch.randn(batch, module.sequence.tokens, module.sequence.width),)

    def extremes(self, module: Any) -> dict[str, Inputs]:
        inputs = self.inputs(module, 2)
        zeros, large = tuple(torch.zeros_like(i) for i in inputs), tuple(100 * i for i in inputs)
        return {"a sequence of zeros": zeros, "a sequence of hundreds": large}

    def run(self, module: Any, inputs: Inputs) -> Tensor:
        tokens: Tensor = module(TokenSequence(inputs[0], module.sequence.grid)).tokens
        return tokens


_probe = _AdapterProbe()


def config(cls: type[Adapter]) -> None:
    """`Config` is frozen, refuses unknown fields, and survives JSON and YAML."""
    check_config(cls, Settings, make_tiny(cls).config)


def spec(cls: type[Adapter]) -> None:
    """`forward` gives the tokens and grid that `spec` states, in the language model's width, for any batch."""
    adapter = make_tiny(cls)
    held = sum(parameter.numel() for parameter in adapter.parameters())
    stated = cheap_spec(lambda: cls.spec(adapter.config, adapter.sequence, adapter.llm_width), held)
    require(stated == adapter.out, f"spec(tiny().config, ...) is {stated}, tiny().out is {adapter.out}")
    require(
        stated.width == adapter.llm_width,
        f"spec states the width {stated.width}, the language model has {adapter.llm_width}",
    )
    for batch in (1, 2, 3):
        _forward(adapter.eval(), batch)
    _forward(adapter.train(), 2, "in training mode ")


def options(cls: type[Adapter]) -> None:
    """Whatever its options, `spec` refuses them, or states the visual tokens that come out."""
    adapter = make_tiny(cls)

    def attempt(config: Settings, when: str) -> None:
        accepted(lambda: cls.spec(config, adapter.sequence, adapter.llm_width), when)
        if count_parameters(lambda: cls(config, adapter.sequence, adapter.llm_width)) > MOST_PARAMETERS:
            return
        made = cls(config, adapter.sequence, adapter.llm_width).eval()
        require(made.config == config, f"{when}the instance has another configuration, {made.config!r}")
        _forward(made, 2, when)

    check_options(adapter, attempt)


def meta(cls: type[Adapter]) -> None:
    """An instance can be made on the meta device, which `chiasm plan` counts parameters on."""
    adapter = make_tiny(cls)
    check_meta(adapter, lambda: cls(adapter.config, adapter.sequence, adapter.llm_width))


def any_geometry(cls: type[Adapter]) -> None:
    """Whatever geometry it is given, `spec` refuses it with a ValueError that says why, or it works."""
    adapter = make_tiny(cls)
    own, width = adapter.sequence, adapter.llm_width
    variants = {
        "tokens without a grid": (SequenceSpec(own.tokens, own.width), width),
        "one token": (SequenceSpec(1, own.width, (1, 1)), width),
        "an odd number of tokens": (SequenceSpec(15, own.width, (3, 5)), width),
        "a square grid": (SequenceSpec(16, own.width, (4, 4)), width),
        "a wide grid": (SequenceSpec(32, own.width, (4, 8)), width),
        "a tall grid": (SequenceSpec(48, own.width, (12, 4)), width),
        "a wide grid of as many tokens as a square": (SequenceSpec(36, own.width, (2, 18)), width),
        "a wider sequence": (SequenceSpec(own.tokens, own.width * 2, own.grid), width),
        "an odd width": (SequenceSpec(own.tokens, 7, own.grid), width),
        "a wider language model": (own, width * 2),
        "an odd width of the language model": (own, 11),
    }
    for name, (sequence, llm_width) in variants.items():
        try:
            stated = cls.spec(adapter.config, sequence, llm_width)
        except ValueError as error:
            require(bool(str(error)), f"spec refuses {name}, {sequence}, without saying why")
            continue
        except Exception as error:
            raise ContractError(f"spec of {name}, {sequence}, raised {describe(error)}; wanted a ValueError") from error
        require(
            stated.width == llm_width,
            f"spec of {name} states the width {stated.width}, the language model has {llm_width}",
        )
        with calling(f"spec accepts {name}, {sequence} to width {llm_width}; making the adapter"):
            made = cls(adapter.config, sequence, llm_width).eval()
        _forward(made, 2, f"spec accepts {name}, {sequence} to width {llm_width}; ")
        if sequence.grid != own.grid:
            with about(f"spec accepts {name}, {sequence}; "):
                _check_places(made)


def refuses_other_sequences(cls: type[Adapter]) -> None:
    """`forward` refuses a sequence that it was not built for with a ValueError, instead of mixing images."""
    adapter = make_tiny(cls).eval()
    own = adapter.sequence
    twice = None if own.grid is None else (own.grid[0] * 2, own.grid[1])
    wrong = {
        "twice the tokens": TokenSequence(torch.randn(2, own.tokens * 2, own.width), twice),
        "twice the width": TokenSequence(torch.randn(2, own.tokens, own.width * 2), own.grid),
    }
    if _grid_matters(adapter):
        wrong["as many tokens on another grid"] = TokenSequence(torch.randn(2, own.tokens, own.width), _turned(own))
    for name, sequence in wrong.items():
        check_refused(lambda given=sequence: adapter(given), name, "a sequence", "self.sequence")  # type: ignore[misc]


def _turned(sequence: SequenceSpec) -> Grid | None:
    """Another grid of as many tokens; None where there is none."""
    if sequence.grid is None:
        return None
    rows, columns = sequence.grid
    return (columns, rows) if rows != columns else (1, rows * columns) if rows > 1 else None


def _grid_matters(adapter: Adapter) -> bool:
    """Whether the same weights give the same tokens another output on another grid."""
    own, grid = adapter.sequence, _turned(adapter.sequence)
    if grid is None:
        return False
    other = SequenceSpec(own.tokens, own.width, grid)
    try:
        type(adapter).spec(adapter.config, other, adapter.llm_width)
        made = type(adapter)(adapter.config, other, adapter.llm_width).eval()
        made.load_state_dict(adapter.state_dict())
    except Exception:  # refused, or of other weights: nothing to compare
        return False
    inputs = _probe.inputs(adapter, 2)
    with torch.no_grad():
        found, wanted = _probe(made, inputs), _probe(adapter, inputs)
    return found.shape == wanted.shape and not torch.allclose(found, wanted, atol=1e-5)


def input_gradient(cls: type[Adapter]) -> None:
    """A gradient reaches the sequence, so that what comes before can be trained."""
    adapter = make_tiny(cls)
    inputs = _probe.inputs(adapter, 2)

    def run(*given: Tensor) -> Tensor:
        return _probe.run(adapter, given)

    check_input_gradient(adapter.eval(), run, inputs, ["the sequence"])
    with about("in training mode "):
        (gradient,) = input_gradients(adapter.train(), run, inputs, ["the sequence"])
        require(gradient is not None and bool(gradient.any()), "no gradient reaches the sequence")


def memory_layout(cls: type[Adapter]) -> None:
    """A sequence that is not contiguous in memory is taken too, as fusions give it."""
    adapter = make_tiny(cls).eval()
    check_strides(lambda *inputs: _probe.run(adapter, inputs), _probe.inputs(adapter, 2))


def places(cls: type[Adapter]) -> None:
    """Where a grid comes in and a grid is stated, token n stands for its n-th cell, row by row."""
    _check_places(make_tiny(cls).eval())


def _check_places(adapter: Adapter) -> None:
    given, grid = adapter.sequence.grid, adapter.out.grid
    if given is None or grid is None:
        return
    moved = move_tokens(lambda changed: _probe(adapter, tuple(changed)), _probe.inputs(adapter, 1), 0, given)
    check_places(moved, grid, adapter.out.tokens)


def _model(adapter: Adapter) -> VLM:
    sequence = adapter.sequence
    encoder = StandInEncoder.of(FeatureSpec(1, sequence.grid or (1, sequence.tokens), sequence.width))
    fusion = StandInFusion(FlatConfig(grid=sequence.grid is not None), [encoder.geometry.features], adapter.llm_width)
    return VLM([encoder], fusion, adapter, StandInLanguageModel(WidthConfig(width=adapter.llm_width)))


def _forward(adapter: Adapter, batch: int, after: str = "") -> None:
    sequence = TokenSequence(_probe.inputs(adapter, batch)[0], adapter.sequence.grid)
    with calling(f"{after}forward of {batch} images"):
        out: TokenSequence = adapter(sequence)
    check_sequence(out, adapter.out, batch, after)


CHECKS: tuple[Check, ...] = (
    config,
    spec,
    options,
    meta,
    any_geometry,
    refuses_other_sequences,
    input_gradient,
    memory_layout,
    places,
    *module_checks(_probe),
    model_check("adapter", _model),
    light,
)
