"""From samples to batches: prompts written, images preprocessed, what is frozen encoded once.

Shape letters: I views of all images of a sample or a batch, H and W pixels, L layers, N tokens, D width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chiasm.batch import Batch, collate
from chiasm.errors import ChiasmError
from chiasm.features import Features
from chiasm.prompt import Prompt, PromptBuilder
from chiasm.sample import ImageSource, Sample
from chiasm.vlm import VLM


@dataclass(slots=True)
class Example:
    """One sample made ready: its prompt, its images, and their pixels for each encoder where they were asked for."""

    prompt: Prompt
    images: tuple[ImageSource, ...]
    pixels: tuple[tuple[Tensor, ...], ...] = ()
    """For each encoder the views of each image, `[V, 3, H, W]`; empty where the features are known already."""


class FeatureMemo:
    """Features of frozen encoders by encoder and image, the least recently used dropped beyond a size.

    One memo may serve many runs of a process: keys hold the encoder's identity.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._items: OrderedDict[tuple[str, str], Features] = OrderedDict()

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self._items

    def get(self, key: tuple[str, str]) -> Features:
        """The features of one image's views, `[V, L, N, D]`."""
        self._items.move_to_end(key)
        return self._items[key]

    def put(self, key: tuple[str, str], features: Features) -> None:
        """Keeps the features of one image."""
        if key in self._items:
            return
        self._items[key] = features
        self.bytes += features.tokens.nbytes
        while self.bytes > self.limit:
            _, dropped = self._items.popitem(last=False)
            self.bytes -= dropped.tokens.nbytes


class Feed:
    """Makes batches for one model.

    Args:
        vlm: the model; its encoders preprocess views, and where they are frozen and a memo is given, encode them.
        builder: writes prompts.
        memo: where features of frozen encoders are kept, or None to give pixels.
        identities: for each encoder a name that is equal only for equal weights, layers and preprocessing.
    """

    def __init__(
        self,
        vlm: VLM,
        builder: PromptBuilder,
        memo: FeatureMemo | None = None,
        identities: Sequence[str] = (),
    ) -> None:
        self.vlm = vlm
        self.builder = builder
        self.memo = memo
        # features of tiles fit no other way of cutting, even where one encoder's tile has another's size
        cut = f"{vlm.views.config.model_dump_json()}/{vlm.views.tile}"
        self.identities = tuple(f"{identity}/{cut}" for identity in identities)

    def train(self, sample: Sample) -> Example:
        """A sample with its labels."""
        return self._example(sample, self.builder.train)

    def ask(self, sample: Sample, reserve: int) -> Example:
        """A sample up to where the model answers; `reserve` positions are left for the answer."""
        return self._example(sample, lambda sample, views: self.builder.ask(sample, reserve, views))

    def _example(self, sample: Sample, write: Callable[[Sample, Sequence[Sequence[int]]], Prompt]) -> Example:
        known = self._known(sample.images)
        if known is not None:
            return Example(write(sample, [self.vlm.views.tokens(count) for count in known]), sample.images)
        try:
            images = [image.load() for image in sample.images]
        except ChiasmError as error:
            error.add_note(f"in sample {sample.id!r}")
            raise
        # before the pixels: a sample that does not fit costs no preprocessing
        views = self.vlm.views
        prompt = write(sample, [views.tokens(views.count(image)) for image in images])
        encoders: list[Any] = list(self.vlm.encoders)
        pixels = tuple(tuple(views.pixels(image, encoder) for image in images) for encoder in encoders)
        return Example(prompt, sample.images, pixels)

    def _known(self, images: Sequence[ImageSource]) -> list[int] | None:
        """How many views each image has, where the features of all are remembered."""
        counts = []
        for image in images:
            if self.memo is None or any((identity, image.key) not in self.memo for identity in self.identities):
                return None
            counts.append(len(self.memo.get((self.identities[0], image.key)).tokens))
        return counts

    def batch(self, examples: Sequence[Example], device: torch.device, *, generate: bool = False) -> Batch:
        """Examples as one batch on the device, padded on the left to generate."""
        prompts = [example.prompt for example in examples]
        with_images = [example for example in examples if example.images]
        vision: list[Tensor | Features] = []
        if with_images:
            for k in range(len(self.vlm.encoders)):
                vision.append(
                    self._pixels(with_images, k) if self.memo is None else self._features(with_images, k, device)
                )
        return collate(prompts, vision, pad="left" if generate else "right").to(device)

    @staticmethod
    def _pixels(examples: Sequence[Example], k: int) -> Tensor:
        return torch.cat([pixels for example in examples for pixels in example.pixels[k]])

    def _features(self, examples: Sequence[Example], k: int, device: torch.device) -> Features:
        """Features of all images in order: remembered ones looked up, the others encoded in one batch."""
        assert self.memo is not None
        new: dict[str, Tensor] = {}
        found: dict[str, Features] = {}
        for example in examples:
            for i, image in enumerate(example.images):
                key = (self.identities[k], image.key)
                if key in self.memo:
                    found[image.key] = self.memo.get(key)
                elif example.pixels:
                    new.setdefault(image.key, example.pixels[k][i])
                else:  # it was remembered when the example was made and has been dropped since
                    new.setdefault(image.key, self._again(image, k))
        if new:
            with torch.no_grad():
                encoded = self.vlm.encode(k, torch.cat(list(new.values())).to(device))
            views = torch.split(encoded.tokens, [len(pixels) for pixels in new.values()])
            for image_key, tokens_VLND in zip(new, views, strict=True):
                found[image_key] = Features(tokens_VLND.clone(), encoded.grid)
                self.memo.put((self.identities[k], image_key), found[image_key])
        rows = [found[image.key] for example in examples for image in example.images]
        return Features(torch.cat([row.tokens for row in rows]), rows[0].grid)

    def _again(self, image: ImageSource, k: int) -> Tensor:
        return self.vlm.views.pixels(image.load(), self.vlm.encoders[k])  # type: ignore[arg-type]
