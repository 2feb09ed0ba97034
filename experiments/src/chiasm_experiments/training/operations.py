"""Operations: how many a model needs for its samples, and how many a device can do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from chiasm.config import RunConfig, StageConfig
from chiasm.cost import connector_cost, train_flops
from chiasm.vlm import VLM
from chiasm_experiments.data.feed import Example

TERA = 1e12
PEAKS = {
    "B200": 2250,
    "GB200": 2500,
    "GH200": 989.4,
    "H200": 989.4,
    "H200 NVL": 835.5,
    "H100": 989.4,
    "H100 PCIe": 756.5,
    "H100 NVL": 835.5,
    "H800": 989.4,
    "H20": 148,
    "A100": 312,
    "A800": 312,
    "A40": 149.7,
    "A30": 165,
    "A10": 125,
    "A10G": 70,
    "L40": 181.05,
    "L40S": 362.05,
    "L4": 121,
    "RTX A6000": 154.8,
    "RTX 6000 Ada": 364.2,
    "RTX 3090": 71,
    "RTX 4090": 165.2,
    "RTX 5090": 209.5,
}
"""Dense bfloat16 products with float32 sums, in 10^12 operations a second, from NVIDIA's data sheets.

A name is looked for in what the driver calls the device; the longest counts.
"""


def peak_operations(name: str) -> float | None:
    """What a GPU of this name does at most in a second, in bfloat16 without sparsity; None: not known."""
    words = name.split()
    found = [known for known in PEAKS if _within(known.split(), words)]
    return PEAKS[max(found, key=len)] * TERA if found else None


def device_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """That of a device which computes in a dtype: None off a GPU, and in others than bfloat16."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return peak_operations(torch.cuda.get_device_name(device))


class ModelOperations:
    """Operations that one stage needs for samples, forward and backward, whatever is computed beyond them.

    Work that a cache saves, padding, and what activation checkpointing computes again are no part of them. The last
    block's feed-forward part is, at every position, as `train_flops` says.
    """

    def __init__(self, vlm: VLM, run: RunConfig, stage: StageConfig) -> None:
        encoders: list[Any] = list(vlm.encoders)
        features = [encoder.geometry.features for encoder in encoders]
        self.stage = stage
        self.llm = vlm.llm.geometry
        self.encode = sum(encoder.geometry.flops for encoder in encoders)
        self.connect = connector_cost(run, features, self.llm.width).flops

    def __call__(self, examples: Sequence[Example]) -> float:
        """The operations of some samples; an image counts as encoded where its pixels are given."""
        total = 0
        for example in examples:
            views = sum(len(image) for image in example.prompt.views)
            encode = views * self.encode if any(example.pixels) else 0
            connect = views * self.connect
            positions, answer = len(example.prompt), example.prompt.supervised
            total += train_flops(self.stage, self.llm, positions, answer, encode, connect)
        return float(total)


def _within(part: list[str], words: list[str]) -> bool:
    """Whether words stand in others, one after the other; `A100-SXM4-80GB` counts as `A100`."""
    heads = [word.partition("-")[0] for word in words]
    return any(heads[i : i + len(part)] == part for i in range(len(words)))
