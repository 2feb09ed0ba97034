"""What all vision transformers of the transformers library share.

Shape letters: B images, H and W pixels, T tokens with CLS and registers, N patch tokens, L layers, D width.
"""

from __future__ import annotations

import copy
import importlib
from typing import Any, ClassVar, Self

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from chiasm.encoder import Encoder, EncoderConfig, EncoderSpec, select_layers
from chiasm.errors import CheckpointError, ConfigError
from chiasm.features import Features, FeatureSpec
from chiasm.image import ImageSpec
from chiasm.settings import Settings
from chiasm_encoders import plugin
from chiasm_encoders._checkpoint import is_here, load_model, read_config, some
from chiasm_encoders._memory import activation_bytes
from chiasm_encoders._processor import check_pixels, image_spec
from chiasm_encoders._tower import Tower


class ViTShape(Settings):
    """The geometry of a vision transformer with random weights; a family gives the defaults."""

    cuts_patches: ClassVar[bool] = False
    """Whether the border that is no whole patch may be left out."""
    image_size: PositiveInt
    """Edge of the square image in pixels."""
    patch_size: PositiveInt
    """Edge of a patch in pixels."""
    width: PositiveInt
    depth: PositiveInt
    """Blocks."""
    heads: PositiveInt
    mlp_width: PositiveInt
    """Hidden width of each block's MLP."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.image_size % self.patch_size and not self.cuts_patches:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


_TINY = {"image_size": 16, "patch_size": 4, "width": 32, "depth": 3, "heads": 2, "mlp_width": 64}


class TransformersConfig(EncoderConfig):
    """Published weights, or random ones of any geometry."""

    shape: ViTShape | None = None
    """Geometry of random weights; null for the family's default. A checkpoint states its own."""
    image_size: PositiveInt | None = None
    """Edge of the square image in pixels, a multiple of the patch, for another resolution than the checkpoint's.
    Position embeddings are interpolated once, as transformers does it for the family."""

    @model_validator(mode="after")
    def _one_geometry(self) -> Self:
        if self.pretrained is not None and self.shape is not None:
            raise ValueError(
                "shape is for random weights, a checkpoint has its own: give pretrained or shape, not both"
            )
        return self


