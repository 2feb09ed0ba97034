"""DINOv3 (Siméoni et al., arXiv 2508.10104)."""

from __future__ import annotations

from typing import Any, Self

from pydantic import NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn
from transformers import DINOv3ViTModel

from chiasm.image import ImageSpec
from chiasm_encoders._tower import Tower
from chiasm_encoders._transformers import TransformersConfig, TransformersEncoder, ViTShape


class Dinov3Shape(ViTShape):
    """A DINOv3 vision transformer with random weights; the default is ViT-L/16."""

    image_size: PositiveInt = 224
    patch_size: PositiveInt = 16
    width: PositiveInt = 1024
    depth: PositiveInt = 24
    heads: PositiveInt = 16
    mlp_width: PositiveInt = 4096
    registers: NonNegativeInt = 4
    """Learned tokens beside CLS."""
    gated: bool = False
    """The MLP has a gate (SwiGLU), as the published models from ViT-H+ on have it."""

    @model_validator(mode="after")
    def _rotates(self) -> Self:
        head = self.width // self.heads
        if head % 4:
            raise ValueError(
                f"width {self.width} over {self.heads} heads gives each {head} channels; wanted a multiple of 4, as "
                "positions rotate pairs of them for rows and for columns"
            )
        return self


class Dinov3Config(TransformersConfig):
    """DINOv3's vision transformer from its checkpoint. Its positions are rotary: any multiple of the patch will do."""

    shape: Dinov3Shape | None = None
    final_norm: bool = False
    """Applies the last layer normalisation to each selected layer; without it layers are raw hidden states."""


class Dinov3Encoder(TransformersEncoder):
    """DINOv3: CLS and the registers are removed. The random scaling of positions in its pretraining is off."""

    Config = Dinov3Config
    Shape = Dinov3Shape
    models = (DINOv3ViTModel,)
    published = ImageSpec(
        height=224,
        width=224,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        interpolation="bilinear",
        native="squash",
    )
    architecture_fixed = {"pos_embed_rescale": None, "pos_embed_shift": None, "pos_embed_jitter": None}
    positions = None

    @classmethod
    def architecture(cls, shape: ViTShape) -> dict[str, Any]:
        assert isinstance(shape, Dinov3Shape)
        own: dict[str, Any] = {"num_register_tokens": shape.registers, "use_gated_mlp": shape.gated}
        if shape.gated:
            own["hidden_act"] = "silu"
        return super().architecture(shape) | own

    @classmethod
    def block_inputs(cls, tower: Tower, pixels_B3HW: Tensor) -> tuple[Any, ...]:
        assert tower.rotary is not None
        return None, tower.rotary(pixels_B3HW)

    @classmethod
    def prefix_tokens(cls, architecture: Any) -> int:
        registers: int = architecture.num_register_tokens
        return 1 + registers

    @classmethod
    def stem(cls, model: Any) -> nn.Module:
        # only pretraining uses it: it would be a parameter without gradient
        del model.embeddings.mask_token
        model.embeddings.mask_token = None
        return super().stem(model)

    @classmethod
    def norm(cls, model: Any, config: TransformersConfig) -> nn.Module:
        assert isinstance(config, Dinov3Config)
        return model.norm if config.final_norm else nn.Identity()

    @classmethod
    def rotary(cls, model: Any) -> nn.Module | None:
        rotary: nn.Module = model.rope_embeddings
        return rotary
