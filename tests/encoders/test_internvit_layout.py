"""InternViT's original layout: the features are those of its formula, written out here, and of transformers' class."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as tf
from safetensors.torch import save_file
from torch.nn import functional

from chiasm.errors import CheckpointError
from chiasm_encoders.clip import ClipEncoder
from chiasm_encoders.internvit import InternVitEncoder

PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SETTINGS = {
    "6b": {"qk_normalization": True, "qkv_bias": False, "norm_type": "rms_norm", "layer_norm_eps": 1e-6},
    "300m": {"qk_normalization": False, "qkv_bias": True, "norm_type": "layer_norm", "layer_norm_eps": 1e-5},
}
GEOMETRY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
GEOMETRY |= {"image_size": 16, "patch_size": 4, "hidden_act": "gelu"}
each_kind = pytest.mark.parametrize("kind", SETTINGS)


def _weights(kind):
    """Random weights under the original names."""
    torch.manual_seed(len(kind))
    width, hidden, norms = 32, 64, ("norm1", "norm2")
    shapes = {"embeddings.class_embedding": (1, 1, width), "embeddings.position_embedding": (1, 17, width)}
    shapes |= {"embeddings.patch_embedding.weight": (width, 3, 4, 4), "embeddings.patch_embedding.bias": (width,)}
    for n in range(3):
        block = {f"{norm}.weight": (width,) for norm in norms}
        block |= {"attn.qkv.weight": (3 * width, width), "ls1": (width,), "ls2": (width,)}
        block |= {"attn.proj.weight": (width, width), "attn.proj.bias": (width,)}
        block |= {"mlp.fc1.weight": (hidden, width), "mlp.fc1.bias": (hidden,)}
        block |= {"mlp.fc2.weight": (width, hidden), "mlp.fc2.bias": (width,)}
        if kind == "6b":
            block |= {"attn.q_norm.weight": (width,), "attn.k_norm.weight": (width,)}
        else:
            block |= {"attn.qkv.bias": (3 * width,)} | {f"{norm}.bias": (width,) for norm in norms}
        shapes |= {f"encoder.layers.{n}.{name}": shape for name, shape in block.items()}
    return {name: 0.3 * torch.randn(shape) + ("norm" in name) for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path):
    """Writes an original folder: `whole` within an InternVL, `shards` in several files."""

    def write(kind, *, whole=False, shards=1, change=lambda weights: None):
        weights = _weights(kind)
        change(weights)
        config = GEOMETRY | SETTINGS[kind] | {"model_type": "intern_vit_6b", "architectures": ["InternVisionModel"]}
        config["auto_map"] = {"AutoModel": "modeling_intern_vit.InternVisionModel"}
        if whole:
            weights = {f"vision_model.{name}": tensor for name, tensor in weights.items()}
            weights |= {"language_model.model.norm.weight": torch.ones(4), "mlp1.0.weight": torch.ones(4)}
            config = {"model_type": "internvl_chat", "vision_config": config, "llm_config": {"model_type": "qwen2"}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "modeling_intern_vit.py").write_text("raise SystemExit('code of a checkpoint was run')")
        names = sorted(weights)
        files = {f"model-{n}.safetensors": names[n::shards] for n in range(shards)} if shards > 1 else {}
        for file, own in (files or {"model.safetensors": names}).items():
            save_file({name: weights[name] for name in own}, tmp_path / file, metadata={"format": "pt"})
        if files:
            index = {"weight_map": {name: file for file, own in files.items() for name in own}}
            (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        return tmp_path

    return write


def _config(folder, **options):
    return InternVitEncoder.Config.model_validate({"pretrained": str(folder), **options})


def _formula(kind, pixels_B3HW):
    """The original forward pass in float64: patches of each layer, `[B, L, N, D]`."""
    w = {name: tensor.double() for name, tensor in _weights(kind).items()}
    eps = SETTINGS[kind]["layer_norm_eps"]

    def rms(x, name):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"]

    def norm(x, name):
        return (
            rms(x, name)
            if kind == "6b"
            else functional.layer_norm(x, (32,), w[f"{name}.weight"], w[f"{name}.bias"], eps)
        )

    patches = pixels_B3HW.double().unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(-1, 16, 48)
    x = patches @ w["embeddings.patch_embedding.weight"].reshape(32, 48).T + w["embeddings.patch_embedding.bias"]
    x = torch.cat([w["embeddings.class_embedding"].expand(len(x), -1, -1), x], 1) + w["embeddings.position_embedding"]
    layers = []
    for n in range(3):
        at = f"encoder.layers.{n}."
        q, k, v = (norm(x, at + "norm1") @ w[at + "attn.qkv.weight"].T + w.get(at + "attn.qkv.bias", 0)).chunk(3, -1)
        if kind == "6b":
            q, k = rms(q, at + "attn.q_norm"), rms(k, at + "attn.k_norm")
        heads = [(t.unflatten(-1, (2, 16)).transpose(1, 2)) for t in (q, k, v)]
        weights = (heads[0] @ heads[1].transpose(2, 3) / 16**0.5).softmax(-1)
        attended = (weights @ heads[2]).transpose(1, 2).flatten(2)
        x = x + w[at + "ls1"] * (attended @ w[at + "attn.proj.weight"].T + w[at + "attn.proj.bias"])
        inner = norm(x, at + "norm2") @ w[at + "mlp.fc1.weight"].T + w[at + "mlp.fc1.bias"]
        inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
        x = x + w[at + "ls2"] * (inner @ w[at + "mlp.fc2.weight"].T + w[at + "mlp.fc2.bias"])
        layers.append(x[:, 1:])
    return torch.stack(layers, 1)


@each_kind
@pytest.mark.parametrize("form", [{}, {"whole": True}, {"shards": 3}], ids=str)
def test_every_layer_is_that_of_the_original_formula(folder, kind, form):
    path = folder(kind, **form)
    wanted = _formula(kind, PIXELS)
    for layers, index in (("all", [0, 1, 2]), (2, [1]), (-1, [2])):
        encoder = InternVitEncoder.build(_config(path, layers=layers))
        with torch.no_grad():
            features = encoder(PIXELS)
        assert features.spec == encoder.geometry.features
        torch.testing.assert_close(features.tokens.double(), wanted[:, index], rtol=0, atol=1e-5)
        assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}


@each_kind
def test_the_same_model_in_both_layouts(folder, kind, tmp_path_factory):
    """A tiny InternVL vision model of transformers, its weights renamed and fused by hand."""
    path = folder(kind)
    own = SETTINGS[kind]
    config = tf.InternVLVisionConfig(
        **GEOMETRY,
        use_qk_norm=own["qk_normalization"],
        attention_bias=own["qkv_bias"],
        norm_type=own["norm_type"],
        layer_norm_eps=own["layer_norm_eps"],
    )
    model = tf.InternVLVisionModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    names = {
        "cls_token": "class_embedding",
        "position_embeddings": "position_embedding",
        "encoder.layer.": "encoder.layers.",
    }
    names |= {"patch_embeddings.projection": "patch_embedding", "layernorm_before": "norm1", "layernorm_after": "norm2"}
    names |= {"lambda_": "ls", "attention.projection_layer": "attn.proj", "attention.": "attn."}
    weights, fused = {}, {}
    for name, tensor in model.state_dict().items():
        for theirs, original in names.items():
            name = name.replace(theirs, original)
        head, _, tail = name.rpartition("_proj.")
        if head:
            fused.setdefault(f"{head[:-1]}qkv.{tail}", {})[head[-1]] = tensor
        else:
            weights[name] = tensor.clone()
    weights |= {name: torch.cat([parts[part] for part in "qkv"]) for name, parts in fused.items()}
    assert weights.keys() == _weights(kind).keys()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    theirs = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(theirs)
    with torch.no_grad():
        states = model(PIXELS, output_hidden_states=True).hidden_states
        for options in ({"layers": "all"}, {"layers": "all", "image_size": 24}):
            original = InternVitEncoder.build(_config(path, **options))
            converted = InternVitEncoder.build(_config(theirs, **options))
            assert original.geometry == converted.geometry
            pixels = torch.randn(1, 3, original.geometry.image.height, original.geometry.image.width)
            assert torch.equal(original(pixels).tokens, converted(pixels).tokens)
        given = InternVitEncoder.build(_config(path, layers="all"))(PIXELS).tokens
    wanted = torch.stack([state[:, 1:] for state in states[1:]], 1)
    torch.testing.assert_close(given, wanted, rtol=0, atol=1e-5)


@each_kind
def test_spec_reads_no_weights_and_all_that_is_built_learns(folder, kind):
    path = folder(kind)
    spec = InternVitEncoder.spec(_config(path, layers=2))
    encoder = InternVitEncoder.build(_config(path, layers=2))
    assert encoder.geometry == spec
    assert spec.parameters == sum(parameter.numel() for parameter in encoder.parameters())
    encoder(PIXELS).tokens.square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    (path / "model.safetensors").unlink()
    assert InternVitEncoder.spec(_config(path, layers=2)) == spec
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        InternVitEncoder.build(_config(path))


def test_the_processor_of_the_original_folder_is_followed(folder):
    """It crops: shortest edge to 448, then the middle."""
    path = folder("6b")
    file = {
        "crop_size": 448,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "resample": 3,
        "size": 448,
    }
    file |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (path / "preprocessor_config.json").write_text(json.dumps(file))
    image = InternVitEncoder.spec(_config(path)).image
    assert (image.native, image.crop_fraction, image.interpolation) == ("crop", 1.0, "bicubic")


def test_settings_that_a_file_leaves_out_are_those_of_6b(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "intern_vit_6b", "image_size": 448, "num_hidden_layers": 45})
    )
    spec = InternVitEncoder.spec(_config(tmp_path))
    assert spec == InternVitEncoder.spec(InternVitEncoder.Config())
    assert (spec.width, spec.depth, spec.grid) == (3200, 45, (32, 32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("encoder.layers.1.ls2"), r"lacks encoder\.layer\.1\.lambda_2; .*random in part"),
        (lambda w: w.pop("embeddings.class_embedding"), r"lacks embeddings\.cls_token"),
        (lambda w: w.update({"encoder.layers.0.attn.qkv.bias": torch.zeros(96)}), "knows nothing of.*_proj.bias"),
        (lambda w: w.update({"encoder.layers.2.ls1": torch.zeros(31)}), "size mismatch for encoder.layer.2.lambda_1"),
    ],
)
def test_weights_that_do_not_fit_are_refused(folder, change, message):
    with pytest.raises(CheckpointError, match=message):
        InternVitEncoder.build(_config(folder("6b", change=change)))


def test_a_missing_shard_and_a_damaged_file(folder):
    path = folder("6b", shards=2)
    (path / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks the shards model-1\.safetensors"):
        InternVitEncoder.build(_config(path))
    (path / "model-1.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        InternVitEncoder.build(_config(path))


def test_another_epsilon_of_queries_and_keys_is_refused(folder):
    path = folder("6b")
    config = json.loads((path / "config.json").read_text()) | {"layer_norm_eps": 1e-5}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="layer_norm_eps 1e-05"):
        InternVitEncoder.spec(_config(path))


def test_its_encoder_is_named_to_those_who_choose_another(folder):
    with pytest.raises(CheckpointError, match=r"holds 'intern_vit_6b'.*The encoder 'internvit' takes it"):
        ClipEncoder.spec(ClipEncoder.Config(pretrained=str(folder("300m"))))
