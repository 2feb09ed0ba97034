"""Frozen encoders and language models kept loaded in a process, so that the next run starts at once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import PIL
import torch
from torch import Tensor

from chiasm.build import load_component
from chiasm.config import ComponentRef, RunConfig
from chiasm.encoder import Encoder
from chiasm.llm import LanguageModel
from chiasm_experiments.data.feed import FeatureMemo

_known: WeakKeyDictionary[Encoder, tuple[Any, str]] = WeakKeyDictionary()
"""What was found for encoders that live, and for which state of their tensors."""

FORMAT = 1
"""Raised whenever stored features would no longer be what the same code computes."""


def identity(kind: str, ref: ComponentRef, stream: str, precision: str, pretrained: bool) -> str:
    """Equal only for equal weights: the whole reference, the number format, and the random stream if one is drawn."""
    return json.dumps([kind, ref.model_dump(), precision, None if pretrained else stream], sort_keys=True)


def content_identity(encoder: Encoder) -> str:
    """Equal only for encoders that give equal features for equal pixels, wherever their weights lie.

    It holds the class and its configuration, the modules with their settings, the bytes of every weight in its number
    format, and whether it computes on a GPU. Of a checkpoint's folder it holds the small files instead of the path.
    """
    config = encoder.config.model_dump(mode="json")
    source = encoder.config.pretrained
    if source is not None and Path(source).is_dir():
        config["pretrained"] = {file.name: _sha256(file.read_bytes()) for file in sorted(Path(source).glob("*.json"))}
    tensors = sorted(chain(encoder.named_parameters(), encoder.named_buffers()), key=lambda item: item[0])
    about: dict[str, Any] = {
        "format": FORMAT,
        "class": f"{type(encoder).__module__}.{type(encoder).__qualname__}",
        "config": config,
        "modules": _sha256(repr(encoder).encode()),
        "weights": _weights(encoder, tensors),
        "device": tensors[0][1].device.type if tensors else None,
        "torch": torch.__version__,
        "pillow": PIL.__version__,
    }
    return json.dumps(about, sort_keys=True)


def _weights(encoder: Encoder, tensors: Sequence[tuple[str, Tensor]]) -> str:
    """One that stays loaded from run to run is read through once, as long as nobody writes to its tensors."""
    state = [(name, tensor.data_ptr(), tensor._version, tensor.dtype) for name, tensor in tensors]
    known = _known.get(encoder)
    if known is None or known[0] != state:
        with ThreadPoolExecutor() as threads:  # hashing releases the interpreter's lock
            found = list(threads.map(_tensor, tensors))
        _known[encoder] = known = (state, _sha256(json.dumps(found).encode()))
    return known[1]


def _tensor(item: tuple[str, Tensor]) -> list[str]:
    name, tensor = item
    data: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return [name, str(tensor.dtype), str(tuple(tensor.shape)), _sha256(data)]


def _sha256(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()


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

    def retain(self, run: RunConfig) -> None:
        """Drops what this run does not use, so that memory holds one set of frozen parts."""
        refs = enumerate(run.vision.encoders)
        keep = {self._key(run, "encoder", ref, f"{run.seed}/encoder.{i}") for i, ref in refs}
        keep.add(self._key(run, "llm", run.llm, f"{run.seed}/llm"))
        self._parts = {key: part for key, part in self._parts.items() if key in keep}

    @staticmethod
    def _key(run: RunConfig, kind: str, ref: ComponentRef, stream: str) -> str:
        return identity(kind, ref, stream, run.precision, ref.options.get("pretrained") is not None)
