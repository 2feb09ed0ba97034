"""SigLIP's vision tower (Zhai et al., arXiv 2303.15343)."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import PositiveInt
from torch import Tensor, nn
from transformers import SiglipVisionModel

from chiasm.image import ImageSpec
from chiasm_encoders._tower import Tower
from chiasm_encoders._transformers import TransformersConfig, TransformersEncoder, ViTShape


class SiglipShape(ViTShape):
    """A SigLIP vision transformer with random weights; the default is ViT-B/16-512."""

    cuts_patches: ClassVar[bool] = True  # as so400m/14-384 does
    image_size: PositiveInt = 512
    patch_size: PositiveInt = 16
    width: PositiveInt = 768
    depth: PositiveInt = 12
    heads: PositiveInt = 12
    mlp_width: PositiveInt = 3072


class SiglipConfig(TransformersConfig):
    """SigLIP from a vision tower's checkpoint, a whole SigLIP's, or that of a model around one."""

    shape: SiglipShape | None = None
    final_norm: bool = False
    """Applies the last layer normalisation to each selected layer; without it layers are raw hidden states."""


class SiglipEncoder(TransformersEncoder):
    """SigLIP: every token is a patch, there is no CLS. Its pooling head is never built into the encoder."""

    Config = SiglipConfig
    Shape = SiglipShape
    models = (SiglipVisionModel,)
    published = ImageSpec(height=512, width=512, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), native="squash")
    positions = "position_embedding.weight"

    @classmethod
    def block_inputs(cls, tower: Tower, pixels_B3HW: Tensor) -> tuple[Any, ...]:
        return (None,)

    @classmethod
    def prefix_tokens(cls, architecture: Any) -> int:
        return 0

    @classmethod
    def norm(cls, model: Any, config: TransformersConfig) -> nn.Module:
        assert isinstance(config, SiglipConfig)
        return model.post_layernorm if config.final_norm else nn.Identity()
