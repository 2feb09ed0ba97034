"""DINOv2 (Oquab et al., arXiv 2304.07193), with registers or without (Darcet et al., arXiv 2309.16588)."""

from __future__ import annotations

from typing import Any, Self

from pydantic import NonNegativeInt, PositiveInt, model_validator
from torch import nn
from transformers import Dinov2Model, Dinov2WithRegistersModel

from chiasm.image import ImageSpec
from chiasm_encoders._transformers import TransformersConfig, TransformersEncoder, ViTShape


class Dinov2Shape(ViTShape):
    """A DINOv2 vision transformer with random weights; the default is ViT-L/14."""

    image_size: PositiveInt = 518
    patch_size: PositiveInt = 14
    width: PositiveInt = 1024
    depth: PositiveInt = 24
    heads: PositiveInt = 16
    mlp_width: PositiveInt = 4096
    registers: NonNegativeInt = 0
    """Learned tokens beside CLS; the published models with registers have 4."""
    swiglu: bool = False
    """The MLP has a gate and, to have as many weights, two thirds of `mlp_width`, as in the published ViT-g."""

    @model_validator(mode="after")
    def _ratio(self) -> Self:
        if self.mlp_width % self.width:
            raise ValueError(f"mlp_width {self.mlp_width} is not a multiple of width {self.width}, as DINOv2 has it")
        return self


class Dinov2Config(TransformersConfig):
    """DINOv2 from a checkpoint of either kind, with registers or without."""

    shape: Dinov2Shape | None = None
    final_norm: bool = False
    """Applies the last layer normalisation to each selected layer, as DINOv2's own `get_intermediate_layers` does;
    without it layers are raw hidden states."""


class Dinov2Encoder(TransformersEncoder):
    """DINOv2: CLS and the registers are removed. The image size is the checkpoint's, 518 for the published ones."""

    Config = Dinov2Config
    Shape = Dinov2Shape
    models = (Dinov2Model, Dinov2WithRegistersModel)
    published = ImageSpec(
        height=518,
        width=518,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        native="crop",
        crop_fraction=224 / 256,
    )

    @classmethod
    def architecture(cls, shape: ViTShape) -> dict[str, Any]:
        assert isinstance(shape, Dinov2Shape)
        fields = super().architecture(shape) | {"mlp_ratio": shape.mlp_width // shape.width}
        if shape.swiglu:
            fields["use_swiglu_ffn"] = True
        if shape.registers:
            fields |= {"model_type": "dinov2_with_registers", "num_register_tokens": shape.registers}
        return fields

    @classmethod
    def prefix_tokens(cls, architecture: Any) -> int:
        registers: int = architecture.num_register_tokens if architecture.model_type == "dinov2_with_registers" else 0
        return 1 + registers

    @classmethod
    def stem(cls, model: Any) -> nn.Module:
        model.embeddings.mask_token = None  # only pretraining uses it: it would be a parameter without gradient
        return super().stem(model)

    @classmethod
    def norm(cls, model: Any, config: TransformersConfig) -> nn.Module:
        assert isinstance(config, Dinov2Config)
        return model.layernorm if config.final_norm else nn.Identity()
