"""Frozen encoders and language models kept loaded in a process, so that the next run starts at once."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from chiasm.build import load_component
from chiasm.config import ComponentRef, RunConfig
from chiasm.encoder import Encoder
from chiasm.llm import LanguageModel
from chiasm_experiments.data.feed import FeatureMemo


def identity(kind: str, ref: ComponentRef, stream: str, precision: str, pretrained: bool) -> str:
    """Equal only for equal weights: the whole reference, the number format, and the random stream if one is drawn."""
    return json.dumps([kind, ref.model_dump(), precision, None if pretrained else stream], sort_keys=True)


@dataclass(slots=True)
class WarmParts:
    """What a process keeps between runs: frozen parts as loaded, and the features they gave.

    Args:
        memo: features of frozen encoders.
    """

    memo: FeatureMemo
    _parts: dict[str, Encoder | LanguageModel] = field(default_factory=dict)

    def load(self, run: RunConfig, kind: str, ref: ComponentRef, stream: str) -> Encoder | LanguageModel:
        """A part of a run. One that some stage trains is built anew; a frozen one is built once."""
        if ("encoders" if kind == "encoder" else kind) in run.trained:
            return load_component(kind, ref, stream)
        key = self._key(run, kind, ref, stream)
        if key not in self._parts:
            self._parts[key] = load_component(kind, ref, stream)
        return self._parts[key]

    def identity(self, run: RunConfig, index: int) -> str:
        """The identity of the weights of one of the run's encoders."""
        return self._key(run, "encoder", run.vision.encoders[index], f"{run.seed}/encoder.{index}")

    def retain(self, run: RunConfig) -> None:
        """Drops what this run does not use, so that memory holds one set of frozen parts."""
        keep = {self.identity(run, i) for i in range(len(run.vision.encoders))}
        keep.add(self._key(run, "llm", run.llm, f"{run.seed}/llm"))
        self._parts = {key: part for key, part in self._parts.items() if key in keep}

    @staticmethod
    def _key(run: RunConfig, kind: str, ref: ComponentRef, stream: str) -> str:
        return identity(kind, ref, stream, run.precision, ref.options.get("pretrained") is not None)
