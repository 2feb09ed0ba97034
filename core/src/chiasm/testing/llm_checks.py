"""What every language model promises, its generation apart (`generation_checks`).

Shape letters: B sequences, T positions, E width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from chiasm.config import TokensConfig
from chiasm.errors import ChiasmError
from chiasm.llm import LanguageModel, LanguageModelConfig, LanguageModelSpec, Message
from chiasm.prompt import IGNORE, PromptBuilder
from chiasm.sample import Sample, Turn
from chiasm.testing.check import Check
from chiasm.testing.common import calling, check_config, check_missing_checkpoint, make_tiny, require
from chiasm.testing.errors import ContractError
from chiasm.testing.generation_checks import GENERATION_CHECKS
from chiasm.testing.module_checks import Inputs, Probe, check_close, module_checks
from chiasm.testing.plugin_checks import light
from chiasm.testing.sequence_checks import check_input_gradient

LENGTH = 7
"""Positions of the sequences that are tried."""

TOLERANCE = 1e-4
"""Of hidden states that must be equal: attention with a mask may take another path than without."""

TEXTS = ("Yes", "a red square", "What colour is it?", "There are 12 of them, or 7.", "(B)")


class _LanguageModelProbe(Probe):
    item = "sequence"

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

    def run(self, module: Any, inputs: Inputs) -> Tensor:
        # the embeddings of some ids beside the given ones, so that every parameter takes part
        embeds_BTE = inputs[0]
        ids_BT = torch.arange(3).expand(len(embeds_BTE), -1)
        text_BTE = module.embed(ids_BT).to(embeds_BTE.dtype)
        logits: Tensor = module.logits(module(torch.cat([text_BTE, embeds_BTE], dim=1)))
        return logits


_probe = _LanguageModelProbe()


def config(cls: type[LanguageModel]) -> None:
    """`Config` is frozen, refuses unknown fields, and survives JSON."""
    check_config(cls, LanguageModelConfig, make_tiny(cls).config)


def spec(cls: type[LanguageModel]) -> None:
    """`spec` states the geometry of an instance, without making its weights."""
    llm = make_tiny(cls)
    before = torch.get_rng_state()
    with calling("spec(tiny().config)"):
        stated = cls.spec(llm.config)
    require(
        torch.equal(torch.get_rng_state(), before),
        "spec draws random numbers: it seems to make weights; make them under torch.device('meta')",
    )
    require(
        isinstance(stated, LanguageModelSpec), f"spec returned a {type(stated).__name__}, wanted a LanguageModelSpec"
    )
    require(stated == llm.geometry, f"spec(tiny().config) is {stated}, tiny().geometry is {llm.geometry}")
    require(stated.context_length >= 1, f"spec states context_length = {stated.context_length}")


def parameters(cls: type[LanguageModel]) -> None:
    """`spec` states how many parameters an instance holds, tied ones once."""
    llm = make_tiny(cls)
    found = sum(parameter.numel() for parameter in llm.parameters())
    stated = llm.geometry.parameters
    require(found == stated, f"tiny() holds {found} parameters, its spec states parameters = {stated}")


def shapes(cls: type[LanguageModel]) -> None:
    """`embed`, `forward` and `logits` give the width and vocabulary that `spec` states, at any positions."""
    llm = make_tiny(cls).eval()
    width, vocabulary = llm.geometry.width, llm.geometry.vocabulary
    for shape in ((5,), (2, 3), (1, 1), (2, 0)):
        with calling(f"embed of ids of shape {shape}"):
            embeds = llm.embed(torch.zeros(shape, dtype=torch.int64))
        _same(tuple(embeds.shape), (*shape, width), f"embed of ids of shape {shape}", "(..., E)")
    with calling(f"embed of the last id {vocabulary - 1}"):
        llm.embed(torch.tensor([vocabulary - 1]))
    for batch in (1, 2, 3):
        hidden_BTE = _hidden(llm, _embeds(llm, batch))
        _same(tuple(hidden_BTE.shape), (batch, LENGTH, width), "forward", "(B, T, E)")
    for hidden in (hidden_BTE, hidden_BTE[:, -1], hidden_BTE[hidden_BTE[..., 0] > 1e9]):
        with calling(f"logits of hidden states of shape {tuple(hidden.shape)}"):
            logits = llm.logits(hidden)
        _same(tuple(logits.shape), (*hidden.shape[:-1], vocabulary), f"logits of {tuple(hidden.shape)}", "(..., V)")
        require(bool(logits.isfinite().all()), "logits returned NaN or infinity")
    check_close(
        llm.logits(hidden_BTE[:, -1]), llm.logits(hidden_BTE)[:, -1], "logits at one position depend on the others"
    )


def text(cls: type[LanguageModel]) -> None:
    """Text survives `tokenize` and `detokenize`; special ids are none of its tokens, and are left out of it."""
    llm = make_tiny(cls)
    vocabulary, special = llm.geometry.vocabulary, llm.special_ids
    require(llm.eos_id in special, f"special_ids {sorted(special)} lack eos_id {llm.eos_id}")
    require(llm.bos_id is None or llm.bos_id in special, f"special_ids {sorted(special)} lack bos_id {llm.bos_id}")
    for written in TEXTS:
        with calling(f"tokenize({written!r})"):
            ids = llm.tokenize(written)
        wrong = [i for i in ids if not (isinstance(i, int) and 0 <= i < vocabulary)]
        require(not wrong, f"tokenize({written!r}) gives {wrong[:3]}, wanted ints below the vocabulary, {vocabulary}")
        extra = [i for i in ids if i in special]
        require(not extra, f"tokenize({written!r}) adds the special ids {extra}; wanted the text alone, no BOS or EOS")
        with calling(f"detokenize({ids})"):
            back, ended = llm.detokenize(ids), llm.detokenize([*ids, llm.eos_id])
        require(back.strip() == written, f"{written!r} is {back!r} after tokenize and detokenize")
        require(ended.strip() == written, f"detokenize writes EOS into {ended!r}; wanted special tokens left out")
    outside = [i for i in special if not 0 <= i < vocabulary]
    require(not outside, f"the special ids {outside} are not in the vocabulary of {vocabulary}")


def chat(cls: type[LanguageModel]) -> None:
    """`render_chat` writes each message once and asks as it trains, or raises ValueError where there is no template."""
    llm = make_tiny(cls)
    messages = [
        Message(role="user", content="first question"),
        Message(role="assistant", content="first answer"),
        Message(role="user", content="second question"),
    ]
    if not llm.geometry.chat_template:
        try:
            llm.render_chat(messages, generate=True)
        except ValueError:
            return
        raise ContractError("spec states chat_template=False and render_chat works; wanted it to raise ValueError")
    with calling("render_chat"):
        rendered = llm.render_chat(messages, generate=True)
    places = [rendered.find(message["content"]) for message in messages]
    require(
        -1 not in places and places == sorted(places),
        f"render_chat does not write all contents in order: {rendered!r}",
    )
    builder = PromptBuilder(llm, TokensConfig(turns="template"), visual_tokens=1, system="")
    try:
        asked = builder.ask(Sample("asked", (Turn("a", "b"), Turn("c"))), reserve=1)
        trained = builder.train(Sample("trained", (Turn("a", "b"), Turn("c", "d"))))
    except ChiasmError as error:
        raise ContractError(f"the chat template cannot be trained on: {error}") from error
    length = len(asked)
    require(
        trained.ids[:length] == asked.ids,
        f"the template leads to an answer with {llm.render_chat(messages, generate=True)!r} when it is asked for, and "
        f"otherwise in training: ids {asked.ids[-8:]} and {trained.ids[:length][-8:]}",
    )
    require(
        trained.labels[length] == trained.ids[length] != IGNORE,
        "the token behind the template's generation prompt is not the first of the answer",
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
    check_input_gradient(lambda embeds: llm.logits(llm(embeds)), [_embeds(llm, 2)], ["the embeddings"])


def missing_checkpoint(cls: type[LanguageModel]) -> None:
    """A checkpoint that does not exist is refused, never replaced by random weights."""
    check_missing_checkpoint(cls)


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
    shapes,
    text,
    chat,
    padding,
    causal,
    input_gradient,
    *GENERATION_CHECKS,
    missing_checkpoint,
    *module_checks(_probe),
    light,
)
