"""The table: every family against its reference, at every layer, and on the pixels of real photographs.

The references are transformers' and timm's own models, loaded by their own means from the checkpoint's folder, and
their own image processors.
"""

from __future__ import annotations

import pytest
import timm
import torch
import transformers as tf
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.dinov3_vit.image_processing_dinov3_vit import DINOv3ViTImageProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from chiasm.image import read_image, to_pixels
from chiasm_encoders import presets
from chiasm_encoders.plugin import PRESETS
from chiasm_encoders.timm_model import TimmConfig, TimmEncoder

PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def _square(edge):
    return {"height": edge, "width": edge}


def _crop(edge, shortest):
    return {"size": {"shortest_edge": shortest}, "crop_size": _square(edge)}


# the checkpoint of each family, what loads it and how many tokens stand before the patches
FEATURES = [
    ("clip", tf.CLIPVisionModel, 1),
    ("clip-open", tf.CLIPVisionModel, 1),
    ("siglip", tf.SiglipVisionModel, 0),
    ("dinov2", tf.Dinov2Model, 1),
    ("dinov2-swiglu", tf.Dinov2Model, 1),
    ("dinov2-registers", tf.Dinov2WithRegistersModel, 4),
    ("dinov3", tf.DINOv3ViTModel, 3),
    ("dinov3-gated", tf.DINOv3ViTModel, 3),
    ("internvit", tf.InternVLVisionModel, 1),
]
# the published processor of each name, as its file on the hub states it
PIXELS_OF = {
    "clip-l-336": lambda: CLIPImageProcessorPil(**_crop(336, 336)),
    "clip-bigg-224": lambda: CLIPImageProcessorPil(**_crop(224, 224)),
    "siglip-b-512": lambda: SiglipImageProcessorPil(size=_square(512), **HALF),
    "siglip-so400m-384": lambda: SiglipImageProcessorPil(size=_square(384), **HALF),
    "siglip2-b-512": lambda: SiglipImageProcessorPil(size=_square(512), resample=2, **HALF),
    "siglip2-so400m-384": lambda: SiglipImageProcessorPil(size=_square(384), resample=2, **HALF),
    "internvit-300m-448": lambda: CLIPImageProcessorPil(**_crop(448, 448), **IMAGENET),
    "internvit-6b-448": lambda: CLIPImageProcessorPil(**_crop(448, 448), **IMAGENET),
    # the size is the weights' 518, at the processor's share of 224 in 256
    **{
        name: (lambda: BitImageProcessorPil(**_crop(518, 592), **IMAGENET))
        for name, _, _ in PRESETS
        if "dinov2" in name
    },
    "dinov3-b": lambda: DINOv3ViTImageProcessor(size=_square(224)),
    "dinov3-l": lambda: DINOv3ViTImageProcessor(size=_square(224)),
}


def _assert_pixels(given, wanted, std):
    assert given.shape == wanted.shape
    assert ((given - wanted).abs() * torch.tensor(std).view(1, 3, 1, 1)).max() <= 1 / 255


@pytest.mark.parametrize(
    ("name", "reference", "prefix"), FEATURES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_features_equal_transformers_at_each_layer(checkpoints, name, reference, prefix):
    checkpoint = checkpoints(name)
    model = reference.from_pretrained(checkpoint.folder, attn_implementation="eager").eval()
    with torch.no_grad():
        states = model(PIXELS, output_hidden_states=True).hidden_states
        for layer in range(1, len(states)):
            tokens = checkpoint.build(layers=layer)(PIXELS).tokens
            torch.testing.assert_close(tokens[:, 0], states[layer][:, prefix:], rtol=0, atol=1e-5)
        tokens = checkpoint.build(layers="all")(PIXELS).tokens
    torch.testing.assert_close(tokens, torch.stack(states[1:], 1)[:, :, prefix:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["test_vit2", "test_efficientnet", "test_convnext2"])
def test_features_and_pixels_equal_timm(name, tmp_path, photographs):
    """Whole: from image files to features, against timm's transform and timm's model of the same folder."""
    torch.manual_seed(0)
    save_for_hf(timm.create_model(name), tmp_path, safe_serialization=True)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    wanted = torch.stack([transform(image) for image in photographs.values()])
    images = [read_image(path) for path in photographs]
    with torch.no_grad():
        maps = model.forward_intermediates(wanted[:2], output_fmt="NCHW", intermediates_only=True)
        for layer, map_ in enumerate(maps, start=1):
            encoder = TimmEncoder.build(TimmConfig(pretrained=str(tmp_path), layers=layer))
            tokens = encoder(wanted[:2]).tokens[:, 0]
            torch.testing.assert_close(tokens, map_.flatten(2).transpose(1, 2), rtol=0, atol=1e-5)
    image = encoder.geometry.image
    _assert_pixels(encoder.preprocess(images), wanted, image.std)


@pytest.mark.parametrize("name", PIXELS_OF)
def test_pixels_equal_the_published_processor(name, photographs):
    cls = getattr(presets, {key: cls for key, cls, _ in PRESETS}[name])
    spec = cls.spec(cls.Config(pretrained=None)).image
    processor = PIXELS_OF[name]()
    wanted = torch.cat([processor(image, return_tensors="pt")["pixel_values"] for image in photographs.values()])
    _assert_pixels(to_pixels([read_image(path) for path in photographs], spec, "native"), wanted, spec.std)


def test_the_table_names_every_preset():
    assert sorted(PIXELS_OF) == sorted(name for name, _, _ in PRESETS)
