"""Low-rank adaptation (LoRA, arXiv 2106.09685) by peft, put into a model of transformers in place.

The model stays what it is, not a wrapper of peft's: its embeddings, decoder, head and generation are reached as before.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from chiasm.errors import ConfigError
from chiasm_llms.settings import Lora


def add_lora(model: PreTrainedModel, lora: Lora) -> frozenset[str]:
    """Gives each target layer `W x` the term `(alpha / rank) B A dropout(x)`, and freezes everything else.

    B is zero, so the model gives what it gave before; A is drawn from torch's global generator (equation 3 and section
    4.1). Both are float32.

    Args:
        model: changed in place; its mode stays.
        lora: rank, scale, dropout and the layers.

    Returns:
        The names of the new parameters, the ones that learn.

    Raises:
        ConfigError: a target is none of the model's linear layers.
    """
    # peft imports much of transformers, which a model without LoRA does not need
    from peft import LoraConfig, inject_adapter_in_model

    linear = linear_layers(model)
    if lora.targets != "all-linear":
        kinds = {name.rpartition(".")[2] for name in linear}
        unknown = sorted(set(lora.targets) - kinds)
        if unknown:
            raise ConfigError(
                f"lora.targets: {', '.join(unknown)}: no such linear layer in a {type(model).__name__}, which has "
                f"{', '.join(sorted(kinds))}"
            )
        linear = [name for name in linear if name.rpartition(".")[2] in lora.targets]
    training = model.training
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=linear,
        # GPT-2's layers hold their matrices transposed
        fan_in_fan_out=isinstance(model.get_submodule(linear[0]), Conv1D),
    )
    inject_adapter_in_model(config, model)
    model.train(training)
    learned = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for parameter in learned.values():
        # beside quantised weights peft makes them bfloat16, in which small steps vanish
        parameter.data = parameter.data.float()
    return frozenset(learned)


def linear_layers(model: PreTrainedModel) -> list[str]:
    """The names of the linear layers of a model's blocks: all but its output head."""
    head = model.get_output_embeddings()
    return [name for name, part in model.named_modules() if isinstance(part, nn.Linear | Conv1D) and part is not head]
