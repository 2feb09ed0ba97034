"""Any model of the timm library that gives a token map or a feature map, convolutional ones too.

Shape letters: B images, H and W pixels, (h, w) the grid, N = h * w tokens, D width.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import timm
import torch
from pydantic import PositiveInt, model_validator
from safetensors import SafetensorError
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from chiasm.encoder import Encoder, EncoderConfig, EncoderSpec, select_layers
from chiasm.errors import CheckpointError, ConfigError
from chiasm.features import Features, FeatureSpec
from chiasm_encoders._checkpoint import read_json, weight_files
from chiasm_encoders._memory import activation_bytes
from chiasm_encoders._processor import check_pixels, timm_image_spec

_FACTORY = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
"""Arguments of timm's factory that say where weights come from: a checkpoint's config.json may not."""


class TimmConfig(EncoderConfig):
    """A timm model by name, with random weights or those of a checkpoint in timm's format.

    `pretrained` is a hub id such as `timm/vit_base_patch16_224.augreg_in21k`, or a folder with config.json and
    model.safetensors as timm writes them for the hub. Layer i is timm's feature i - 1: a block of a transformer, a
    stage of a convolutional network, where stages differ in grid and width and are selected one at a time.
    """

    model: str | None = None
    """Timm's name, with its tag where there is one, whose preprocessing then applies; null where the checkpoint
    names its model."""
    image_size: PositiveInt | None = None
    """Edge of the square image in pixels, for another resolution than the model's; position embeddings are
    interpolated as timm does it, where an architecture allows it."""

    @model_validator(mode="after")
    def _some_model(self) -> Self:
        if self.model is None and self.pretrained is None:
            raise ValueError("give model (a name that timm knows) or pretrained (a checkpoint that names its model)")
        if self.model is not None and not timm.is_model(self.model):
            near = difflib.get_close_matches(self.model, timm.list_models(), 3)
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise ValueError(f"model: timm {timm.__version__} knows no {self.model!r}.{hint}")
        return self


class TimmEncoder(Encoder):
    """A timm model's feature maps as tokens; CLS, registers and other prefix tokens are removed.

    Blocks behind the last selected one and the head are dropped. Parameters that the selected layers never read (a
    last stage's projections to another scale, say) are held as buffers, so that all that is trained has a gradient.
    """

    Config = TimmConfig
    config: TimmConfig

    def __init__(self, config: TimmConfig) -> None:
        super().__init__(config)
        self.model = _create(config, weights=config.pretrained is not None)
        sketch = _sketch(config)
        self.layers = sketch.layers
        _prune(self.model, sketch.layers)
        _as_buffers(self.model, sketch.unread)
        self.eval()

    @classmethod
    def spec(cls, config: EncoderConfig) -> EncoderSpec:
        """The geometry, measured on the meta device.

        Raises:
            ConfigError: timm does not know the model, it gives no feature maps, it cannot have this size, or the
                selected layers differ in grid or width.
            CheckpointError: `pretrained` is missing or not in timm's format.
        """
        assert isinstance(config, TimmConfig)
        return _sketch(config).spec

    @classmethod
    def activation_bytes(cls, config: EncoderConfig) -> int | None:
        """None of the few models that hold tensors which are neither parameters nor buffers."""
        assert isinstance(config, TimmConfig)
        return _kept(config, None if config.pretrained is None else json.dumps(_checkpoint(config.pretrained)))

    @classmethod
    def build(cls, config: EncoderConfig) -> Self:
        assert isinstance(config, TimmConfig)
        return cls(config)

    @classmethod
    def tiny(cls) -> Self:
        return cls.build(TimmConfig(model="test_vit", image_size=64))

    def forward(self, pixels_B3HW: Tensor) -> Features:
        check_pixels(pixels_B3HW, self.geometry.image)
        maps = _maps(self.model, self.layers, pixels_B3HW)
        tokens_BLND = torch.stack([maps[layer].flatten(2).transpose(1, 2) for layer in self.layers], dim=1)
        return Features(tokens_BLND, self.geometry.grid)


@dataclass(frozen=True)
class _Sketch:
    """What a model without weights tells."""

    spec: EncoderSpec
    layers: tuple[int, ...]
    unread: frozenset[str]
    """Parameters that the selected layers never read."""


def _sketch(config: TimmConfig) -> _Sketch:
    # many cells of a study ask for the same one; a checkpoint's config.json may change between two of them
    return _draw(config, None if config.pretrained is None else json.dumps(_checkpoint(config.pretrained)))


@lru_cache(maxsize=64)
def _draw(config: TimmConfig, file: str | None) -> _Sketch:
    with torch.device("meta"):
        model = _create(config).eval()
    image = timm_image_spec(_name(config), resolve_model_data_config(model), config.image_size)
    depth = len(model.feature_info)
    layers = select_layers(config.layers, depth)
    _prune(model, layers)
    pixels = torch.empty(1, 3, image.height, image.width, device="meta")
    counter = FlopCounterMode(display=False)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            with counter, sdpa_kernel(SDPBackend.MATH):  # the one whose products are counted on every device
                maps = _maps(model, layers, pixels)
            torch.autograd.backward([map_.sum() for map_ in maps.values()])
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise ConfigError(
            f"model: timm's {_name(config)!r} gives no features of {image.height} x {image.width} pixels: "
            f"{_first_line(error)}"
        ) from error
    geometries = {
        layer: FeatureSpec(len(layers), (map_.shape[2], map_.shape[3]), map_.shape[1]) for layer, map_ in maps.items()
    }
    if len(set(geometries.values())) > 1:
        shapes = "; ".join(f"layer {n}: {g.grid[0]} x {g.grid[1]}, width {g.width}" for n, g in geometries.items())
        raise ConfigError(
            f"layers {config.layers} of timm's {_name(config)!r} differ in grid or width ({shapes}); "
            "select one layer, or those of one stage"
        )
    read = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.grad is not None}
    features = geometries[layers[0]]
    return _Sketch(
        EncoderSpec(image, features, depth, sum(read.values()), counter.get_total_flops()),
        layers,
        frozenset(name for name, _ in model.named_parameters() if name not in read),
    )


@lru_cache(maxsize=64)
def _kept(config: TimmConfig, file: str | None) -> int | None:
    """What `activation_bytes` says, of a checkpoint whose config.json is this."""
    sketch = _draw(config, file)
    with torch.device("meta"):
        model = _create(config)
    _prune(model, sketch.layers)
    _as_buffers(model, sketch.unread)

    def forward(pixels_B3HW: Tensor) -> Tensor:
        return torch.stack(list(_maps(model, sketch.layers, pixels_B3HW).values()), dim=1)

    try:
        return activation_bytes(model, forward, sketch.spec.image)
    except (RuntimeError, AssertionError):
        return None


def _name(config: TimmConfig) -> str:
    """The model's name: the configuration's, which a checkpoint must confirm, else the checkpoint's."""
    if config.pretrained is None:
        assert config.model is not None
        return config.model
    name = _checkpoint(config.pretrained).get("architecture")
    if not isinstance(name, str) or not timm.is_model(name):
        raise CheckpointError(
            f"pretrained: config.json of {config.pretrained!r} names the architecture {name!r}, which timm "
            f"{timm.__version__} does not know; wanted a checkpoint in timm's format. One in transformers' format is "
            "for the encoder of its family: clip, siglip, dinov2, ..."
        )
    if config.model is not None and config.model.partition(".")[0] != name:
        raise CheckpointError(f"pretrained: {config.pretrained!r} holds timm's {name!r}, model says {config.model!r}")
    return name


def _checkpoint(source: str) -> dict[str, Any]:
    config = read_json(source, "config.json")
    if config is None:
        raise CheckpointError(
            f"pretrained: {source!r} has no config.json; wanted a checkpoint as timm writes it for the hub: "
            "config.json and model.safetensors"
        )
    return config


def _create(config: TimmConfig, *, weights: bool = False) -> Any:
    """Timm's model, with its head: without weights of its own, or with those of the checkpoint."""
    name, options, facts = _name(config), {}, None
    if config.pretrained is not None:
        file = _checkpoint(config.pretrained)
        facts = dict(file.get("pretrained_cfg") or {})
        options = dict(file.get("model_args") or {})
        if file.get("num_classes") is not None:
            facts["num_classes"] = file["num_classes"]
        if _FACTORY & options.keys():
            raise CheckpointError(
                f"pretrained: model_args of {config.pretrained!r} say where weights come from "
                f"({', '.join(sorted(_FACTORY & options.keys()))}); wanted an architecture alone"
            )
    fixed = facts.get("fixed_input_size", False) if facts else timm.get_pretrained_cfg(name).fixed_input_size
    if config.image_size is not None and fixed:
        options["img_size"] = config.image_size
    elif facts and fixed and options.get("img_size") is not None:  # files may state the size before it was changed
        size = options["img_size"]
        facts["input_size"] = (3, size, size) if isinstance(size, int) else (3, *size)
    overlay: dict[str, Any] | None = None
    if weights:
        assert config.pretrained is not None
        files = weight_files(config.pretrained)
        if len(files) > 1:
            raise CheckpointError(f"pretrained: {config.pretrained!r} is in {len(files)} shards; timm reads one file")
        overlay = {"source": None, "state_dict": None, "file": str(files[0]), "custom_load": False}
    try:
        return timm.create_model(
            name, pretrained=weights, pretrained_cfg=facts, pretrained_cfg_overlay=overlay, **options
        )
    except (RuntimeError, ValueError, TypeError, AssertionError, KeyError, OSError, SafetensorError) as error:
        what = f"model: timm's {name!r}" if config.pretrained is None else f"pretrained: {config.pretrained!r}"
        edge = f" with images of {config.image_size} pixels" if config.image_size is not None else ""
        message = f"{what} cannot be made{edge}: {_first_line(error)}"
        raise (ConfigError if config.pretrained is None else CheckpointError)(message) from error


def _prune(model: Any, layers: tuple[int, ...]) -> None:
    """Drops the blocks behind the last layer, the last normalisation and the head."""
    if not hasattr(model, "prune_intermediate_layers") or not hasattr(model, "forward_intermediates"):
        raise ConfigError(
            f"model: {type(model).__name__} of timm {timm.__version__} has no forward_intermediates, by which a model "
            "gives its layers; a newer timm may have it"
        )
    model.prune_intermediate_layers([layer - 1 for layer in layers], prune_norm=True, prune_head=True)


def _maps(model: Any, layers: tuple[int, ...], pixels_B3HW: Tensor) -> dict[int, Tensor]:
    """The feature map `[B, D, h, w]` of each layer, without last normalisation."""
    order = sorted(layers)
    maps = model.forward_intermediates(
        pixels_B3HW,
        indices=[layer - 1 for layer in order],
        norm=False,
        stop_early=True,
        output_fmt="NCHW",
        intermediates_only=True,
    )
    return dict(zip(order, maps, strict=True))


def _as_buffers(model: nn.Module, names: frozenset[str]) -> None:
    for name in names:
        owner, _, own = name.rpartition(".")
        module = model.get_submodule(owner)
        tensor = module.get_parameter(own).detach()
        delattr(module, own)
        module.register_buffer(own, tensor)


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
