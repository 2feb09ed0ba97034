"""From samples to batches: prompts written, images preprocessed, what is frozen encoded once.

Shape letters: I images of a batch, H and W pixels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chiasm.batch import Batch, collate
from chiasm.errors import ChiasmError
from chiasm.features import Features
from chiasm.image import Resize
from chiasm.prompt import Prompt, PromptBuilder
from chiasm.sample import ImageSource, Sample
from chiasm.vlm import VLM


@dataclass(slots=True)
class Example:
    """One sample made ready: its prompt, its images, and their pixels for each encoder where they were asked for."""

    prompt: Prompt
    images: tuple[ImageSource, ...]
    pixels: tuple[Tensor, ...] = ()
    """For each encoder `[I, 3, H, W]`; empty where the features are known already."""


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
        """The features of one image, `[1, L, N, D]`."""
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
        vlm: the model; its encoders preprocess, and where they are frozen and a memo is given, encode.
        builder: writes prompts.
        resize: how images become the encoders' rectangles.
        memo: where features of frozen encoders are kept, or None to give pixels.
        identities: for each encoder a name that is equal only for equal weights, layers and preprocessing.
    """

    def __init__(
        self,
        vlm: VLM,
        builder: PromptBuilder,
        resize: Resize,
        memo: FeatureMemo | None = None,
        identities: Sequence[str] = (),
    ) -> None:
        self.vlm = vlm
        self.builder = builder
        self.resize = resize
        self.memo = memo
        self.identities = tuple(f"{identity}/{resize}" for identity in identities)

    def train(self, sample: Sample) -> Example:
        """A sample with its labels."""
        return self._example(self.builder.train(sample), sample)

    def ask(self, sample: Sample, reserve: int) -> Example:
        """A sample up to where the model answers; `reserve` positions are left for the answer."""
        return self._example(self.builder.ask(sample, reserve), sample)

    def _example(self, prompt: Prompt, sample: Sample) -> Example:
        if not sample.images or self._known(sample.images):
            return Example(prompt, sample.images)
        try:
            images = [image.load() for image in sample.images]
        except ChiasmError as error:
            error.add_note(f"in sample {sample.id!r}")
            raise
        pixels = tuple(encoder.preprocess(images, self.resize) for encoder in self.vlm.encoders)  # type: ignore[operator]
        return Example(prompt, sample.images, pixels)

    def _known(self, images: Sequence[ImageSource]) -> bool:
        return self.memo is not None and all(
            (identity, image.key) in self.memo for identity in self.identities for image in images
        )

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
        return torch.cat([example.pixels[k] for example in examples])

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
                encoded = self.vlm.encode(k, torch.stack(list(new.values())).to(device))
            for i, image_key in enumerate(new):
                found[image_key] = Features(encoded.tokens[i : i + 1].clone(), encoded.grid)
                self.memo.put((self.identities[k], image_key), found[image_key])
        rows = [found[image.key] for example in examples for image in example.images]
        return Features(torch.cat([row.tokens for row in rows]), rows[0].grid)

    def _again(self, image: ImageSource, k: int) -> Tensor:
        pixels: Tensor = self.vlm.encoders[k].preprocess([image.load()], self.resize)[0]  # type: ignore[operator]
        return pixels
