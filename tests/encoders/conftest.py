"""Tiny checkpoints of every family, written by transformers itself, and the reference models that they hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images
from transformers.utils import logging

from chiasm_encoders._transformers import TransformersEncoder
from chiasm_encoders.clip import ClipEncoder
from chiasm_encoders.dinov2 import Dinov2Encoder
from chiasm_encoders.dinov3 import Dinov3Encoder
from chiasm_encoders.internvit import InternVitEncoder
from chiasm_encoders.siglip import SiglipEncoder

VIT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 8}
CHAT = tf.Qwen2Config(**TEXT, num_key_value_heads=1)
TOWERS = {
    "clip": tf.CLIPVisionConfig(**VIT, intermediate_size=64),
    "open": tf.CLIPVisionConfig(**VIT, intermediate_size=64, hidden_act="gelu"),
    "siglip": tf.SiglipVisionConfig(**VIT, intermediate_size=64),
    "dinov2": tf.Dinov2Config(**VIT, mlp_ratio=2),
    "registers": tf.Dinov2WithRegistersConfig(**VIT, mlp_ratio=2, num_register_tokens=3),
    "swiglu": tf.Dinov2Config(**VIT, use_swiglu_ffn=True),
    "dinov3": tf.DINOv3ViTConfig(**VIT, intermediate_size=64, num_register_tokens=2),
    "gated": tf.DINOv3ViTConfig(
        **VIT, intermediate_size=64, num_register_tokens=2, use_gated_mlp=True, hidden_act="silu", key_bias=True
    ),
    "internvit": tf.InternVLVisionConfig(**VIT, intermediate_size=64, use_qk_norm=True, norm_type="rms_norm"),
}
TEXT_TOWER = {**TEXT, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class Case:
    """A kind of checkpoint: who takes it, how transformers makes it, and where its tower is."""

    encoder: type[TransformersEncoder]
    make: Callable[[], Any]
    prefix: int
    tower: Callable[[Any], Any] = lambda model: model


CASES = {
    "clip": Case(ClipEncoder, lambda: tf.CLIPVisionModel(TOWERS["clip"]), 1),
    "clip-open": Case(ClipEncoder, lambda: tf.CLIPVisionModel(TOWERS["open"]), 1),
    "clip-whole": Case(
        ClipEncoder,
        lambda: tf.CLIPModel(
            tf.CLIPConfig(vision_config=TOWERS["clip"].to_dict(), text_config=tf.CLIPTextConfig(**TEXT_TOWER).to_dict())
        ),
        1,
        lambda model: model.vision_model,
    ),
    "clip-llava": Case(
        ClipEncoder,
        lambda: tf.LlavaForConditionalGeneration(tf.LlavaConfig(vision_config=TOWERS["clip"], text_config=CHAT)),
        1,
        lambda model: model.model.vision_tower,
    ),
    "siglip": Case(SiglipEncoder, lambda: tf.SiglipVisionModel(TOWERS["siglip"]), 0),
    "siglip-whole": Case(
        SiglipEncoder,
        lambda: tf.SiglipModel(
            tf.SiglipConfig(
                vision_config=TOWERS["siglip"].to_dict(), text_config=tf.SiglipTextConfig(**TEXT_TOWER).to_dict()
            )
        ),
        0,
        lambda model: model.vision_model,
    ),
    "dinov2": Case(Dinov2Encoder, lambda: tf.Dinov2Model(TOWERS["dinov2"]), 1),
    "dinov2-classifier": Case(
        Dinov2Encoder, lambda: tf.Dinov2ForImageClassification(TOWERS["dinov2"]), 1, lambda model: model.dinov2
    ),
    "dinov2-registers": Case(Dinov2Encoder, lambda: tf.Dinov2WithRegistersModel(TOWERS["registers"]), 4),
    "dinov2-swiglu": Case(Dinov2Encoder, lambda: tf.Dinov2Model(TOWERS["swiglu"]), 1),
    "dinov3": Case(Dinov3Encoder, lambda: tf.DINOv3ViTModel(TOWERS["dinov3"]), 3),
    "dinov3-gated": Case(Dinov3Encoder, lambda: tf.DINOv3ViTModel(TOWERS["gated"]), 3),
    "internvit": Case(InternVitEncoder, lambda: tf.InternVLVisionModel(TOWERS["internvit"]), 1),
    "internvit-whole": Case(
        InternVitEncoder,
        lambda: tf.InternVLForConditionalGeneration(
            tf.InternVLConfig(vision_config=TOWERS["internvit"], text_config=CHAT)
        ),
        1,
        lambda model: model.model.vision_tower,
    ),
}
FAMILIES = ["clip", "siglip", "dinov2", "dinov2-registers", "dinov3", "internvit"]
"""One checkpoint of each architecture."""


@dataclass(frozen=True)
class Checkpoint:
    case: Case
    folder: Path
    reference: Any
    """The vision tower as transformers holds it."""

    def build(self, **options: Any) -> TransformersEncoder:
        return self.case.encoder.build(self.config(**options))

    def config(self, **options: Any) -> Any:
        return self.case.encoder.Config.model_validate({"pretrained": str(self.folder), **options})


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """Gives the checkpoint of a case by its name, written once; not to be changed."""
    made: dict[str, Checkpoint] = {}
    logging.set_verbosity_error()

    def get(name: str) -> Checkpoint:
        if name not in made:
            case = CASES[name]
            torch.manual_seed(sorted(CASES).index(name))
            model = case.make().eval()
            with torch.no_grad():
                for parameter in model.parameters():  # some start at 0 or 1, which would hide a lost one
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[name] = Checkpoint(case, folder, case.tower(model))
        return made[name]

    return get


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, checkpoints: Callable[[str], Checkpoint]) -> Checkpoint:
    """A checkpoint of each architecture in turn."""
    return checkpoints(request.param)


@pytest.fixture(params=list(CASES))
def checkpoint(request: pytest.FixtureRequest, checkpoints: Callable[[str], Checkpoint]) -> Checkpoint:
    """A checkpoint of each kind in turn."""
    return checkpoints(request.param)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Image.Image]:
    """Files of two real photographs, of odd sizes, every mode that a file may have, and turned by their EXIF.

    Each with the image that a careful user would give to a published processor: upright, in RGB, on white.
    """
    folder = tmp_path_factory.mktemp("photographs")
    china, flower = (Image.fromarray(array) for array in load_sample_images().images)
    china.crop((0, 0, 639, 427)).save(folder / "639x427.png")
    flower.crop((100, 3, 401, 420)).save(folder / "301x417.png")
    china.resize((97, 61)).save(folder / "97x61.png")
    flower.resize((33, 150)).save(folder / "33x150.png")
    china.resize((223, 224)).convert("L").save(folder / "grey.png")
    flower.resize((150, 101)).quantize(32).save(folder / "palette.png")
    transparent = flower.resize((171, 133)).convert("RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize(transparent.size))
    transparent.save(folder / "rgba.png")
    transparent.convert("LA").save(folder / "grey-with-alpha.png")
    transparent.quantize(32).save(folder / "palette-with-alpha.png")
    few = flower.resize((64, 47)).quantize(8).convert("RGB")
    few.save(folder / "clear.png", transparency=_often(few))
    china.resize((91, 140)).convert("CMYK").save(folder / "cmyk.jpg")
    flower.resize((77, 58)).convert("1").save(folder / "two-colours.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter
    china.resize((203, 131)).save(folder / "turned.jpg", exif=exif)
    return {path: _upright(path) for path in sorted(folder.iterdir())}


def _often(image: Image.Image) -> tuple[int, ...]:
    """The most frequent colour of an image of few colours."""
    counts = image.getcolors(maxcolors=image.width * image.height)
    colour: tuple[int, ...] = max(counts)[1]
    return colour


def _upright(path: Path) -> Image.Image:
    image = ImageOps.exif_transpose(Image.open(path))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
        canvas.alpha_composite(image)
        image = canvas
    return image.convert("RGB")
