"""The timm encoder: features and pixels equal timm's own, at every layer, for transformers and convolutions."""

from __future__ import annotations

import json
import shutil

import pytest
import timm
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_data_config
from timm.layers import resample_abs_pos_embed
from timm.models import save_for_hf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from chiasm.errors import CheckpointError, ConfigError
from chiasm.image import read_image, to_pixels
from chiasm_encoders._processor import timm_image_spec
from chiasm_encoders.timm_model import TimmConfig, TimmEncoder

SMALL = {"depth": 3, "embed_dim": 48, "num_heads": 3}
MODELS = {
    "test_vit": {"img_size": 64},
    "vit_small_patch16_dinov3": SMALL | {"img_size": 64},  # CLS, registers and rotary positions
    "vit_so400m_patch14_siglip_384": SMALL | {"img_size": 70},  # its head has a query of its own
    "swin_tiny_patch4_window7_224": {"img_size": 112, "embed_dim": 24, "depths": [1, 1, 2, 1]},  # channels last
    "test_resnet": {},
    "test_convnext": {},
    "test_efficientnet": {},
}
SIZES = {"test_vit": 64, "vit_small_patch16_dinov3": 64, "vit_so400m_patch14_siglip_384": 70}
SIZES |= {"swin_tiny_patch4_window7_224": 112}

each_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Timm's model of a name with weights that are far from their start, and the folder that timm wrote of it."""
    made = {}

    def get(name):
        if name not in made:
            torch.manual_seed(len(name))
            model = timm.create_model(name, num_classes=5, **MODELS[name]).eval()
            with torch.no_grad():
                for key, tensor in model.state_dict().items():
                    if tensor.is_floating_point():
                        noise = torch.randn_like(tensor)
                        tensor.add_(noise.abs() if key.endswith("running_var") else noise, alpha=0.1)
            folder = tmp_path_factory.mktemp(name)
            save_for_hf(model, folder, model_args=MODELS[name], safe_serialization=True)
            file = json.loads((folder / "config.json").read_text())
            file["pretrained_cfg"]["input_size"] = [3, SIZES.get(name, 160), SIZES.get(name, 160)]
            (folder / "config.json").write_text(json.dumps(file))
            made[name] = model, folder
        return made[name]

    return get


def _pixels(name, batch=2):
    size = SIZES.get(name, 160)
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def _tokens(map_BDhw):
    """Tokens `[B, N, D]` of a feature map, one by one."""
    return torch.stack([map_BDhw[:, :, i, j] for i in range(map_BDhw.shape[2]) for j in range(map_BDhw.shape[3])], 1)


def _config(folder, **options):
    return TimmConfig.model_validate({"pretrained": str(folder), **options})


