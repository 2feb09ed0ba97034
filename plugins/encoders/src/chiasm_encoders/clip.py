"""CLIP's vision tower (Radford et al., arXiv 2103.00020)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import PositiveInt
from torch import Tensor, nn
from transformers import CLIPVisionModel

from chiasm.image import ImageSpec
from chiasm_encoders._tower import Tower
from chiasm_encoders._transformers import TransformersConfig, TransformersEncoder, ViTShape


class ClipShape(ViTShape):
    """A CLIP vision transformer with random weights; the default is ViT-L/14-336."""

    image_size: PositiveInt = 336
    patch_size: PositiveInt = 14
    width: PositiveInt = 1024
    depth: PositiveInt = 24
    heads: PositiveInt = 16
    mlp_width: PositiveInt = 4096
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    """OpenAI's models have `quick_gelu`, most of OpenCLIP's have `gelu`."""


class ClipConfig(TransformersConfig):
    """CLIP from a vision tower's checkpoint, a whole CLIP's, or that of a model around one, such as LLaVA."""

    shape: ClipShape | None = None


class ClipEncoder(TransformersEncoder):
    """CLIP: one CLS token, removed; layers without the last layer normalisation, which only CLS sees in CLIP."""

    Config = ClipConfig
    Shape = ClipShape
    models = (CLIPVisionModel,)
    published = ImageSpec(
        height=336,
        width=336,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        native="crop",
    )
    positions = "position_embedding.weight"

    @classmethod
    def architecture(cls, shape: ViTShape) -> dict[str, Any]:
        assert isinstance(shape, ClipShape)
        return super().architecture(shape) | {"hidden_act": shape.activation}

    @classmethod
    def block_inputs(cls, tower: Tower, pixels_B3HW: Tensor) -> tuple[Any, ...]:
        return (None,)

    @classmethod
    def stem(cls, model: Any) -> nn.Module:
        return nn.Sequential(model.embeddings, model.pre_layrnorm)  # transformers' spelling
