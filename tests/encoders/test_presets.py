"""Published checkpoints by name: planned without network at the published geometry, read once they are here."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch
from pydantic import ValidationError

from chiasm.errors import CheckpointError
from chiasm_encoders import presets
from chiasm_encoders.dinov2 import Dinov2Encoder
from chiasm_encoders.plugin import PRESETS

CLASSES = {name: getattr(presets, cls) for name, cls, _ in PRESETS}
GEOMETRY = {
    # name: hub id, pixels, edge of the grid, width, blocks, heads, millions of parameters of the blocks and the stem
    "clip-l-336": ("openai/clip-vit-large-patch14-336", 336, 24, 1024, 24, 16, 303.5),
    "clip-bigg-224": ("laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", 224, 16, 1664, 48, 16, 1842.8),
    "siglip-b-512": ("google/siglip-base-patch16-512", 512, 32, 768, 12, 12, 86.4),
    "siglip-so400m-384": ("google/siglip-so400m-patch14-384", 384, 27, 1152, 27, 16, 413.0),
    "siglip2-b-512": ("google/siglip2-base-patch16-512", 512, 32, 768, 12, 12, 86.4),
    "siglip2-so400m-384": ("google/siglip2-so400m-patch14-384", 384, 27, 1152, 27, 16, 413.0),
    "internvit-300m-448": ("OpenGVLab/InternViT-300M-448px-V2_5", 448, 32, 1024, 24, 16, 304.0),
    "internvit-6b-448": ("OpenGVLab/InternViT-6B-448px-V1-2", 448, 32, 3200, 45, 25, 5536.5),
    "dinov2-b": ("facebook/dinov2-base", 518, 37, 768, 12, 12, 86.6),
    "dinov2-l": ("facebook/dinov2-large", 518, 37, 1024, 24, 16, 304.4),
    "dinov2-g": ("facebook/dinov2-giant", 518, 37, 1536, 40, 24, 1136.5),
    "dinov2-b-reg": ("facebook/dinov2-with-registers-base", 518, 37, 768, 12, 12, 86.6),
    "dinov2-l-reg": ("facebook/dinov2-with-registers-large", 518, 37, 1024, 24, 16, 304.4),
    "dinov2-g-reg": ("facebook/dinov2-with-registers-giant", 518, 37, 1536, 40, 24, 1136.5),
    "dinov3-b": ("facebook/dinov3-vitb16-pretrain-lvd1689m", 224, 14, 768, 12, 12, 85.7),
    "dinov3-l": ("facebook/dinov3-vitl16-pretrain-lvd1689m", 224, 14, 1024, 24, 16, 303.1),
}
OMNIFUSION = {
    # the paper's table 3: tokens, layers, width
    "clip-bigg-224": (256, 48, 1664),
    "clip-l-336": (576, 24, 1024),
    "siglip-b-512": (1024, 12, 768),
    "internvit-6b-448": (1024, 45, 3200),
}
# what else the config.json of each hub id states
SIGLIP = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
DINOV2 = {"model_type": "dinov2", "hidden_act": "gelu", "layer_norm_eps": 1e-6, "mlp_ratio": 4, "use_swiglu_ffn": False}
REGISTERS = DINOV2 | {"model_type": "dinov2_with_registers", "num_register_tokens": 4}
INTERN = {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "use_absolute_position_embeddings": True}
DINOV3 = {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "num_register_tokens": 4, "use_gated_mlp": False}
DINOV3 |= {"query_bias": True, "key_bias": False, "value_bias": True, "proj_bias": True, "mlp_bias": True}
DINOV3 |= {"rope_theta": 100.0, "layerscale_value": 1.0, "patch_size": 16}
STATED = {
    "clip-l-336": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "intermediate_size": 4096, "patch_size": 14},
    "clip-bigg-224": {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "intermediate_size": 8192, "patch_size": 14},
    "siglip-b-512": SIGLIP | {"intermediate_size": 3072, "patch_size": 16},
    "siglip-so400m-384": SIGLIP | {"intermediate_size": 4304, "patch_size": 14},
    "siglip2-b-512": SIGLIP | {"intermediate_size": 3072, "patch_size": 16},
    "siglip2-so400m-384": SIGLIP | {"intermediate_size": 4304, "patch_size": 14},
    "internvit-300m-448": INTERN
    | {"norm_type": "layer_norm", "attention_bias": True, "use_qk_norm": False, "intermediate_size": 4096},
    "internvit-6b-448": INTERN
    | {"norm_type": "rms_norm", "attention_bias": False, "use_qk_norm": True, "intermediate_size": 12800},
    "dinov2-b": DINOV2,
    "dinov2-l": DINOV2,
    "dinov2-g": DINOV2 | {"use_swiglu_ffn": True},
    "dinov2-b-reg": REGISTERS,
    "dinov2-l-reg": REGISTERS,
    "dinov2-g-reg": REGISTERS | {"use_swiglu_ffn": True},
    "dinov3-b": DINOV3 | {"intermediate_size": 3072},
    "dinov3-l": DINOV3 | {"intermediate_size": 4096},
}
each_preset = pytest.mark.parametrize("name", GEOMETRY)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """An empty cache of the hub, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_every_preset_is_in_the_table():
    assert list(GEOMETRY) == list(CLASSES)


