"""What every language model promises, its generation apart (`generation_checks`).

Shape letters: B sequences, T positions, E width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from chiasm.llm import LanguageModel, LanguageModelConfig, LanguageModelSpec
from chiasm.testing.check import Check
from chiasm.testing.common import calling, check_config, check_missing_checkpoint, make_tiny, require, some
from chiasm.testing.execution_checks import EXECUTION_CHECKS
from chiasm.testing.generation_checks import GENERATION_CHECKS
from chiasm.testing.model_checks import model_check
from chiasm.testing.module_checks import module_checks
from chiasm.testing.packing_checks import PACKING_CHECKS
from chiasm.testing.plugin_checks import light
from chiasm.testing.position_checks import POSITION_CHECKS
from chiasm.testing.probe import Inputs, Probe, check_close
from chiasm.testing.sequence_checks import check_input_gradient
from chiasm.testing.spec_checks import MOST_PARAMETERS, accepted, cheap_spec, check_options
from chiasm.testing.stand_ins import FlatConfig, StandInAdapter, StandInEncoder, StandInFusion
from chiasm.testing.text_checks import TEXT_CHECKS
from chiasm.vlm import VLM

LENGTH = 7
"""Positions of the sequences that are tried."""

TOLERANCE = 1e-4
"""Of hidden states that must be equal: attention with a mask may take another path than without."""

MOST_POSITIONS = 2048
"""Of a context that is tried in full."""


class _LanguageModelProbe(Probe):
    item = "sequence"
    keeps_dtype = False  # logits may be float32 whatever the weights are

    def rebuild(self, module: Any, seed: int) -> nn.Module:
        if module.config.pretrained is not None:  # its weights are no random ones
            tiny: nn.Module = make_tiny(type(module))
            return tiny
        torch.default_generator.manual_seed(seed)
        with calling("build(tiny().config)"):
            made: nn.Module = type(module).build(module.config)
        return made

    def inputs(self, module: Any, batch: int) -> Inputs:
        return (_embeds(module, batch),)

    def extremes(self, module: Any) -> dict[str, Inputs]:
        embeds = _embeds(module, 2)
        return {"embeddings of zeros": (torch.zeros_like(embeds),), "embeddings of hundreds": (100 * embeds,)}

    def run(self, module: Any, inputs: Inputs) -> Tensor:
        # the embeddings of some ids beside the given ones, so that every parameter takes part
        embeds_BTE = inputs[0]
        ids_BT = torch.arange(3, device=embeds_BTE.device).expand(len(embeds_BTE), -1)
        text_BTE = module.embed(ids_BT).to(embeds_BTE.dtype)
        logits: Tensor = module.logits(module(torch.cat([text_BTE, embeds_BTE], dim=1)))
        return logits


_probe = _LanguageModelProbe()


def config(cls: type[LanguageModel]) -> None:
    """`Config` is frozen, refuses unknown fields, and survives JSON and YAML."""
    check_config(cls, LanguageModelConfig, make_tiny(cls).config)


def spec(cls: type[LanguageModel]) -> None:
    """`spec` states the geometry of an instance, without making its weights."""
    llm = make_tiny(cls)
    stated = cheap_spec(lambda: cls.spec(llm.config), sum(p.numel() for p in llm.parameters()))
    require(
        isinstance(stated, LanguageModelSpec), f"spec returned a {type(stated).__name__}, wanted a LanguageModelSpec"
    )
    require(stated == llm.geometry, f"spec(tiny().config) is {stated}, tiny().geometry is {llm.geometry}")
    require(stated.context_length >= 1, f"spec states context_length = {stated.context_length}")
    with calling("build(tiny().config)"):
        built = cls.build(llm.config)
    require(
        isinstance(built, cls) and built.config == llm.config and built.geometry == stated,
        f"build(tiny().config) gives a {type(built).__name__} with {built.config!r} and {built.geometry}; wanted the "
        f"configuration that it was given, {llm.config!r}, and the geometry that spec states",
    )


def parameters(cls: type[LanguageModel]) -> None:
    """`spec` states how many parameters an instance holds, tied ones once."""
    _check_parameters(make_tiny(cls), "tiny()")


def trainable(cls: type[LanguageModel]) -> None:
    """`trainable` names parameters of the model, as many as `spec` states."""
    _check_trainable(make_tiny(cls), "tiny()")


def options(cls: type[LanguageModel]) -> None:
    """Whatever its options, `spec` refuses them, or states the width, vocabulary and parameters of an instance."""

    def attempt(config: LanguageModelConfig, when: str) -> None:
        stated = accepted(lambda: cls.spec(config), when)
        if stated.parameters > MOST_PARAMETERS:
            return
        torch.default_generator.manual_seed(1)
        made = cls.build(config).eval()
        require(made.geometry == stated, f"{when}spec states {stated}, the instance has {made.geometry}")
        _check_parameters(made, f"{when}an instance")
        _check_trainable(made, f"{when}an instance")
        logits = made.logits(_hidden(made, _embeds(made, 2)))
        _same(tuple(logits.shape), (2, LENGTH, stated.vocabulary), f"{when}logits", "(B, T, V)")

    check_options(make_tiny(cls), attempt)


def context(cls: type[LanguageModel]) -> None:
    """A sequence as long as the context that `spec` states is taken."""
    llm = make_tiny(cls).eval()
    length = llm.geometry.context_length
    if length > MOST_POSITIONS:
        return
    with calling(f"forward of {length} positions, the context_length that spec states,"), torch.no_grad():
        hidden = llm(torch.randn(1, length, llm.geometry.width))
    _same(tuple(hidden.shape), (1, length, llm.geometry.width), f"forward of {length} positions", "(B, T, E)")


def shapes(cls: type[LanguageModel]) -> None:
    """`embed`, `forward` and `logits` give the width and vocabulary that `spec` states, at any positions."""
    llm = make_tiny(cls).eval()
    width, vocabulary = llm.geometry.width, llm.geometry.vocabulary
    rows = torch.tensor([[0, 1, vocabulary - 1], [vocabulary // 2, 1, 2]])
    check_close(
        llm.embed(rows),
        torch.stack([torch.stack([llm.embed(i) for i in row]) for row in rows]),
        "embed of an id depends on its place or on the ids beside it; wanted a row of a table for each (positions "
        "belong into forward)",
    )
    for shape in ((5,), (2, 3), (1, 1), (2, 0)):
        with calling(f"embed of ids of shape {shape}"):
            embeds = llm.embed(torch.zeros(shape, dtype=torch.int64))
        _same(tuple(embeds.shape), (*shape, width), f"embed of ids of shape {shape}", "(..., E)")
    with calling(f"embed of the last id {vocabulary - 1}"):
        llm.embed(torch.tensor([vocabulary - 1]))
    for batch in (1, 2, 3):
        hidden_BTE = _hidden(llm, _embeds(llm, batch))
        _same(tuple(hidden_BTE.shape), (batch, LENGTH, width), "forward", "(B, T, E)")
    one = _hidden(llm, _embeds(llm, 1)[:, :1])
    _same(tuple(one.shape), (1, 1, width), "forward of one position", "(B, T, E)")
    for hidden in (hidden_BTE, hidden_BTE[:, -1], hidden_BTE[hidden_BTE[..., 0] > 1e9]):
        with calling(f"logits of hidden states of shape {tuple(hidden.shape)}"):
            logits = llm.logits(hidden)
        _same(tuple(logits.shape), (*hidden.shape[:-1], vocabulary), f"logits of {tuple(hidden.shape)}", "(..., V)")
        require(bool(logits.isfinite().all()), "logits returned NaN or infinity")
    check_close(
        llm.logits(hidden_BTE[:, -1]), llm.logits(hidden_BTE)[:, -1], "logits at one position depend on the others"
    )


def padding(cls: type[LanguageModel]) -> None:
    """Padding on either side, whatever it holds, changes no hidden state."""
    llm = make_tiny(cls).eval()
    embeds_BTE = _embeds(llm, 2)
    wanted = _hidden(llm, embeds_BTE)
    check_close(
        _hidden(llm, embeds_BTE, torch.ones(2, LENGTH, dtype=torch.bool)),
        wanted,
        "a mask that is True everywhere gives other states than no mask",
        TOLERANCE,
    )
    positions_BT = torch.arange(LENGTH).expand(2, -1)
    check_close(
        _hidden(llm, embeds_BTE, None, positions_BT),
        wanted,
        "positions 0, 1, 2, ... give other states than none",
        TOLERANCE,
    )
    for side in ("left", "right"):
        for amount in (1, 4):
            pad_BPE = torch.randn(2, amount, llm.geometry.width)
            absent, present = torch.zeros(2, amount, dtype=torch.bool), torch.ones(2, LENGTH, dtype=torch.bool)
            left = side == "left"
            padded = torch.cat([pad_BPE, embeds_BTE] if left else [embeds_BTE, pad_BPE], dim=1)
            mask_BT = torch.cat([absent, present] if left else [present, absent], dim=1)
            check_close(
                _hidden(llm, padded, mask_BT)[mask_BT].view_as(wanted),
                wanted,
                f"{amount} positions of padding on the {side} change the hidden states at real positions: mask them in "
                "attention, and count positions over real places only",
                TOLERANCE,
            )

    _check_ragged(llm, embeds_BTE, wanted)


def _check_ragged(llm: LanguageModel, embeds_BTE: Tensor, wanted: Tensor) -> None:
    """Each row has a mask of its own."""
    for side in ("left", "right"):
        mask_BT = torch.ones(2, LENGTH, dtype=torch.bool)
        absent, present = (slice(0, 3), slice(3, None)) if side == "left" else (slice(-3, None), slice(0, -3))
        mask_BT[1, absent] = False
        found = _hidden(llm, embeds_BTE, mask_BT)
        rows = (
            (found[0], wanted[0], "without padding"),
            (
                found[1, present],
                _hidden(llm, embeds_BTE[1:, present])[0],
                f"padded on the {side}",
            ),
        )
        for row, alone, what in rows:
            check_close(
                row,
                alone,
                f"the row {what} of a batch in which one row alone is padded on the {side} has other hidden states "
                "than by itself: each row has a mask and positions of its own",
                TOLERANCE,
            )


def padding_gradient(cls: type[LanguageModel]) -> None:
    """Padding gives finite hidden states and gradients, so that no NaN of an empty row spoils a batch."""
    for side in ("left", "right"):
        llm = make_tiny(cls).eval()
        embeds_BTE = _embeds(llm, 2).requires_grad_()
        mask_BT = torch.ones(2, LENGTH, dtype=torch.bool)
        mask_BT[1, slice(0, 3) if side == "left" else slice(-3, None)] = False
        with calling(f"forward of a sequence padded on the {side}"):
            hidden_BTE = llm(embeds_BTE.where(mask_BT.unsqueeze(-1), 0), mask_BT)
            finite = bool(hidden_BTE.isfinite().all())
            loss = llm.logits(hidden_BTE[mask_BT]).float().logsumexp(-1).mean()
        if not loss.requires_grad:
            return  # `input_gradient` tells
        (gradient,) = torch.autograd.grad(loss, [embeds_BTE])
        require(
            finite and bool(loss.isfinite()) and bool(gradient.isfinite().all()),
            f"a sequence padded on the {side} gives NaN or infinity: a position that sees no other needs a mask that "
            "leaves it something",
        )
        require(not gradient[~mask_BT].any(), f"a gradient reaches padding on the {side}: what stands there takes part")


def causal(cls: type[LanguageModel]) -> None:
    """A later token changes nothing before it, and changes what follows."""
    llm = make_tiny(cls).eval()
    embeds_BTE = _embeds(llm, 2)
    before = _hidden(llm, embeds_BTE)
    for place in (LENGTH - 1, LENGTH // 2):
        changed = embeds_BTE.clone()
        changed[:, place] = torch.randn(2, llm.geometry.width)
        after = _hidden(llm, changed)
        check_close(
            after[:, :place],
            before[:, :place],
            f"another embedding at position {place} changes hidden states before it: attention is not causal",
            TOLERANCE,
        )
        require(
            not torch.allclose(after[:, place:], before[:, place:], rtol=0, atol=1e-7),
            f"another embedding at position {place} changes no hidden state from there on: forward ignores embeds_BTE",
        )


def input_gradient(cls: type[LanguageModel]) -> None:
    """Frozen, it passes a gradient to its embeddings, so that an adapter before it can be trained."""
    llm = make_tiny(cls).eval().requires_grad_(False)
    check_input_gradient(llm, lambda embeds: llm.logits(llm(embeds)), [_embeds(llm, 2)], ["the embeddings"])


def missing_checkpoint(cls: type[LanguageModel]) -> None:
    """A checkpoint that does not exist is refused, never replaced by random weights."""
    check_missing_checkpoint(cls)


def _check_parameters(llm: LanguageModel, what: str) -> None:
    found = sum(parameter.numel() for parameter in llm.parameters())
    stated = llm.geometry.parameters
    require(found == stated, f"{what} holds {found} parameters, its spec states parameters = {stated}")


def _check_trainable(llm: LanguageModel, what: str) -> None:
    own = dict(llm.named_parameters(remove_duplicate=False))
    with calling("trainable"):
        given = llm.trainable()
    foreign = [name for name, parameter in given.items() if own.get(name) is not parameter]
    require(not foreign, f"trainable of {what} names {some(foreign)}, which {what} has no such parameter for")
    found, stated = sum(parameter.numel() for parameter in given.values()), llm.geometry.trainable
    require(found == stated, f"trainable of {what} gives {found} parameters, its spec states trainable = {stated}")


def _model(llm: LanguageModel) -> VLM:
    encoder = StandInEncoder.tiny()
    fusion = StandInFusion(FlatConfig(), [encoder.geometry.features], llm.geometry.width)
    return VLM([encoder], fusion, StandInAdapter(StandInAdapter.Config(), fusion.out, llm.geometry.width), llm)


def _embeds(llm: LanguageModel, batch: int) -> Tensor:
    return torch.randn(batch, LENGTH, llm.geometry.width)


@torch.no_grad()
def _hidden(
    llm: LanguageModel, embeds_BTE: Tensor, mask_BT: Tensor | None = None, positions_BT: Tensor | None = None
) -> Tensor:
    with calling("forward"):
        hidden: Tensor = llm(embeds_BTE, mask_BT, positions_BT)
    return hidden


def _same(found: tuple[int, ...], wanted: tuple[int, ...], what: str, letters: str) -> None:
    require(found == wanted, f"{what} returned {found}, declared {letters} = {wanted}")


CHECKS: tuple[Check, ...] = (
    config,
    spec,
    parameters,
    trainable,
    options,
    shapes,
    context,
    *TEXT_CHECKS,
    padding,
    padding_gradient,
    causal,
    input_gradient,
    *GENERATION_CHECKS,
    *EXECUTION_CHECKS,
    *PACKING_CHECKS,
    *POSITION_CHECKS,
    missing_checkpoint,
    *module_checks(_probe),
    model_check("llm", _model),
    light,
)
