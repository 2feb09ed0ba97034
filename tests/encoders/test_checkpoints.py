"""Checkpoints that cannot be used are refused, with what they are and what to do."""

from __future__ import annotations

import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from chiasm.errors import CheckpointError
from chiasm_encoders.clip import ClipEncoder
from chiasm_encoders.dinov2 import Dinov2Encoder
from chiasm_encoders.internvit import InternVitEncoder
from chiasm_encoders.siglip import SiglipEncoder


@pytest.fixture
def copy(checkpoints, tmp_path):
    """A checkpoint's folder that a test may change, and the configuration that names it."""

    def make(name, **options):
        folder = shutil.copytree(checkpoints(name).folder, tmp_path / name)
        encoder = checkpoints(name).case.encoder
        return folder, encoder, encoder.Config.model_validate({"pretrained": str(folder), **options})

    return make


def _edit(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_spec_reads_no_weights(copy):
    folder, encoder, config = copy("clip-whole")
    built = encoder.spec(config)
    (folder / "model.safetensors").unlink()
    assert encoder.spec(config) == built
    with pytest.raises(CheckpointError, match=r"Wanted model\.safetensors"):
        encoder.build(config)


@pytest.mark.parametrize(
    ("encoder", "name", "held", "taker"),
    [
        (ClipEncoder, "siglip-whole", "siglip_vision_model", "'siglip'"),
        (SiglipEncoder, "clip", "clip_vision_model", "'clip'"),
        (Dinov2Encoder, "internvit", "internvl_vision", "'internvit'"),
        (InternVitEncoder, "dinov2-registers", "dinov2_with_registers", "'dinov2'"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_another_architecture_names_its_encoder(checkpoints, encoder, name, held, taker):
    config = encoder.Config.model_validate({"pretrained": str(checkpoints(name).folder)})
    with pytest.raises(CheckpointError, match=f"holds '{held}'.*The encoder {taker} takes it"):
        encoder.spec(config)
    with pytest.raises(CheckpointError, match=taker):
        encoder.build(config)


def test_an_architecture_of_no_encoder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match=r"holds 'bert'.*takes clip_vision_model\. No encoder"):
        ClipEncoder.spec(ClipEncoder.Config(pretrained=str(tmp_path)))


def test_a_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        ClipEncoder.build(ClipEncoder.Config(pretrained=str(tmp_path / "absent")))


@pytest.mark.parametrize("content", [None, "{}", "[]", "{not json", '{"model_type": "clip_vision_model", "depth": '])
def test_a_folder_without_a_usable_config(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ClipEncoder.spec(ClipEncoder.Config(pretrained=str(tmp_path)))


def test_a_config_that_transformers_refuses(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip_vision_model", "hidden_size": "wide"}')
    with pytest.raises(CheckpointError, match="not understood"):
        ClipEncoder.spec(ClipEncoder.Config(pretrained=str(tmp_path)))


def test_a_hub_id_without_network(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = ClipEncoder.Config(pretrained="openai/clip-vit-large-patch14-336")
    start = time.monotonic()
    for call in (ClipEncoder.spec, ClipEncoder.build):
        with pytest.raises(
            CheckpointError, match=r"'openai/clip-vit-large-patch14-336'(.|\n)*hf download(.|\n)*HF_HOME"
        ):
            call(config)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("clip", "encoder.layers.1.mlp.fc1.bias"),
        ("clip-whole", "vision_model.embeddings.class_embedding"),
        ("siglip-whole", "vision_model.embeddings.position_embedding.weight"),
        ("dinov2", "embeddings.cls_token"),
        ("dinov2-registers", "embeddings.register_tokens"),
        ("internvit", "encoder.layer.0.lambda_1"),
        ("internvit-whole", "vision_tower.encoder.layer.2.lambda_2"),
    ],
)
def test_a_missing_weight(copy, name, key):
    folder, encoder, config = copy(name)
    _edit(folder, lambda weights: weights.pop(key))
    with pytest.raises(CheckpointError, match=r"lacks .*random in part"):
        encoder.build(config)


@pytest.mark.parametrize(
    ("name", "key", "options"),
    [
        ("clip-whole", "vision_model.post_layernorm.weight", {}),
        ("siglip", "head.probe", {}),
        ("siglip", "post_layernorm.bias", {}),
        ("dinov2", "embeddings.mask_token", {}),
        ("dinov2", "layernorm.bias", {}),
        ("clip", "encoder.layers.2.mlp.fc1.bias", {"layers": -2}),
    ],
)
def test_a_missing_weight_that_nothing_uses(copy, name, key, options):
    folder, encoder, config = copy(name, **options)
    _edit(folder, lambda weights: weights.pop(key))
    encoder.build(config)


@pytest.mark.parametrize(("name", "key"), [("siglip", "post_layernorm.bias"), ("dinov2", "layernorm.bias")])
def test_a_missing_final_norm_that_is_used(copy, name, key):
    folder, encoder, config = copy(name, final_norm=True)
    _edit(folder, lambda weights: weights.pop(key))
    with pytest.raises(CheckpointError, match=key):
        encoder.build(config)


def test_a_weight_of_another_shape(copy):
    folder, encoder, config = copy("clip")
    key = "encoder.layers.1.mlp.fc1.bias"
    _edit(folder, lambda weights: weights.update({key: weights[key][:-1].clone()}))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        encoder.build(config)


def test_weights_that_the_config_does_not_know(copy):
    folder, encoder, config = copy("internvit-whole")
    settings = json.loads((folder / "config.json").read_text())
    settings["vision_config"]["use_qk_norm"] = False
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"knows nothing of: encoder\.layer\.0\.attention\.k_norm"):
        encoder.build(config)


def test_the_position_ids_of_old_files_are_no_weights(copy):
    folder, encoder, config = copy("clip-whole")
    ids = torch.arange(17).unsqueeze(0)
    _edit(folder, lambda weights: weights.update({"vision_model.embeddings.position_ids": ids}))
    encoder.build(config)


def test_an_old_whole_model_that_leaves_out_the_type_of_its_tower(copy):
    folder, encoder, config = copy("clip-whole")
    settings = json.loads((folder / "config.json").read_text())
    del settings["vision_config"]["model_type"]
    (folder / "config.json").write_text(json.dumps(settings))
    assert encoder.build(config).geometry.width == 32


def test_a_damaged_file(copy):
    folder, encoder, config = copy("siglip")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        encoder.build(config)


def test_pickled_weights_are_not_read(copy):
    folder, encoder, config = copy("clip")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"save_pretrained\('FOLDER'\)"):
        encoder.build(config)


def test_weights_in_half_precision_are_held_in_float32(copy):
    folder, encoder, config = copy("dinov2")
    _edit(folder, lambda weights: weights.update({name: tensor.half() for name, tensor in weights.items()}))
    settings = json.loads((folder / "config.json").read_text()) | {"dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(settings))
    assert {parameter.dtype for parameter in encoder.build(config).parameters()} == {torch.float32}


def test_a_patch_that_leaves_a_border_is_cut_as_the_model_cuts_it(tmp_path):
    """SigLIP so400m has 384 pixels and patches of 14: 27 x 27 tokens."""
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14, "hidden_size": 48})
    )
    spec = SiglipEncoder.spec(SiglipEncoder.Config(pretrained=str(tmp_path)))
    assert (spec.image.height, spec.grid) == (384, (27, 27))