@each_preset
def test_the_geometry_is_known_without_network(name, monkeypatch):
    def ask(*args, **options):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("chiasm_encoders._checkpoint.cached_file", ask)
    source, pixels, grid, width, depth, heads, millions = GEOMETRY[name]
    cls = CLASSES[name]
    config = cls.Config()
    assert config.pretrained == source
    spec = cls.spec(config)
    assert (spec.image.height, spec.image.width) == (pixels, pixels)
    assert (spec.grid, spec.width, spec.depth) == ((grid, grid), width, depth)
    assert cls.Shape().heads == heads
    assert spec.parameters / 1e6 == pytest.approx(millions, rel=2e-3)
    tokens = grid * grid
    assert spec.flops / 1e9 == pytest.approx(
        2 * (tokens * millions * 1e6 + 2 * tokens**2 * width * depth) / 1e9, rel=0.03
    )
    tap = cls.spec(cls.Config(layers=-2))
    assert tap.parameters < spec.parameters


@each_preset
def test_the_architecture_is_the_published_one_in_all_that_has_no_shape(name):
    """An activation or an epsilon changes no parameter, and every feature."""
    cls = CLASSES[name]
    architecture = cls._architecture(cls.Config(pretrained=None))[1].to_dict()
    assert {field: architecture[field] for field in STATED[name]} == STATED[name]


@pytest.mark.parametrize("name", OMNIFUSION)
def test_the_papers_encoders(name):
    spec = CLASSES[name].spec(CLASSES[name].Config())
    assert (spec.features.tokens, spec.depth, spec.width) == OMNIFUSION[name]


@pytest.mark.parametrize(
    ("name", "mean", "native", "interpolation", "share"),
    [
        ("clip-bigg-224", 0.48145466, "crop", "bicubic", 1.0),
        ("siglip-so400m-384", 0.5, "squash", "bicubic", 1.0),
        ("siglip2-b-512", 0.5, "squash", "bilinear", 1.0),
        ("internvit-6b-448", 0.485, "crop", "bicubic", 1.0),
        ("dinov2-g-reg", 0.485, "crop", "bicubic", 0.875),
        ("dinov3-l", 0.485, "squash", "bilinear", 1.0),
    ],
)
def test_the_preprocessing_is_known_without_network(name, mean, native, interpolation, share):
    image = CLASSES[name].spec(CLASSES[name].Config()).image
    assert (image.mean[0], image.native, image.interpolation, image.crop_fraction) == (
        mean,
        native,
        interpolation,
        share,
    )


@each_preset
def test_weights_that_are_not_here_are_refused_with_what_to_do(name):
    with pytest.raises(CheckpointError, match=f"{GEOMETRY[name][0]}(.|\n)*hf download(.|\n)*HF_HOME"):
        CLASSES[name].build(CLASSES[name].Config())


@each_preset
def test_null_gives_random_weights_of_the_geometry(name):
    cls = CLASSES[name]
    assert cls.spec(cls.Config(pretrained=None)) == cls.spec(cls.Config())
    tiny = cls.tiny()
    assert tiny.config.pretrained is None
    with torch.no_grad():
        assert tiny(torch.zeros(1, 3, 16, 16)).tokens.shape == (1, 1, 16, 32)


@each_preset
def test_a_configuration_survives_json_and_pickle(name):
    config = CLASSES[name].Config(layers=-2)
    assert type(config).model_validate(config.model_dump(mode="json")) == config
    again = pickle.loads(pickle.dumps(config))
    assert (type(again), again) == (type(config), config)
    with pytest.raises(ValidationError, match="Extra inputs"):
        type(config)(patch=14)


def test_a_preset_at_another_resolution():
    cls = CLASSES["clip-l-336"]
    assert cls.spec(cls.Config(image_size=448)).grid == (32, 32)


@pytest.fixture
def downloaded(cache, checkpoints):
    """Puts a tiny checkpoint into the cache as the hub would have put it."""

    def put(name, source, **processor):
        folder = cache / f"models--{source.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        shutil.copytree(checkpoints(name).folder, folder / "snapshots" / ("0" * 40))
        (folder / "snapshots" / ("0" * 40) / "preprocessor_config.json").write_text(json.dumps(processor))

    return put


def test_what_is_here_counts_more_than_what_is_stated(downloaded, checkpoints):
    cls = CLASSES["dinov2-l-reg"]
    stated = cls.spec(cls.Config())
    file = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "size": {"height": 16, "width": 16}}
    downloaded("dinov2-registers", cls.stated, do_center_crop=False, **file)
    encoder = cls.build(cls.Config())
    reference = checkpoints("dinov2-registers")
    assert encoder.geometry == cls.spec(cls.Config())
    assert encoder.geometry != stated
    assert (encoder.geometry.image.mean, encoder.geometry.image.native) == ((0.1, 0.2, 0.3), "squash")
    pixels = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(encoder(pixels).tokens, reference.build()(pixels).tokens)


def test_another_checkpoint_may_be_named(checkpoints):
    cls = CLASSES["dinov2-b"]
    folder = str(checkpoints("dinov2").folder)
    encoder = cls.build(cls.Config(pretrained=folder))
    assert encoder.geometry == Dinov2Encoder.spec(Dinov2Encoder.Config(pretrained=folder))
