"""InternViT's original checkpoints, read into transformers' classes: names, the fused projection and the settings.

The layout is that of `OpenGVLab/InternViT-*` and of the first InternVL models around them. Their own code is not run.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from chiasm.errors import CheckpointError
from chiasm_encoders._checkpoint import some, weight_files

MODEL_TYPE = "intern_vit_6b"
"""What the original files call every InternViT, the one with 300M parameters too."""

_SETTINGS = {
    # transformers' name: the original name, and what a file without it means
    "hidden_size": ("hidden_size", 3200),
    "num_hidden_layers": ("num_hidden_layers", 48),
    "num_attention_heads": ("num_attention_heads", 25),
    "intermediate_size": ("intermediate_size", 12800),
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 14),
    "num_channels": ("num_channels", 3),
    "hidden_act": ("hidden_act", "gelu"),
    "layer_norm_eps": ("layer_norm_eps", 1e-6),
    "norm_type": ("norm_type", "rms_norm"),
    "use_qk_norm": ("qk_normalization", True),
    "attention_bias": ("qkv_bias", False),
}
_NAMES = [
    (r"^embeddings\.class_embedding$", "embeddings.cls_token"),
    (r"^embeddings\.position_embedding$", "embeddings.position_embeddings"),
    (r"^embeddings\.patch_embedding\.", "embeddings.patch_embeddings.projection."),
    (r"^encoder\.layers\.", "encoder.layer."),
    (r"\.attn\.proj\.", ".attention.projection_layer."),
    (r"\.attn\.", ".attention."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.ls([12])$", r".lambda_\1"),
]


def settings(fields: dict[str, Any]) -> dict[str, Any]:
    """Transformers' configuration of an original one. Dropout and stochastic depth, for training it, are left out.

    Raises:
        CheckpointError: queries and keys are normalised with another epsilon than transformers' class has.
    """
    own = {name: fields.get(original, default) for name, (original, default) in _SETTINGS.items()}
    if own["use_qk_norm"] and own["layer_norm_eps"] != 1e-6:
        raise CheckpointError(
            f"pretrained: this InternViT normalises queries and keys with layer_norm_eps {own['layer_norm_eps']}; "
            "transformers' class has 1e-6, as the published ones have"
        )
    return own


def load(model_class: Any, architecture: Any, source: str) -> tuple[Any, set[str]]:
    """A transformers model in float32 with the weights of an original checkpoint, and the names that it lacks.

    Raises:
        CheckpointError: the weights are missing, unreadable, no safetensors, or disagree with config.json.
    """
    with torch.device("meta"):
        model = model_class(architecture)
    weights: dict[str, Tensor] = {}
    try:
        for path in weight_files(source):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    name = key.removeprefix("vision_model.")  # of a whole InternVL
                    if name.startswith(("embeddings.", "encoder.")):
                        weights |= _translated(name, file.get_tensor(key).float())
        result = model.load_state_dict(weights, strict=False, assign=True)
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"pretrained: the weights of {source!r} cannot be loaded: {reason}") from error
    if result.unexpected_keys:
        raise CheckpointError(
            f"pretrained: {source!r} has weights that its config.json knows nothing of: "
            f"{some(set(result.unexpected_keys))}"
        )
    return model, set(result.missing_keys)


def _translated(name: str, tensor: Tensor) -> dict[str, Tensor]:
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    if ".qkv." not in name:
        return {name: tensor}
    # a copy each: parts of one storage could be neither saved nor freed alone
    parts = zip("qkv", tensor.chunk(3), strict=True)
    return {name.replace(".qkv.", f".{part}_proj."): value.clone() for part, value in parts}
