"""The last block's feed-forward part at some positions alone, for the models of transformers.

Where only some hidden states are asked for, as in training those at supervised positions, attention of the last block
reads all positions, and what comes behind it works on each position by itself: elsewhere nothing reads it.

Shape letters: B sequences, T positions, S positions that are asked for, E width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from chiasm.documents import Documents
from chiasm_llms.packing import agree, decode_packed, short_row

PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
"""Of a block of Llama's kin, which adds what attention gives, and then what its feed-forward part gives."""


class _AtPlaces(nn.Module):
    """A block that takes `places`: all blocks are told them, the last one keeps to them."""

    last: bool
    input_layernorm: nn.Module
    self_attn: nn.Module
    post_attention_layernorm: nn.Module
    mlp: nn.Module

    def forward(self, hidden_states: Tensor, *args: Any, places: Tensor | None = None, **kwargs: Any) -> Any:
        """`[B, T, E]` to `[B, T, E]`; the last one with int64 places in B x T gives theirs, `[1, S, E]`."""
        # in this order: code compiled for another block asks nothing of the places, and stays one for all of them
        if not self.last or places is None:
            return super().forward(hidden_states, *args, **kwargs)
        if args:
            raise TypeError("positional arguments of a block stand in another order in its attention")
        attended_BTE = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        # of three axes still: a mixture of experts asks for them
        hidden_1SE = (hidden_states + attended_BTE).flatten(0, 1).index_select(0, places).unsqueeze(0)
        return hidden_1SE + self.mlp(self.post_attention_layernorm(hidden_1SE))

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle looks a class up by its name, under which it would find transformers' own
        kind: Any = type(self).__bases__[-1]
        if issubclass(kind, _AtPlaces):
            return super().__reduce_ex__(protocol)
        return _blank, (kind,), self.__dict__


@cache  # one for all blocks of a model, or compiled code would be compiled anew for each
def _at_places(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_AtPlaces, kind), {"__module__": kind.__module__})


def _blank(kind: Any) -> nn.Module:
    made = _at_places(kind)
    return made.__new__(made)


def offer_places(model: PreTrainedModel, blocks: Sequence[nn.Module], *, packs: bool) -> bool:
    """Lets a model's decoder take `places=`, an int64 `[S]` in B x T, and give their hidden states alone, `[1, S, E]`.

    Only where its blocks are built as Llama's, and short rows have the same states at those places with it as without.
    Results without places, and names in the state, stay the same.

    Args:
        model: changed in place, where it keeps to this.
        blocks: of its decoder, in order.
        packs: rows of documents are tried too.
    """
    if not blocks:
        return False
    if isinstance(blocks[-1], _AtPlaces):  # a model that was offered before
        return True
    kind: Any = type(blocks[-1])
    if not all(type(block) is kind and _like_llamas(block) for block in blocks):
        return False
    for block in blocks:
        block.__class__ = _at_places(kind)
        cast(_AtPlaces, block).last = block is blocks[-1]
    try:
        kept = _keeps_to_places(model, blocks[-1], packs)
    except (TypeError, ValueError, RuntimeError, NotImplementedError):  # an architecture with a signature of its own
        kept = False
    if not kept:
        for block in blocks:
            block.__class__ = kind
            del block.last
    return kept


def _like_llamas(block: nn.Module) -> bool:
    """Whether a block has the parts of Llama's and none beside them, such as dropout or a scale of its own."""
    own = [*block.parameters(recurse=False), *block.buffers(recurse=False)]
    return {name for name, _ in block.named_children()} == PARTS and not own


@torch.no_grad()
def _keeps_to_places(model: PreTrainedModel, last: nn.Module, packs: bool) -> bool:
    """Whether a decoder that is told places gives the hidden states that it has there otherwise."""
    decoder, row_1TE = model.get_decoder(), short_row(model)
    ways = [partial(decoder, inputs_embeds=row_1TE.view(2, 3, -1), use_cache=False)]
    if packs:
        ways.append(partial(decode_packed, decoder, row_1TE, Documents.of([2, 4]).to(row_1TE.device)))
    places_S = torch.tensor([4, 1, 5], device=row_1TE.device)
    training = model.training
    model.eval()
    last.training = True  # dropout that the block draws by itself, and not in a part, makes the two differ
    try:
        with torch.random.fork_rng(devices=[row_1TE.device] if row_1TE.is_cuda else []):
            return all(
                agree(_states(way(places=places_S)), _states(way()).flatten(0, 1)[places_S].unsqueeze(0))
                for way in ways
            )
    finally:
        model.train(training)


def _states(output: Any) -> Tensor:
    states: Tensor = output if isinstance(output, Tensor) else output.last_hidden_state
    return states
