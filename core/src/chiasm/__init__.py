"""Chiasm settles how to build a vision-language model.

Names are imported on first use, so that `import chiasm` and the listing of plugins stay light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from chiasm.adapter import Adapter
    from chiasm.component import Component, Kind
    from chiasm.config import RunConfig, load_run
    from chiasm.encoder import Encoder, EncoderConfig, EncoderSpec
    from chiasm.features import Features, FeatureSpec, SequenceSpec, TokenSequence
    from chiasm.fusion import Fusion
    from chiasm.llm import LanguageModel, LanguageModelConfig, LanguageModelSpec
    from chiasm.plan import plan_run
    from chiasm.plugin import hookimpl
    from chiasm.sample import Sample, Turn
    from chiasm.settings import Settings
    from chiasm.vlm import VLM

_HOMES = {
    "adapter": ["Adapter"],
    "component": ["Component", "Kind"],
    "config": ["RunConfig", "load_run"],
    "encoder": ["Encoder", "EncoderConfig", "EncoderSpec"],
    "features": ["FeatureSpec", "Features", "SequenceSpec", "TokenSequence"],
    "fusion": ["Fusion"],
    "llm": ["LanguageModel", "LanguageModelConfig", "LanguageModelSpec"],
    "plan": ["plan_run"],
    "plugin": ["hookimpl"],
    "sample": ["Sample", "Turn"],
    "settings": ["Settings"],
    "vlm": ["VLM"],
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "VLM",
    "Adapter",
    "Component",
    "Encoder",
    "EncoderConfig",
    "EncoderSpec",
    "FeatureSpec",
    "Features",
    "Fusion",
    "Kind",
    "LanguageModel",
    "LanguageModelConfig",
    "LanguageModelSpec",
    "RunConfig",
    "Sample",
    "SequenceSpec",
    "Settings",
    "TokenSequence",
    "Turn",
    "hookimpl",
    "load_run",
    "plan_run",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(f"chiasm.{_HOME[name]}"), name)
    raise AttributeError(f"module 'chiasm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
