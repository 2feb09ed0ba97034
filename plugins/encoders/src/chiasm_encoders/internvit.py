"""InternViT, the vision tower of InternVL (Chen et al., arXiv 2312.14238)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import PositiveInt
from torch import nn
from transformers import InternVLVisionModel

from chiasm.image import ImageSpec
from chiasm_encoders import _intern_layout
from chiasm_encoders._transformers import TransformersConfig, TransformersEncoder, ViTShape


class InternVitShape(ViTShape):
    """An InternViT with random weights; the default is InternViT-6B-448."""

    image_size: PositiveInt = 448
    patch_size: PositiveInt = 14
    width: PositiveInt = 3200
    depth: PositiveInt = 45
    heads: PositiveInt = 25
    mlp_width: PositiveInt = 12800
    norm: Literal["rms_norm", "layer_norm"] = "rms_norm"
    """Normalisation of each block: `rms_norm` in the one of 6B parameters, `layer_norm` in that of 300M."""
    qk_norm: bool = True
    """Queries and keys are normalised over all heads, as in the one of 6B."""
    qkv_bias: bool = False
    """Queries, keys and values have a bias, as in the one of 300M."""


class InternVitConfig(TransformersConfig):
    """InternViT from a vision tower's checkpoint or a whole InternVL's, in transformers' format (`...-hf` on the hub).

    The original layout (`OpenGVLab/InternViT-*`, `model_type` intern_vit_6b) is read too; its own code is not run.
    """

    shape: InternVitShape | None = None


class InternVitEncoder(TransformersEncoder):
    """InternViT: one CLS token, removed. It has no last normalisation."""

    Config = InternVitConfig
    Shape = InternVitShape
    models = (InternVLVisionModel,)
    published = ImageSpec(height=448, width=448, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), native="squash")

    @classmethod
    def architecture(cls, shape: ViTShape) -> dict[str, Any]:
        assert isinstance(shape, InternVitShape)
        own = {"norm_type": shape.norm, "use_qk_norm": shape.qk_norm, "attention_bias": shape.qkv_bias}
        return super().architecture(shape) | own

    @classmethod
    def stem(cls, model: Any) -> nn.Module:
        model.embeddings.mask_token = None  # only pretraining uses it
        return super().stem(model)

    @classmethod
    def read(cls, source: str) -> tuple[str, dict[str, Any]]:
        model_type, fields = super().read(source)
        if model_type == _intern_layout.MODEL_TYPE:
            return "internvl_vision", _intern_layout.settings(fields)
        return model_type, fields

    @classmethod
    def load(cls, model_class: Any, architecture: Any, source: str) -> tuple[Any, set[str]]:
        original = super().read(source)[0] == _intern_layout.MODEL_TYPE
        return (_intern_layout.load if original else super().load)(model_class, architecture, source)

    @classmethod
    def model_types(cls) -> dict[str, Any]:
        return super().model_types() | {_intern_layout.MODEL_TYPE: InternVLVisionModel}
