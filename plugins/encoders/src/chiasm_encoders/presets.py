"""Published checkpoints by name: each a family whose default weights and stated geometry are those of a hub id.

What is stated is what a study is planned with before the checkpoint is here; once it is, its own files count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import ConfigDict, Field

from chiasm.settings import Source
from chiasm_encoders._transformers import TransformersEncoder
from chiasm_encoders.clip import ClipEncoder
from chiasm_encoders.dinov2 import Dinov2Encoder
from chiasm_encoders.dinov3 import Dinov3Encoder
from chiasm_encoders.internvit import InternVitEncoder
from chiasm_encoders.siglip import SiglipEncoder

Family = TypeVar("Family", bound=type[TransformersEncoder])


def preset(source: str, *, image: dict[str, Any] | None = None, **shape: Any) -> Callable[[Family], Family]:
    """Makes a subclass of a family the one of a hub id.

    Args:
        source: the hub id, the default of `pretrained`; null gives random weights of the geometry.
        image: in what the published preprocessing differs from the family's.
        shape: in what the geometry differs from the family's default.
    """

    def decorate(cls: Family) -> Family:
        fields = {name: (cls.Shape.model_fields[name].annotation, value) for name, value in shape.items()}
        geometry = _nested(cls, "Shape", cls.Shape, fields)
        own = {"pretrained": (Source | None, source), "shape": (geometry | None, None)}
        cls.Config = _nested(cls, "Config", cls.Config, own)
        cls.Shape = geometry
        cls.stated = source
        cls.published = cls.published.model_copy(update=image or {})
        return cls

    return decorate


def _nested(cls: type, name: str, base: Any, fields: dict[str, tuple[Any, Any]]) -> Any:
    """A subclass of a configuration model with other defaults, found as an attribute of `cls` when it is unpickled."""
    namespace: dict[str, Any] = {
        field: Field(default, description=base.model_fields[field].description)
        for field, (_, default) in fields.items()
    }
    namespace |= {
        "__annotations__": {field: annotation for field, (annotation, _) in fields.items()},
        "__module__": cls.__module__,
        "__qualname__": f"{cls.__qualname__}.{name}",
        "__doc__": base.__doc__,
        # what each field is stands above; to look for it in this module's source would take most of the import
        "model_config": ConfigDict(use_attribute_docstrings=False),
    }
    return type(base)(name, (base,), namespace)


@preset("openai/clip-vit-large-patch14-336")
class ClipL336(ClipEncoder):
    """CLIP ViT-L/14-336."""


@preset(
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
    image_size=224,
    width=1664,
    depth=48,
    heads=16,
    mlp_width=8192,
    activation="gelu",
)
class ClipBigG224(ClipEncoder):
    """OpenCLIP ViT-bigG/14, trained on LAION-2B."""


@preset("google/siglip-base-patch16-512")
class SiglipB512(SiglipEncoder):
    """SigLIP ViT-B/16-512."""


_SO400M: dict[str, Any] = {
    "image_size": 384,
    "patch_size": 14,
    "width": 1152,
    "depth": 27,
    "heads": 16,
    "mlp_width": 4304,
}


@preset("google/siglip-so400m-patch14-384", **_SO400M)
class SiglipSo400m384(SiglipEncoder):
    """SigLIP so400m/14-384: 27 x 27 tokens, the border of 6 pixels is left out."""


@preset("google/siglip2-base-patch16-512", image={"interpolation": "bilinear"})
class Siglip2B512(SiglipEncoder):
    """SigLIP 2 ViT-B/16-512."""


@preset("google/siglip2-so400m-patch14-384", image={"interpolation": "bilinear"}, **_SO400M)
class Siglip2So400m384(SiglipEncoder):
    """SigLIP 2 so400m/14-384."""


_INTERN_CROP = {"native": "crop"}  # the original folders' processor files; transformers' format squashes


@preset(
    "OpenGVLab/InternViT-300M-448px-V2_5",
    image=_INTERN_CROP,
    width=1024,
    depth=24,
    heads=16,
    mlp_width=4096,
    norm="layer_norm",
    qk_norm=False,
    qkv_bias=True,
)
class InternVit300m448(InternVitEncoder):
    """InternViT-300M-448, distilled from the one of 6B."""


@preset("OpenGVLab/InternViT-6B-448px-V1-2", image=_INTERN_CROP)
class InternVit6b448(InternVitEncoder):
    """InternViT-6B-448 V1.2, OmniFusion's: 45 of its 48 blocks are published."""


_DINO_B: dict[str, Any] = {"width": 768, "depth": 12, "heads": 12, "mlp_width": 3072}
_DINO_G: dict[str, Any] = {"width": 1536, "depth": 40, "heads": 24, "mlp_width": 6144, "swiglu": True}


@preset("facebook/dinov2-base", **_DINO_B)
class Dinov2B(Dinov2Encoder):
    """DINOv2 ViT-B/14."""


@preset("facebook/dinov2-large")
class Dinov2L(Dinov2Encoder):
    """DINOv2 ViT-L/14."""


@preset("facebook/dinov2-giant", **_DINO_G)
class Dinov2G(Dinov2Encoder):
    """DINOv2 ViT-g/14."""


@preset("facebook/dinov2-with-registers-base", registers=4, **_DINO_B)
class Dinov2BRegisters(Dinov2Encoder):
    """DINOv2 ViT-B/14 with registers."""


@preset("facebook/dinov2-with-registers-large", registers=4)
class Dinov2LRegisters(Dinov2Encoder):
    """DINOv2 ViT-L/14 with registers."""


@preset("facebook/dinov2-with-registers-giant", registers=4, **_DINO_G)
class Dinov2GRegisters(Dinov2Encoder):
    """DINOv2 ViT-g/14 with registers."""


@preset("facebook/dinov3-vitb16-pretrain-lvd1689m", **_DINO_B)
class Dinov3B(Dinov3Encoder):
    """DINOv3 ViT-B/16."""


@preset("facebook/dinov3-vitl16-pretrain-lvd1689m")
class Dinov3L(Dinov3Encoder):
    """DINOv3 ViT-L/16."""
