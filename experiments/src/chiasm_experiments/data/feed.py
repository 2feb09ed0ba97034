"""From samples to batches: prompts written, images preprocessed, what is frozen encoded once.

Shape letters: I views of all images of a sample or a batch, H and W pixels, L layers, N tokens, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import PIL.Image
import torch
from PIL.Image import Image
from torch import Tensor

from chiasm.batch import Batch, Padding, collate, row_length
from chiasm.encoder import Encoder
from chiasm.errors import ChiasmError
from chiasm.features import Features
from chiasm.image import normalise
from chiasm.prompt import Prompt, PromptBuilder, Row
from chiasm.sample import ImageSource, Sample
from chiasm.vlm import VLM
from chiasm_experiments.data.features import FeatureMemo, FrozenFeatures, Wanted
from chiasm_experiments.data.joining import Span, join
from chiasm_experiments.data.store import FeatureStore

__all__ = ["Example", "FeatureMemo", "Feed"]


@dataclass(slots=True)
class Example:
    """One sample made ready: its prompt, its images, and what each encoder needs of them."""

    prompt: Row
    images: tuple[ImageSource, ...]
    keys: tuple[str, ...] = ()
    """Of the images' contents, where features are kept by content."""
    pixels: tuple[tuple[Tensor, ...], ...] = ()
    """For each encoder the views of each image, `[V, 3, H, W]`, as `Feed.pixels` takes them; empty where the features
    are known already."""
    rows: tuple[dict[str, Span], ...] = ()
    """For each encoder features that were read ahead, by key."""


