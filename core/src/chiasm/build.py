"""Builds the model of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from chiasm.adapter import Adapter
from chiasm.config import ComponentRef, RunConfig, resolve
from chiasm.encoder import Encoder
from chiasm.fusion import Fusion
from chiasm.llm import LanguageModel
from chiasm.prompt import learned_vectors
from chiasm.views import Views
from chiasm.vlm import VLM

Load = Callable[[str, ComponentRef, str], "Encoder | LanguageModel"]
"""Gives an encoder or a language model by kind, reference and random stream; a cache of frozen ones has this form."""


@contextmanager
def seeded(stream: str) -> Iterator[None]:
    """Draws what is inside from a stream of its own, so that one part's weights never depend on another's.

    Cells of a study that differ in one part then start with equal weights in all others.
    """
    digest = hashlib.sha256(stream.encode()).digest()
    with torch.random.fork_rng(devices=[]):  # weights are drawn on the CPU
        # not torch.manual_seed, which would reseed the GPUs as well
        torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        yield


def load_component(kind: str, ref: ComponentRef, stream: str) -> Encoder | LanguageModel:
    """Builds an encoder or a language model; random weights are drawn from `stream`."""
    cls, config = resolve(kind, ref)
    with seeded(stream):
        part: Encoder | LanguageModel = cls.build(config)
    return part


def build_vlm(run: RunConfig, load: Load = load_component) -> VLM:
    """The model of a run, in float32 on the CPU, with nothing frozen yet.

    Args:
        run: as `load_run` gives it.
        load: where encoders and language models come from.

    Raises:
        ChiasmError: a part cannot be loaded.
        ValueError: the parts do not fit; `chiasm plan` says so before anything is loaded.
    """
    encoders: list[Any] = [load("encoder", ref, f"{run.seed}/encoder.{i}") for i, ref in enumerate(run.vision.encoders)]
    llm: Any = load("llm", run.llm, f"{run.seed}/llm")
    fusion_cls, fusion_config = resolve("fusion", run.vision.fusion)
    adapter_cls, adapter_config = resolve("adapter", run.vision.adapter)
    width = llm.geometry.width
    with seeded(f"{run.seed}/fusion"):
        fusion: Fusion = fusion_cls(fusion_config, [encoder.geometry.features for encoder in encoders], width)
    with seeded(f"{run.seed}/adapter"):
        adapter: Adapter = adapter_cls(adapter_config, fusion.out, width)
    views = Views(run.vision.image, encoders[0].geometry.image, adapter.out)
    with seeded(f"{run.seed}/tokens"):
        return VLM(encoders, fusion, adapter, llm, views, learned_vectors(run.tokens))