@each_model
def test_every_layer_equals_timm(saved, name):
    model, folder = saved(name)
    pixels = _pixels(name)
    with torch.no_grad():
        _, maps = model.forward_intermediates(pixels, output_fmt="NCHW")
        alike = len({map_.shape for map_ in maps}) == 1
        for layers in ("all", 2) if alike else range(1, len(maps) + 1):
            encoder = TimmEncoder.build(_config(folder, layers=layers))
            features = encoder(pixels)
            assert features.spec == encoder.geometry.features
            assert encoder.geometry.depth == len(maps)
            wanted = maps if layers == "all" else [maps[layers - 1]]
            wanted = torch.stack([_tokens(map_) for map_ in wanted], 1)
            torch.testing.assert_close(features.tokens, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layers", ["all", [3, 1], [-1, 2]])
def test_layers_come_in_the_order_asked(saved, layers):
    model, folder = saved("vit_small_patch16_dinov3")
    with torch.no_grad():
        maps = model.forward_intermediates(_pixels("vit_small_patch16_dinov3"), output_fmt="NCHW")[1]
        tokens = TimmEncoder.build(_config(folder, layers=layers))(_pixels("vit_small_patch16_dinov3")).tokens
    order = [0, 1, 2] if layers == "all" else [layer - 1 if layer > 0 else layer for layer in layers]
    torch.testing.assert_close(tokens, torch.stack([_tokens(maps[i]) for i in order], 1), rtol=0, atol=1e-5)


def test_stages_of_one_geometry_may_be_selected_together():
    spec = TimmEncoder.spec(TimmConfig(model="test_vit", layers=(1, 6), image_size=32))
    assert (spec.features.layers, spec.grid, spec.width) == (2, (2, 2), 64)
    with pytest.raises(ConfigError, match=r"layer 3: 10 x 10, width 48; layer 4: 5 x 5, width 64.*select one layer"):
        TimmEncoder.spec(TimmConfig(model="test_convnext", layers=(3, 4)))
    with pytest.raises(ConfigError, match="differ in grid or width"):
        TimmEncoder.spec(TimmConfig(model="test_resnet", layers="all"))


@pytest.mark.parametrize("layer", [7, -7, [1, 9]])
def test_a_layer_out_of_range_is_refused(layer):
    with pytest.raises(ConfigError, match="6 blocks"):
        TimmEncoder.spec(TimmConfig(model="test_vit", layers=layer))


@each_model
@pytest.mark.parametrize("layer", [1, -1])
def test_what_is_held_is_what_the_layers_need(saved, name, layer):
    _, folder = saved(name)
    encoder = TimmEncoder.build(_config(folder, layers=layer))
    assert not encoder.training
    assert encoder.geometry == TimmEncoder.spec(encoder.config)
    assert encoder.geometry.parameters == sum(parameter.numel() for parameter in encoder.parameters())
    encoder(_pixels(name)).tokens.square().sum().backward()
    assert [key for key, parameter in encoder.named_parameters() if parameter.grad is None] == []
    assert not [key for key in encoder.state_dict() if key.startswith(("model.head.fc", "model.fc."))]


@pytest.mark.skipif(not timm.is_model("efficientvim_m1"), reason="older timm")
def test_a_parameter_that_no_layer_reads_becomes_a_buffer():
    """EfficientViM weighs the class scores of its stages by a parameter outside of its heads."""
    torch.manual_seed(0)
    encoder = TimmEncoder.build(TimmConfig(model="efficientvim_m1", image_size=64))
    assert "model.weights" in dict(encoder.named_buffers())
    assert "model.weights" not in dict(encoder.named_parameters())
    encoder(torch.randn(1, 3, 64, 64)).tokens.square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_statistics_of_batches_stay_as_they_are(saved):
    _, folder = saved("test_resnet")
    encoder = TimmEncoder.build(_config(folder))
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    encoder(_pixels("test_resnet"))
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize(
    "name", ["test_vit", "vit_small_patch16_dinov3", "test_resnet", "swin_tiny_patch4_window7_224"]
)
@pytest.mark.parametrize("layer", [2, -1])
def test_flops_are_those_of_a_pass(saved, name, layer):
    encoder = TimmEncoder.build(_config(saved(name)[1], layers=layer))
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:  # torch does not count its fused CPU attention
        encoder(_pixels(name, 1))
    assert encoder.geometry.flops == counter.get_total_flops()


def test_flops_of_a_vit_are_its_products():
    tokens, width, depth = 1 + 10 * 10, 64, 6
    hidden = timm.create_model("test_vit").blocks[0].mlp.fc1.out_features
    block = tokens * width * (4 * width + 2 * hidden) + 2 * tokens**2 * width
    patches = 100 * 3 * 16**2 * width
    assert TimmEncoder.spec(TimmConfig(model="test_vit")).flops == 2 * (patches + depth * block)


def test_weights_come_from_the_generator_and_not_from_the_layers():
    def build(layers):
        torch.manual_seed(7)
        config = TimmConfig.model_validate({"model": "test_vit", "image_size": 32, "layers": layers})
        return TimmEncoder.build(config).state_dict()

    whole, part = build(-1), build(2)
    assert len(part) < len(whole)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in part.items())
    before = torch.get_rng_state()
    TimmEncoder.spec(TimmConfig(model="test_vit3"))
    assert torch.equal(before, torch.get_rng_state())


# resolution


@pytest.mark.parametrize(
    ("name", "size", "grid", "prefix"),
    [
        ("test_vit", 32, 2, 1),  # interpolates at each pass
        ("test_vit", 96, 6, 1),
        ("vit_so400m_patch14_siglip_384", 84, 6, 0),  # is made for one size
        ("vit_so400m_patch14_siglip_384", 90, 6, 0),  # no multiple of the patch: its convolution leaves the rest out
    ],
)
def test_position_embeddings_are_interpolated_as_timm_does_it(saved, name, size, grid, prefix):
    model, folder = saved(name)
    other = timm.create_model(name, num_classes=5, **MODELS[name] | {"img_size": size}).eval()
    weights = model.state_dict()
    weights["pos_embed"] = resample_abs_pos_embed(weights["pos_embed"], (grid, grid), num_prefix_tokens=prefix)
    other.load_state_dict(weights)
    pixels = torch.randn(1, 3, size, size)
    encoder = TimmEncoder.build(_config(folder, image_size=size, layers="all"))
    assert (encoder.geometry.image.height, encoder.geometry.image.width) == (size, size)
    assert encoder.geometry.grid == (grid, grid)
    with torch.no_grad():
        _, maps = other.forward_intermediates(pixels, output_fmt="NCHW")
        wanted = torch.stack([_tokens(map_) for map_ in maps], 1)
        torch.testing.assert_close(encoder(pixels).tokens, wanted, rtol=0, atol=1e-5)