class TransformersEncoder(Encoder):
    """A vision transformer of the transformers library.

    A family sets `Config`, `Shape`, `models` and `published`, and overrides the methods in which it differs.
    Selected layers equal transformers' `hidden_states`, less the prefix tokens; blocks behind the last selected one
    are dropped. Images have the size that the checkpoint states, unless `image_size` asks for another.
    """

    Config: ClassVar[type[TransformersConfig]] = TransformersConfig
    Shape: ClassVar[type[ViTShape]]
    """Geometry of random weights, with the family's defaults."""
    models: ClassVar[tuple[Any, ...]]
    """The transformers classes that the family takes; the first is the one of random weights."""
    published: ClassVar[ImageSpec]
    """What the family's published processor does, for checkpoints without a processor file."""
    stated: ClassVar[str | None] = None
    """A hub id whose geometry `Shape` states and whose preprocessing `published` does, so that it is known before the
    checkpoint is here."""
    architecture_fixed: ClassVar[dict[str, Any]] = {}
    """Fields of transformers' configuration that are so whatever a checkpoint states."""
    positions: ClassVar[str | None] = "position_embeddings"
    """Name of the position embeddings in the part before the blocks; None where positions are no weights."""

    config: TransformersConfig

    def __init__(self, config: TransformersConfig) -> None:
        if config.pretrained is not None:
            self.read(config.pretrained)  # from the hub, where it is not here yet: from now on it is what counts
        super().__init__(config)
        model_class, architecture = self._architecture(config)
        self.layers = select_layers(config.layers, architecture.num_hidden_layers)
        self.prefix = self.prefix_tokens(architecture)
        if config.pretrained is None:
            model = model_class(architecture)
            self._resize(model, architecture, config)
            self.tower = self._tower(model, config)
        else:
            self.tower = self._load(model_class, architecture, config.pretrained)
        self.eval()

    @classmethod
    def spec(cls, config: EncoderConfig) -> EncoderSpec:
        assert isinstance(config, TransformersConfig)
        model_class, architecture = cls._architecture(config)
        architecture = _resized(architecture, config)
        depth: int = architecture.num_hidden_layers
        width: int = architecture.hidden_size
        layers = select_layers(config.layers, depth)
        size, patch = _pair(architecture.image_size), _pair(architecture.patch_size)
        # SigLIP so400m has 384 pixels and patches of 14: its own convolution leaves the rest of the border out
        features = FeatureSpec(len(layers), (size[0] // patch[0], size[1] // patch[1]), width)
        with torch.device("meta"):
            tower = cls._tower(model_class(architecture), config)
        return EncoderSpec(
            image=image_spec(None if cls._unseen(config) else config.pretrained, size, cls.published),
            features=features,
            depth=depth,
            parameters=sum(p.numel() for p in tower.parameters()),
            flops=tower.flops(features.tokens, features.tokens + cls.prefix_tokens(architecture), width),
        )

    @classmethod
    def activation_bytes(cls, config: EncoderConfig) -> int | None:
        assert isinstance(config, TransformersConfig)
        _, architecture = cls._architecture(config)
        # many cells of a study ask for the same one; a checkpoint's config.json may change between two of them
        key = (cls, config, architecture.to_json_string(use_diff=False))
        if key not in _kept:
            _kept[key] = cls._activation_bytes(config)
        return _kept[key]

    @classmethod
    def _activation_bytes(cls, config: TransformersConfig) -> int:
        image = cls.spec(config).image
        model_class, architecture = cls._architecture(config)
        architecture = _resized(architecture, config)
        with torch.device("meta"):
            tower = cls._tower(model_class(architecture), config)
        if tower.rotary is not None:
            # outside of what is counted, and real: transformers remembers the places of patches for all models
            tower.rotary.to_empty(device="cpu")
        arguments = cls.block_inputs(tower, torch.zeros(1, 3, image.height, image.width))
        layers, prefix = select_layers(config.layers, architecture.num_hidden_layers), cls.prefix_tokens(architecture)
        tower.rotary = None
        return activation_bytes(tower, lambda pixels_B3HW: tower(pixels_B3HW, arguments, layers, prefix), image)

    @classmethod
    def build(cls, config: EncoderConfig) -> Self:
        assert isinstance(config, TransformersConfig)
        return cls(config)

    @classmethod
    def tiny(cls) -> Self:
        return cls.build(cls.Config.model_validate({"pretrained": None, "shape": _TINY}))

    def forward(self, pixels_B3HW: Tensor) -> Features:
        check_pixels(pixels_B3HW, self.geometry.image)
        arguments = self.block_inputs(self.tower, pixels_B3HW)
        tokens_BLND = self.tower(pixels_B3HW, arguments, self.layers, self.prefix)
        return Features(tokens_BLND, self.geometry.grid)

    # where families differ

    @classmethod
    def block_inputs(cls, tower: Tower, pixels_B3HW: Tensor) -> tuple[Any, ...]:
        """What each block wants after its input; None stands for no attention mask."""
        return ()

    @classmethod
    def architecture(cls, shape: ViTShape) -> dict[str, Any]:
        """Fields of transformers' configuration for random weights; `model_type` where it is not the first."""
        return {
            "image_size": shape.image_size,
            "patch_size": shape.patch_size,
            "hidden_size": shape.width,
            "num_hidden_layers": shape.depth,
            "num_attention_heads": shape.heads,
            "intermediate_size": shape.mlp_width,
        }

    @classmethod
    def prefix_tokens(cls, architecture: Any) -> int:
        """Tokens before the patches: CLS and registers."""
        return 1

    @classmethod
    def stem(cls, model: Any) -> nn.Module:
        """The part of a transformers model before its blocks."""
        stem: nn.Module = model.embeddings
        return stem

    @classmethod
    def norm(cls, model: Any, config: TransformersConfig) -> nn.Module:
        """The part that a selected layer passes through."""
        return nn.Identity()

    @classmethod
    def rotary(cls, model: Any) -> nn.Module | None:
        """The part that makes rotary position embeddings from pixels."""
        return None

    @classmethod
    def read(cls, source: str) -> tuple[str, dict[str, Any]]:
        """The model type and the configuration of a checkpoint, in transformers' terms."""
        return read_config(source)

    @classmethod
    def load(cls, model_class: Any, architecture: Any, source: str) -> tuple[Any, set[str]]:
        """A model with the weights of a checkpoint in float32, and the names that the checkpoint lacks."""
        return load_model(model_class, architecture, source)

    @classmethod
    def model_types(cls) -> dict[str, Any]:
        """What checkpoints call the architectures that the family takes, and transformers' class of each."""
        return {model.config_class.model_type: model for model in cls.models}

    # how a model is made

    @classmethod
    def _architecture(cls, config: TransformersConfig) -> tuple[Any, Any]:
        """The transformers class and its configuration."""
        if config.pretrained is None or cls._unseen(config):
            fields = cls.architecture(config.shape or cls.Shape.model_validate({}))
            model_type = fields.get("model_type", cls.models[0].config_class.model_type)
        else:
            model_type, fields = cls.read(config.pretrained)
        model_class = cls.model_types().get(model_type)
        if model_class is None:
            raise CheckpointError(cls._refusal(str(config.pretrained), model_type))
        try:
            return model_class, model_class.config_class.from_dict(
                fields | cls.architecture_fixed, attn_implementation="sdpa"
            )
        except Exception as error:  # transformers' validation has exceptions of its own
            raise CheckpointError(f"config.json of {config.pretrained!r} is not understood: {error}") from error

    @classmethod
    def _unseen(cls, config: TransformersConfig) -> bool:
        return config.pretrained is not None and config.pretrained == cls.stated and not is_here(config.pretrained)

    @classmethod
    def _refusal(cls, source: str, model_type: str) -> str:
        message = f"pretrained: {source!r} holds {model_type!r}; this encoder takes {', '.join(cls.model_types())}."
        takers = [name for name, other in _families().items() if model_type in other.model_types()]
        return message + (f" The encoder {takers[0]!r} takes it." if takers else " No encoder of chiasm-encoders does.")

    @classmethod
    def _tower(cls, model: Any, config: TransformersConfig) -> Tower:
        # the one list of modules in a vision transformer is that of its blocks, whatever a release calls it
        (blocks,) = (module for module in model.modules() if isinstance(module, nn.ModuleList))
        last = max(select_layers(config.layers, len(blocks)))
        return Tower(cls.stem(model), blocks[:last], cls.norm(model, config), cls.rotary(model))

    @classmethod
    def _resize(cls, model: Any, architecture: Any, config: TransformersConfig) -> None:
        """Gives a model the position embeddings of the resolution that the configuration asks for."""
        resized = _resized(architecture, config)
        if cls.positions is None or resized is architecture:
            return
        height, width = _pair(resized.image_size)
        old, new = model.embeddings, type(model.embeddings)(resized)
        weights = old.state_dict()
        wanted = new.state_dict()[cls.positions]
        tokens_1TD = torch.empty(1, wanted.shape[-2], wanted.shape[-1])  # only its shape is looked at
        with torch.no_grad():
            positions = old.interpolate_pos_encoding(tokens_1TD, height, width)
        new.load_state_dict(weights | {cls.positions: positions.view_as(wanted)})
        model.embeddings = new

    def _load(self, model_class: Any, architecture: Any, source: str) -> Tower:
        model, missing = self.load(model_class, architecture, source)
        self._resize(model, architecture, self.config)
        names = {parameter: name for name, parameter in model.named_parameters()}
        tower = self._tower(model, self.config)
        random = missing & {names[parameter] for parameter in tower.parameters()}
        if random:
            raise CheckpointError(f"pretrained: {source!r} lacks {some(random)}; its encoder would be random in part")
        return tower


_kept: dict[tuple[type[TransformersEncoder], TransformersConfig, str], int] = {}
"""What `activation_bytes` found before."""


def _families() -> dict[str, type[TransformersEncoder]]:
    """The encoders of this distribution that are made here, by name; imported only to help with an error."""
    classes = {}
    for component in plugin.chiasm_components():
        module, _, name = component.target.partition(":")
        cls = getattr(importlib.import_module(module), name)
        if issubclass(cls, TransformersEncoder):
            classes[component.name] = cls
    return classes


def _resized(architecture: Any, config: TransformersConfig) -> Any:
    """The architecture at the resolution that the configuration asks for, the same object where it is its own.

    Raises:
        ConfigError: the resolution is no multiple of the patch.
    """
    size, patches = config.image_size, _pair(architecture.patch_size)
    if size is None or (size, size) == _pair(architecture.image_size):
        return architecture
    if any(size % patch for patch in patches):
        below = size - size % patches[0]
        near = f"{below} or {below + patches[0]}" if below else str(patches[0])
        raise ConfigError(f"image_size {size} is not a multiple of the patch of {patches[0]} pixels; try {near}")
    resized = copy.deepcopy(architecture)
    resized.image_size = size if isinstance(architecture.image_size, int) else (size, size)
    return resized


def _pair(size: Any) -> tuple[int, int]:
    """Height and width of a size in either of transformers' forms."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
