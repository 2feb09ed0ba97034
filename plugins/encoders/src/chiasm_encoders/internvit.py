"""InternViT, the vision tower of InternVL (Chen et al., arXiv 2312.14238)."""

from __future__ import annotations

from typing import Any

from pydantic import PositiveInt
from torch import nn
from transformers import InternVLVisionModel

from chiasm.image import ImageSpec
from chiasm_encoders._transformers import TransformersConfig, TransformersEncoder, ViTShape


class InternVitShape(ViTShape):
    """An InternViT with random weights, normalised as InternViT-6B is; the default is InternViT-6B-448."""

    image_size: PositiveInt = 448
    patch_size: PositiveInt = 14
    width: PositiveInt = 3200
    depth: PositiveInt = 45
    heads: PositiveInt = 25
    mlp_width: PositiveInt = 12800


class InternVitConfig(TransformersConfig):
    """InternViT in transformers' format: a vision tower's checkpoint or a whole InternVL's (`...-hf` on the hub).

    The original folders (`model_type` intern_vit_6b) bring their own code and another layout of weights: refused.
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
        return super().architecture(shape) | {"use_qk_norm": True, "norm_type": "rms_norm"}

    @classmethod
    def stem(cls, model: Any) -> nn.Module:
        model.embeddings.mask_token = None  # only pretraining uses it
        return super().stem(model)
