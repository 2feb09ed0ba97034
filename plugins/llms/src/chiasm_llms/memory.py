"""What a causal language model of transformers keeps for its backward pass, counted on fake tensors.

Shape letters: B sequences, T positions, E width.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

from chiasm.cost import saved_bytes
from chiasm_llms.geometry import random_weights
from chiasm_llms.lora import add_lora
from chiasm_llms.settings import Lora

_PROBE = 256
"""Positions of the sequence that is measured; what is kept grows in proportion."""

_PROBE_ATTENTION = "chiasm_probe"


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **_: object
) -> tuple[Tensor, None]:
    """Causal attention without a mask; of fake tensors transformers cannot tell that they need none."""
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register(_PROBE_ATTENTION, _attention)
AttentionMaskInterface.register(_PROBE_ATTENTION, lambda *args, **kwargs: None)

_measured: dict[tuple[str, Lora | None, bool], tuple[float, float]] = {}


def activation_bytes(config: PreTrainedConfig, lora: Lora | None, positions: int, *, trained: bool) -> int:
    """Bytes that the blocks keep of one sequence between forward and backward, with bfloat16 computation.

    Attention is taken to be a kernel that keeps no square of positions, as a GPU's is. One block and two are measured,
    and their difference stands for every other.

    Args:
        config: of the model.
        lora: its low-rank adaptation, if any.
        positions: of the sequence.
        trained: the model learns; else only what is before it does.
    """
    key = (config.to_json_string(use_diff=False), lora, trained)
    if key not in _measured:
        one, two = (_measure(config, lora, trained, depth) for depth in (1, 2))
        _measured[key] = (2 * one - two, two - one)
    rest, block = _measured[key]
    depth: int = config.get_text_config(decoder=True).num_hidden_layers
    return round(positions * (rest + depth * block))


def _measure(config: PreTrainedConfig, lora: Lora | None, trained: bool, depth: int) -> float:
    """Bytes for each position of a model of so many blocks."""
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:depth]
    with torch.device("meta"):
        whole = random_weights(config)
        if lora is not None:
            add_lora(whole, lora)
    whole.set_attn_implementation(_PROBE_ATTENTION)
    model = whole.get_decoder().train()
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        _on_cpu(model, trained)

        def forward(positions: int) -> Tensor:
            embeds_BTE = torch.empty(1, positions, text.hidden_size, dtype=torch.bfloat16, requires_grad=True)
            hidden: Tensor = model(inputs_embeds=embeds_BTE, use_cache=False).last_hidden_state
            return hidden

        # the difference leaves out what does not grow with the positions: copies of weights, tables of frequencies
        return (saved_bytes(lambda: forward(2 * _PROBE), model) - saved_bytes(lambda: forward(_PROBE), model)) / _PROBE


def _on_cpu(model: nn.Module, trained: bool) -> None:
    """Replaces the tensors of the meta device by those of the mode that is on, in the formats that training has."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            learns = trained and parameter.requires_grad
            values = torch.empty(parameter.shape, dtype=torch.float32 if learns else torch.bfloat16)
            module.register_parameter(name, nn.Parameter(values, requires_grad=learns))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
