"""What every adapter promises.

Shape letters: B images, N tokens, D width in, E width of the language model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from chiasm.adapter import Adapter
from chiasm.features import SequenceSpec, TokenSequence
from chiasm.settings import Settings
from chiasm.testing.check import Check, describe
from chiasm.testing.common import calling, check_config, make_tiny, require
from chiasm.testing.errors import ContractError
from chiasm.testing.module_checks import Inputs, Probe, module_checks
from chiasm.testing.plugin_checks import light
from chiasm.testing.sequence_checks import check_input_gradient, check_meta, check_refused, check_sequence


class _AdapterProbe(Probe):
    item = "image"

    def rebuild(self, module: Any, seed: int) -> nn.Module:
        torch.default_generator.manual_seed(seed)
        with calling(f"{type(module).__name__}(config, sequence, llm_width)"):
            made: nn.Module = type(module)(module.config, module.sequence, module.llm_width)
        return made

    def inputs(self, module: Any, batch: int) -> Inputs:
        return (torch.randn(batch, module.sequence.tokens, module.sequence.width),)

    def run(self, module: Any, inputs: Inputs) -> Tensor:
        tokens: Tensor = module(TokenSequence(inputs[0], module.sequence.grid)).tokens
        return tokens


_probe = _AdapterProbe()


def config(cls: type[Adapter]) -> None:
    """`Config` is frozen, refuses unknown fields, and survives JSON."""
    check_config(cls, Settings, make_tiny(cls).config)


def spec(cls: type[Adapter]) -> None:
    """`forward` gives the tokens and grid that `spec` states, in the language model's width, for any batch."""
    adapter = make_tiny(cls)
    before = torch.get_rng_state()
    with calling("spec"):
        stated = cls.spec(adapter.config, adapter.sequence, adapter.llm_width)
    require(torch.equal(torch.get_rng_state(), before), "spec draws random numbers: it seems to make weights")
    require(stated == adapter.out, f"spec(tiny().config, ...) is {stated}, tiny().out is {adapter.out}")
    require(
        stated.width == adapter.llm_width,
        f"spec states the width {stated.width}, the language model has {adapter.llm_width}",
    )
    for batch in (1, 2, 3):
        _forward(adapter.eval(), batch)


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


def refuses_other_sequences(cls: type[Adapter]) -> None:
    """`forward` refuses a sequence that it was not built for with a ValueError, instead of mixing images."""
    adapter = make_tiny(cls).eval()
    own = adapter.sequence
    twice = None if own.grid is None else (own.grid[0] * 2, own.grid[1])
    wrong = {
        "twice the tokens": TokenSequence(torch.randn(2, own.tokens * 2, own.width), twice),
        "twice the width": TokenSequence(torch.randn(2, own.tokens, own.width * 2), own.grid),
    }
    for name, sequence in wrong.items():
        check_refused(lambda given=sequence: adapter(given), name, "a sequence", "self.sequence")  # type: ignore[misc]


def input_gradient(cls: type[Adapter]) -> None:
    """A gradient reaches the sequence, so that what comes before can be trained."""
    adapter = make_tiny(cls).eval()
    check_input_gradient(lambda *inputs: _probe.run(adapter, inputs), _probe.inputs(adapter, 2), ["the sequence"])


def _forward(adapter: Adapter, batch: int, after: str = "") -> None:
    sequence = TokenSequence(_probe.inputs(adapter, batch)[0], adapter.sequence.grid)
    with calling(f"{after}forward of {batch} images"):
        out: TokenSequence = adapter(sequence)
    check_sequence(out, adapter.out, batch, after)


CHECKS: tuple[Check, ...] = (
    config,
    spec,
    meta,
    any_geometry,
    refuses_other_sequences,
    input_gradient,
    *module_checks(_probe),
    light,
)