def test_a_convolution_takes_any_size(saved):
    model, folder = saved("test_resnet")
    pixels = torch.randn(1, 3, 96, 96)
    encoder = TimmEncoder.build(_config(folder, image_size=96, layers=4))
    with torch.no_grad():
        _, maps = model.forward_intermediates(pixels, output_fmt="NCHW")
        assert encoder.geometry.grid == (6, 6)
        torch.testing.assert_close(encoder(pixels).tokens[:, 0], _tokens(maps[3]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["test_vit", "maxvit_rmlp_pico_rw_256"])
def test_a_size_that_an_architecture_cannot_have_is_refused(name):
    with pytest.raises(ConfigError, match=f"{name}.*70"):
        TimmEncoder.spec(TimmConfig(model=name, image_size=70))


def test_pixels_of_another_size_are_refused(saved):
    with pytest.raises(ValueError, match=r"wanted \[B, 3, 64, 64\]"):
        TimmEncoder.build(_config(saved("test_vit")[1]))(torch.zeros(1, 3, 160, 160))


# pixels


@pytest.mark.parametrize(
    "name",
    [
        "test_vit",  # 95% of the shortest edge, bicubic
        "test_resnet",  # bilinear
        "vit_base_patch14_dinov2.lvd142m",  # all of it
        "vit_base_patch16_siglip_224.webli",  # squashed
        "vit_base_patch16_clip_384.openai_ft_in12k_in1k",  # squashed, then 95% of both edges
        "dm_nfnet_f0.dm_in1k",  # 90%
    ],
)
def test_native_pixels_equal_timms_transform(name, photographs):
    facts = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    spec = timm_image_spec(name, facts, None)
    transform = create_transform(**facts, is_training=False)
    wanted = torch.stack([transform(image) for image in photographs.values()])
    given = to_pixels([read_image(path) for path in photographs], spec, "native")
    assert given.shape == wanted.shape
    difference = (given - wanted).abs() * torch.tensor(spec.std).view(1, 3, 1, 1)
    assert difference.max() <= 1 / 255


def test_the_checkpoints_preprocessing_is_followed(saved, tmp_path):
    _, folder = saved("test_vit")
    folder = shutil.copytree(folder, tmp_path / "copy")
    file = json.loads((folder / "config.json").read_text())
    file["pretrained_cfg"] |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.8, "crop_mode": "squash"}
    (folder / "config.json").write_text(json.dumps(file))
    image = TimmEncoder.spec(_config(folder)).image
    assert (image.height, image.mean, image.std) == (64, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (image.native, image.crop_fraction, image.crop_start) == ("squash", 64 / 80, "even")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_mode": "border"}, "crop_mode 'border'; wanted center or squash"),
        ({"interpolation": "lanczos"}, "'bilinear' or 'bicubic'"),
        ({"input_size": (1, 28, 28)}, "1 channels; wanted the 3 of RGB"),
    ],
)
def test_preprocessing_that_cannot_be_stated_is_refused(change, message):
    facts = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg("test_vit").to_dict()) | change
    with pytest.raises(ConfigError, match=message):
        timm_image_spec("test_vit", facts, None)


# checkpoints


def test_a_model_that_timm_does_not_know_is_refused():
    with pytest.raises(ValidationError, match=r"knows no 'test_vitt'\. Did you mean 'test_vit"):
        TimmConfig(model="test_vitt")
    with pytest.raises(ValidationError, match="knows no 'hf-hub:timm/test_vit"):
        TimmConfig(model="hf-hub:timm/test_vit.r160_in1k")
    with pytest.raises(ValidationError, match="give model .* or pretrained"):
        TimmConfig()


def test_spec_reads_no_weights(saved, tmp_path):
    folder = shutil.copytree(saved("test_vit")[1], tmp_path / "copy")
    spec = TimmEncoder.spec(_config(folder))
    (folder / "model.safetensors").unlink()
    assert TimmEncoder.spec(_config(folder)) == spec
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        TimmEncoder.build(_config(folder))


def test_a_missing_weight_or_one_of_another_shape_is_refused(saved, tmp_path):
    folder = shutil.copytree(saved("test_vit")[1], tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    bias = weights.pop("blocks.1.mlp.fc1.bias")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"Missing key.*blocks\.1\.mlp\.fc1\.bias"):
        TimmEncoder.build(_config(folder))
    save_file(weights | {"blocks.1.mlp.fc1.bias": bias[:-1].clone()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"size mismatch for blocks\.1\.mlp\.fc1\.bias"):
        TimmEncoder.build(_config(folder))
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="cannot be made"):
        TimmEncoder.build(_config(folder))


def test_model_beside_pretrained_must_be_what_the_checkpoint_holds(saved):
    _, folder = saved("test_vit")
    assert TimmEncoder.spec(_config(folder, model="test_vit.r160_in1k")) == TimmEncoder.spec(_config(folder))
    with pytest.raises(CheckpointError, match="holds timm's 'test_vit', model says 'test_vit2'"):
        TimmEncoder.spec(_config(folder, model="test_vit2"))


def test_a_checkpoint_of_another_library_is_refused(checkpoints):
    with pytest.raises(CheckpointError, match=r"timm's format.*clip, siglip, dinov2"):
        TimmEncoder.spec(_config(checkpoints("clip").folder))


def test_a_checkpoint_may_not_say_where_weights_are(saved, tmp_path):
    folder = shutil.copytree(saved("test_vit")[1], tmp_path / "copy")
    file = json.loads((folder / "config.json").read_text())
    file["model_args"]["checkpoint_path"] = "/tmp/anything.pth"
    (folder / "config.json").write_text(json.dumps(file))
    with pytest.raises(CheckpointError, match="checkpoint_path"):
        TimmEncoder.spec(_config(folder))
