"""The geometry of a causal language model of transformers, measured on the meta device: nothing is read or drawn."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from chiasm.errors import CheckpointError
from chiasm.llm import LanguageModelSpec
from chiasm_llms.lora import add_lora
from chiasm_llms.settings import Lora

BITS = {"8bit": 8, "4bit": 4}
"""What `quantize` says, in bits."""


def random_weights(config: PreTrainedConfig) -> PreTrainedModel:
    """A model with random weights from torch's global generator, in float32 and in eval mode."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
    )
    return model.eval()


def geometry(
    config: PreTrainedConfig, *, chat_template: bool, lora: Lora | None = None, quantize: str | None = None
) -> LanguageModelSpec:
    """What `LanguageModelSpec` asks of the model that a configuration of transformers makes.

    Raises:
        CheckpointError: transformers cannot make it, or it lacks what a language model of chiasm needs.
        ConfigError: `lora` names layers that it does not have.
    """
    text = config.get_text_config(decoder=True)
    context = getattr(text, "max_position_embeddings", None)
    if context is None:
        raise CheckpointError(f"{config.model_type!r} is not supported: its configuration states no context length")
    # a study plans one language model in hundreds of combinations
    key = (config.to_json_string(use_diff=False), lora)
    if key not in _measured:
        _measured[key] = _measure(config, lora)
    measured = _measured[key]
    return LanguageModelSpec(
        width=measured.width,
        vocabulary=measured.vocabulary,
        context_length=context,
        depth=text.num_hidden_layers,
        parameters=measured.parameters,
        chat_template=chat_template,
        # quantised weights are fixed: they have no gradient
        trainable=0 if quantize and lora is None else measured.trainable,
        matrix_parameters=measured.matrix_parameters,
        head_parameters=measured.head_parameters,
        attention_width=text.num_attention_heads * _head_width(text),
        matrix_bits=BITS[quantize] if quantize else None,
    )


@dataclass(frozen=True, slots=True)
class _Measured:
    width: int
    vocabulary: int
    parameters: int
    trainable: int
    matrix_parameters: int
    head_parameters: int


_measured: dict[tuple[str, Lora | None], _Measured] = {}


def _measure(config: PreTrainedConfig, lora: Lora | None) -> _Measured:
    """Sizes of the model that a configuration makes, counted on the meta device."""
    name = config.model_type
    try:
        with torch.device("meta"):
            model = random_weights(config)
    except Exception as error:  # an architecture's own reasons, of any type
        raise CheckpointError(f"transformers cannot make a causal language model of {name!r}: {error}") from error
    wanted = {"inputs_embeds", "attention_mask", "position_ids", "use_cache"}
    lacking = wanted - set(inspect.signature(model.get_decoder().forward).parameters)
    head = model.get_output_embeddings()
    if lacking or head is None:
        what = f"takes no {', '.join(sorted(lacking))}" if lacking else "has no output head"
        raise CheckpointError(f"{type(model).__name__} ({name!r}) is not supported: it {what}")
    if lora is not None:
        with torch.device("meta"):
            add_lora(model, lora)
    parameters = list(model.parameters())
    return _Measured(
        width=model.get_input_embeddings().weight.shape[1],
        vocabulary=head.weight.shape[0],
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        matrix_parameters=_matrix_parameters(model, config.get_text_config(decoder=True)),
        head_parameters=head.weight.numel(),
    )


def _matrix_parameters(model: PreTrainedModel, text: Any) -> int:
    """Parameters of the matrices that each position is multiplied with, the head's apart.

    Of a mixture of experts, whose matrices transformers stacks, those that one position goes through.
    """
    head = model.get_output_embeddings()
    total = 0
    for module in model.modules():
        if module is head or isinstance(module, nn.Embedding):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 2:
                total += parameter.numel()
            elif parameter.ndim == 3:
                total += parameter.numel() * text.num_experts_per_tok // len(parameter)
    return total


def _head_width(text: Any) -> int:
    """Of one attention head."""
    stated: int | None = getattr(text, "head_dim", None)
    return stated or text.hidden_size // text.num_attention_heads