class Feed:
    """Makes batches for one model.

    Args:
        vlm: the model; its encoders preprocess views, and where they are frozen and features are kept, encode them.
        builder: writes prompts.
        memo: where a process keeps features of frozen encoders; None: nowhere.
        identities: for each encoder a name that is equal only for equal weights, layers and preprocessing; needed
            where features are kept.
        store: where a machine keeps features of frozen encoders; None: nowhere.
        share: of the images that the store keeps, where not all fit.
    """

    def __init__(
        self,
        vlm: VLM,
        builder: PromptBuilder,
        memo: FeatureMemo | None = None,
        identities: Sequence[str] = (),
        store: FeatureStore | None = None,
        share: float = 1.0,
    ) -> None:
        self.vlm = vlm
        self.builder = builder
        self.encoders: list[Encoder] = list(vlm.encoders)  # type: ignore[arg-type]
        # an encoder with preprocessing of its own gives what it likes; all others' pixels travel as bytes
        self.plain = [type(encoder).preprocess is Encoder.preprocess for encoder in self.encoders]
        self.features: list[FrozenFeatures] = []
        """For each encoder where its features come from; empty where the model encodes every image itself."""
        if memo is None and store is None:
            return
        # features of tiles fit no other way of cutting, even where one encoder's tile has another's size
        cut = f"{vlm.views.config.model_dump_json()}/{vlm.views.tile}"
        for k, (encoder, identity) in enumerate(zip(self.encoders, identities, strict=True)):
            spec = encoder.geometry.features
            name, shelf = f"{identity}/{cut}/{self._preprocessing(k)}", None
            if store is not None:
                shape = (spec.layers, spec.tokens, spec.width)
                shelf = store.shelf(name, shape, self._dtype(k), share)
            self.features.append(FrozenFeatures(partial(self._encode, k), name, spec.grid, memo, shelf))

    def train(self, sample: Sample) -> Example:
        """A sample with its labels."""
        return self._example(sample, self.builder.train)

    def ask(self, sample: Sample, reserve: int) -> Example:
        """A sample up to where the model answers; `reserve` positions are left for the answer."""
        return self._example(sample, lambda sample, views: self.builder.ask(sample, reserve, views))

    def _example(self, sample: Sample, write: Callable[[Sample, Sequence[Sequence[int]]], Prompt]) -> Example:
        views = self.vlm.views
        try:
            keys = tuple(image.key for image in sample.images) if self.features else ()
            known = self._known(keys)
            if known is not None:
                return Example(write(sample, [views.tokens(count) for count in known]).row(), sample.images, keys)
            images = [image.load() for image in sample.images]
        except ChiasmError as error:
            error.add_note(f"in sample {sample.id!r}")
            raise
        # before the pixels: a sample that does not fit costs no preprocessing
        prompt = write(sample, [views.tokens(views.count(image)) for image in images])
        pixels = tuple(tuple(self._draw(image, k) for image in images) for k in range(len(self.encoders)))
        return Example(prompt.row(), sample.images, keys, pixels)

    def _known(self, keys: Sequence[str]) -> list[int] | None:
        """How many views each image has, where the features of all are known."""
        counts = []
        for key in keys:
            views = [features.views(key) for features in self.features]
            if views[0] is None or None in views:
                return None
            counts.append(views[0])
        return counts if self.features else None

    def fetch(self, examples: Sequence[Example], *, pin: bool) -> None:
        """Reads the known features of examples from the disk, so that `batch` finds them; for a thread to do ahead."""
        for example in examples:
            example.rows = ()
        for features in self.features:
            # also of those that were not known yet when a loader process asked
            rows = features.fetch([key for example in examples for key in example.keys], pin=pin)
            for example in examples:
                example.rows = (*example.rows, {key: rows[key] for key in example.keys if key in rows})

    def send(self, examples: Sequence[Example], device: torch.device) -> None:
        """Copies what `fetch` has read to a device, in one piece for each encoder."""
        there: dict[int, tuple[Tensor, Tensor]] = {}  # with what an id stands for, which lives as long
        for example in examples:
            for rows in example.rows:
                for key, span in rows.items():
                    whole_ILND = span.whole_ILND
                    if id(whole_ILND) not in there:
                        there[id(whole_ILND)] = whole_ILND, whole_ILND.to(device, non_blocking=True)
                    rows[key] = replace(span, whole_ILND=there[id(whole_ILND)][1])

    def batch(self, examples: Sequence[Example], device: torch.device, *, pad: Padding = "right") -> Batch:
        """Examples as one batch on the device, padded or packed as `collate` says; rows that are padded on the
        right for a GPU have one of few lengths."""
        prompts, length = [example.prompt for example in examples], None
        if device.type == "cuda" and pad == "right":
            length = row_length(max(map(len, prompts)), self.vlm.llm.geometry.context_length)
        return collate(prompts, self.vision(examples, device), pad=pad, length=length).to(device)

    def vision(self, examples: Sequence[Example], device: torch.device) -> list[Tensor | Features]:
        """For each encoder the pixels or the features of all images of the examples, on the device."""
        with_images = [example for example in examples if example.images]
        if not with_images:
            return []
        if self.features:
            return [self._features(with_images, k, device) for k in range(len(self.encoders))]
        return [
            self._pixels(k, join([pixels for example in with_images for pixels in example.pixels[k]], device))
            for k in range(len(self.encoders))
        ]

    def flush(self) -> None:
        """Waits until all features computed so far stand on the disk."""
        for features in self.features:
            features.flush()

    def close(self) -> None:
        """Writes what is to be written and gives files and threads back."""
        for features in self.features:
            features.close()

    def _features(self, examples: Sequence[Example], k: int, device: torch.device) -> Features:
        """Features of all images in order: known ones looked up, the others encoded in one batch."""
        wanted = [
            Wanted(key, example.rows[k].get(key) if example.rows else None, partial(self._views, example, i, k))
            for example in examples
            for i, key in enumerate(example.keys)
        ]
        return self.features[k].gather(wanted, device)

    def _views(self, example: Example, i: int, k: int) -> Tensor:
        """The views of an example's image for an encoder; drawn again where they were known and no longer are."""
        if example.pixels:
            return example.pixels[k][i]
        return self._draw(example.images[i].load(), k)

    def _draw(self, image: Image, k: int) -> Tensor:
        """The views of an image for an encoder as they travel: `[V, 3, H, W]`, bytes where they can be."""
        views, encoder = self.vlm.views, self.encoders[k]
        return views.bytes(image, encoder) if self.plain[k] else views.pixels(image, encoder)

    def _pixels(self, k: int, views_I3HW: Tensor) -> Tensor:
        """Views as they travel to what the encoder takes."""
        return normalise(views_I3HW, self.encoders[k].geometry.image) if self.plain[k] else views_I3HW

    def _encode(self, k: int, views_I3HW: Tensor) -> Features:
        return self.vlm.encode(k, self._pixels(k, views_I3HW))

    def _preprocessing(self, k: int) -> str:
        """What preprocessing does, told by what it makes of two images: code that changed is seen like a setting."""
        made = hashlib.sha256()
        for size in ((97, 61), (61, 97)):
            noise = hashlib.shake_256(b"chiasm").digest(3 * size[0] * size[1])
            made.update(self._pixels(k, self._draw(PIL.Image.frombytes("RGB", size, noise), k)).numpy().tobytes())
        return made.hexdigest()[:32]

    def _dtype(self, k: int) -> torch.dtype:
        """The number format of an encoder's features: asked of it, since it need not be that of its weights."""
        image = self.encoders[k].geometry.image
        device = next((p.device for p in self.encoders[k].parameters()), torch.device("cpu"))
        with torch.no_grad():
            return self.vlm.encode(k, torch.zeros(1, 3, image.height, image.width, device=device)).tokens.dtype
