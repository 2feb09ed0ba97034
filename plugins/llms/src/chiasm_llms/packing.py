"""Attention within the documents of a packed row, for the models of transformers.

Registered as an attention of transformers' own, under `NAME`: with documents each attends to itself alone, without any
it is transformers' scaled dot-product attention, a mask of one element standing for none.

Shape letters: H heads of queries, K heads of keys and values, T positions of a packed row, d width of a head.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from chiasm.documents import Documents

NAME = "chiasm_documents"

# earlier versions take fewer heads of keys without being told
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def offer_packing(model: PreTrainedModel) -> bool:
    """Gives a model the attention that keeps documents apart, if it passes them on to it.

    Only a model on scaled dot-product attention is changed, and only where every layer's attention receives the
    documents, which a short row tells; its results without documents stay the same.
    """
    if model.config._attn_implementation != "sdpa":
        return False
    model.set_attn_implementation(NAME)
    try:
        kept = _separates(model)
    except (TypeError, ValueError, RuntimeError, NotImplementedError):  # an architecture with a signature of its own
        kept = False
    if not kept:
        model.set_attn_implementation("sdpa")
    return kept


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    documents: Documents | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: `[B, H, T, d]` and `[B, K, T, d]` to `[B, T, H, d]`."""
    window = kwargs.get("sliding_window")
    if documents is None:
        if attention_mask is not None and attention_mask.numel() == 1:
            attention_mask = _window_mask(query.shape[2], window, query.device)
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    query_HTd, key_KTd, value_KTd = query[0], key[0], value[0]
    half = query.dtype in (torch.bfloat16, torch.float16)
    if query.is_cuda and half and not dropout:
        bounds_P, longest = documents.bounds_P, documents.longest
        output_THd: Any = varlen_attn(
            query_HTd.transpose(0, 1).contiguous(),
            key_KTd.transpose(0, 1).contiguous(),
            value_KTd.transpose(0, 1).contiguous(),
            bounds_P,
            bounds_P,
            longest,
            longest,
            scale=scaling,
            window_size=(-1 if window is None else window - 1, 0),
            **_GROUPED,
        )
        return output_THd.unsqueeze(0), None
    lengths = list(documents.lengths)
    by_document = zip(*(torch.split(x, lengths, dim=1) for x in (query_HTd, key_KTd, value_KTd)), strict=True)
    parts = [_one(q, k, v, dropout=dropout, scaling=scaling, window=window) for q, k, v in by_document]
    return torch.cat(parts, dim=1).transpose(0, 1).unsqueeze(0), None


def _one(
    query_HTd: Tensor, key_KTd: Tensor, value_KTd: Tensor, *, dropout: float, scaling: float | None, window: int | None
) -> Tensor:
    """Causal attention of one document, `[H, T, d]`."""
    mask_TT = _window_mask(query_HTd.shape[1], window, query_HTd.device)
    return F.scaled_dot_product_attention(
        query_HTd.unsqueeze(0),
        key_KTd.unsqueeze(0),
        value_KTd.unsqueeze(0),
        attn_mask=mask_TT,
        dropout_p=dropout,
        is_causal=mask_TT is None,
        scale=scaling,
        enable_gqa=query_HTd.shape[0] != key_KTd.shape[0],
    ).squeeze(0)


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """`[T, T]`, True where a position sees another: itself and what stands less than a window before it.

    None where that is everything before it.
    """
    if window is None or length <= window:
        return None
    places_T = torch.arange(length, device=device)
    back_TT = places_T[:, None] - places_T
    return (back_TT >= 0) & (back_TT < window)


@torch.no_grad()
def _separates(model: PreTrainedModel) -> bool:
    """Whether two documents in one row have the hidden states that each has alone."""
    decoder, embeds_1TE = model.get_decoder(), short_row(model)
    training = model.training
    model.eval()
    try:
        first, second = (
            decoder(inputs_embeds=part, use_cache=False).last_hidden_state
            for part in torch.split(embeds_1TE, [2, 4], dim=1)
        )
        together = decode_packed(decoder, embeds_1TE, Documents.of([2, 4]).to(embeds_1TE.device))
    finally:
        model.train(training)
    return agree(together, torch.cat([first, second], dim=1))


@torch.no_grad()
def decodes_unmasked(model: PreTrainedModel) -> bool:
    """Whether `decode_unmasked` gives a model's own hidden states; asked of one that `offer_packing` has changed."""
    kinds = getattr(model.config, "layer_types", None) or ()
    if not set(kinds) <= {"full_attention", "sliding_attention"}:  # others are no windows, and a short row hides them
        return False
    decoder, embeds_BTE = model.get_decoder(), short_row(model).view(2, 3, -1)
    training = model.training
    model.eval()
    try:
        wanted = decoder(inputs_embeds=embeds_BTE, use_cache=False).last_hidden_state
        found = decode_unmasked(decoder, embeds_BTE)
    except (TypeError, ValueError, RuntimeError, NotImplementedError):
        return False
    finally:
        model.train(training)
    return agree(found, wanted)


def short_row(model: PreTrainedModel) -> Tensor:
    """Six different embeddings of a model to try it on, `[1, 6, E]`; the same each time."""
    table = model.get_input_embeddings().weight
    rows = torch.randperm(len(table), generator=torch.Generator().manual_seed(0), device="cpu")[:6]
    row_1TE: Tensor = table[rows.to(table.device)].unsqueeze(0)
    return row_1TE


def agree(found: Tensor, wanted: Tensor) -> bool:
    """Whether hidden states are of one shape, and equal to rounding."""
    if found.shape != wanted.shape:
        return False
    scale = max(1.0, wanted.abs().max().item())
    loose = 1e-4 if wanted.dtype == torch.float32 else 0.05
    return bool((found - wanted).abs().max().item() <= loose * scale)


def decode_packed(decoder: nn.Module, embeds_1TE: Tensor, documents: Documents, **kwargs: Any) -> Tensor:
    """The hidden states `[1, T, E]` of a packed row; the decoder takes further arguments by name."""
    return _decode(decoder, embeds_1TE, documents.positions_1T, documents=documents, **kwargs)


def decode_unmasked(decoder: nn.Module, embeds_BTE: Tensor, **kwargs: Any) -> Tensor:
    """The hidden states `[B, T, E]` of rows that all begin with their first position, likewise.

    Without any mask transformers looks whether positions start again somewhere, and a GPU has to do all that it was
    given before it can answer.
    """
    positions_1T = torch.arange(embeds_BTE.shape[1], device=embeds_BTE.device).unsqueeze(0)
    return _decode(decoder, embeds_BTE, positions_1T, **kwargs)


def _decode(decoder: nn.Module, embeds_BTE: Tensor, positions_1T: Tensor, **kwargs: Any) -> Tensor:
    # a mask of four axes is handed on as it is; without any transformers would build one of T x T
    unused_1111 = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=embeds_BTE.device)
    hidden_BTE: Tensor = decoder(
        inputs_embeds=embeds_BTE, attention_mask=unused_1111, position_ids=positions_1T, use_cache=False, **kwargs
    ).last_hidden_state
    return hidden_BTE


AttentionInterface.register(NAME, document_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
