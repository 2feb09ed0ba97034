"""The model that composes the parts: encoders, fusion, adapter, learned vectors, language model.

Shape letters: B sequences, T positions, I views of images, N tokens of one view, X visual tokens of all views,
L layers, D width of an encoder, E width of the language model, S supervised positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from chiasm.adapter import Adapter
from chiasm.batch import Batch
from chiasm.config import PARTS, ImageConfig, Part
from chiasm.encoder import Encoder
from chiasm.errors import ConfigError
from chiasm.features import Features
from chiasm.fusion import Fusion
from chiasm.llm import FIXED_LLM, LanguageModel
from chiasm.views import Views, pool_tokens

LOGITS = 2**28
"""Logits that are held at once, in float32 beside their gradients; of more, a part at a time, computed again in the
backward pass. 1 GiB of float32."""


class LearnedTokens(nn.Module):
    """The vectors SOI, EOI, USER and BOT, outside the vocabulary (OmniFusion, arXiv 2404.06212, section 2).

    Drawn from N(0, 1 / E), as the released code draws them.

    Args:
        width: of the language model.
        count: 5 adds SEP, which stands between the views of one image.
    """

    def __init__(self, width: int, count: int = 4) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(count, width) * width**-0.5)


@dataclass(frozen=True, slots=True)
class PartCount:
    """Parameters of one part, tied ones counted once."""

    part: Part
    trained: int
    frozen: int


class VLM(nn.Module):
    """A vision-language model of any parts that fit.

    Args:
        encoders: one or more, in the order that the fusion was built for.
        fusion: features of all encoders to one sequence.
        adapter: that sequence to visual tokens.
        llm: the language model.
        views: how images become views; None: each is one, padded to the encoder's size.
        learned: how many learned vectors there are; 5 with one between views.

    Raises:
        ValueError: the geometries of neighbouring parts differ.
    """

    def __init__(
        self,
        encoders: Sequence[Encoder],
        fusion: Fusion,
        adapter: Adapter,
        llm: LanguageModel,
        views: Views | None = None,
        learned: int = 4,
    ) -> None:
        super().__init__()
        given = tuple(encoder.geometry.features for encoder in encoders)
        if given != fusion.features:
            raise ValueError(f"the fusion was built for {fusion.features}, the encoders give {given}")
        if fusion.out != adapter.sequence:
            raise ValueError(f"the adapter was built for {adapter.sequence}, the fusion gives {fusion.out}")
        if adapter.out.width != llm.geometry.width:
            raise ValueError(f"the adapter gives width {adapter.out.width}, the llm has {llm.geometry.width}")
        self.encoders = nn.ModuleList(encoders)
        self.fusion = fusion
        self.adapter = adapter
        self.tokens = LearnedTokens(llm.geometry.width, learned)
        self.views = views or Views(ImageConfig(), encoders[0].geometry.image, adapter.out)
        self.llm = llm
        self._trained: frozenset[Part] = frozenset(PARTS)

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of one view."""
        return self.adapter.out.tokens

    def part(self, name: Part) -> nn.Module:
        """One part as a module, for its parameters and its state."""
        return self.get_submodule(name)

    # what learns

    def trainable(self, name: Part) -> dict[str, nn.Parameter]:
        """The parameters of a part that learn where a stage trains it: all, unless the language model says less."""
        return self.llm.trainable() if name == "llm" else dict(self.part(name).named_parameters())

    def set_trained(self, parts: Collection[Part]) -> None:
        """Chooses the parts that learn. All others get no gradient and stay in eval mode whatever `train` is told.

        Raises:
            ConfigError: the language model is to learn and cannot.
        """
        if "llm" in parts and not self.llm.geometry.trainable:
            raise ConfigError(FIXED_LLM)
        self._trained = frozenset(parts)
        for name in PARTS:
            self.part(name).requires_grad_(False)
            for parameter in self.trainable(name).values() if name in self._trained else ():
                parameter.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for name in PARTS:
            if name not in self._trained:
                self.part(name).eval()
        return self

    def counts(self) -> list[PartCount]:
        """What is trained and what is frozen, by part."""
        counts = []
        for name in PARTS:
            parameters = list(self.part(name).parameters())
            # quantised weights are packed, so their elements are no parameters to count
            total = self.llm.geometry.parameters if name == "llm" else sum(p.numel() for p in parameters)
            trained = sum(p.numel() for p in parameters if p.requires_grad)
            counts.append(PartCount(name, trained, total - trained))
        return counts

    # the way of an image

    def encode(self, index: int, pixels_I3HW: Tensor) -> Features:
        """Pixels `[I, 3, H, W]` to the features of encoder `index`, without a graph where the encoders are frozen."""
        encoder = self.encoders[index]
        dtype = next((p.dtype for p in encoder.parameters()), pixels_I3HW.dtype)
        with ExitStack() as contexts:
            if "encoders" not in self._trained:
                contexts.enter_context(torch.no_grad())
                if dtype != torch.float32:
                    # in its own number format throughout, so that features are the same wherever they are computed
                    contexts.enter_context(torch.autocast(pixels_I3HW.device.type, enabled=False))
            features: Features = encoder(pixels_I3HW.to(dtype))
        return features

    def see(self, vision: Sequence[Tensor | Features]) -> Tensor:
        """Pixels or features of each encoder to visual tokens `[I, N, E]`."""
        if len(vision) != len(self.encoders):
            raise ValueError(f"the batch has images for {len(vision)} encoders, the model has {len(self.encoders)}")
        features = [item if isinstance(item, Features) else self.encode(k, item) for k, item in enumerate(vision)]
        visual: Tensor = self.adapter(self.fusion(self._in_dtype(features))).tokens
        return visual

    def embed(self, batch: Batch) -> Tensor:
        """The sequence of a batch as embeddings `[B, T, E]` in the language model's dtype; zeros at padding.

        Raises:
            ValueError: the places for visual tokens and the images of the batch disagree in number.
        """
        ids = batch.ids_BT.flatten()
        text_YE = self.llm.embed(ids.index_select(0, batch.text_Y))
        learned_ZE = F.embedding(ids.index_select(0, batch.learned_Z), self.tokens.vectors).to(text_YE.dtype)
        places, rows = [batch.text_Y, batch.learned_Z], [text_YE, learned_ZE]
        wanted = len(batch.visual_X)
        if batch.vision:
            visual_INE = self.see(batch.vision)
            visual_XE = self._in_sequence(visual_INE, batch.view_tokens)
            if wanted != len(visual_XE):
                raise ValueError(
                    f"the batch has {wanted} places for visual tokens, its {len(visual_INE)} views of images have "
                    f"{len(visual_XE)}"
                )
            places.append(batch.visual_X)
            rows.append(visual_XE.to(text_YE.dtype))
        elif wanted:
            raise ValueError(f"the batch has {wanted} places for visual tokens and no image")
        embeds = text_YE.new_zeros(len(ids), text_YE.shape[-1])
        # all at once and out of place, so that the embeddings of a frozen language model need no graph of their own; by
        # index and not by mask, for whose backward pass a GPU is asked how many places there are
        embeds = embeds.index_copy(0, torch.cat(places), torch.cat(rows))
        embeds_BTE = embeds.view(*batch.ids_BT.shape, -1)
        return embeds_BTE if batch.vision else self._with_graph(embeds_BTE)

    # what comes out

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The summed cross-entropy over the supervised positions of a batch, and how many there are.

        The sum, not the mean: the trainer divides by the count of the whole optimiser step, so the loss is the same
        for any micro-batch and any number of workers. Logits are computed at supervised positions only, and so is what
        the language model need not compute elsewhere for them.

        Returns:
            A float32 scalar and an int64 scalar.

        Raises:
            ValueError: the batch is packed and the language model does not take documents.
        """
        self._check_packed(batch)
        hidden_SE = self.llm.forward_at(self.embed(batch), batch.supervised_S, self._mask(batch), batch.documents)
        rows = max(1, LOGITS // self.llm.geometry.vocabulary)
        loss = torch.zeros((), device=hidden_SE.device)
        for hidden_sE, targets_s in zip(torch.split(hidden_SE, rows), torch.split(batch.targets_S, rows), strict=True):
            if len(hidden_SE) > rows and torch.is_grad_enabled():
                loss = loss + checkpoint(self._loss, hidden_sE, targets_s, use_reentrant=False)
            else:
                loss = loss + self._loss(hidden_sE, targets_s)
        return loss, torch.tensor(len(batch.targets_S))

    def hidden(self, batch: Batch) -> Tensor:
        """The language model's hidden states of a batch, `[B, T, E]`.

        Raises:
            ValueError: the batch is packed and the language model does not take documents.
        """
        self._check_packed(batch)
        embeds_BTE = self.embed(batch)
        if batch.documents is not None:
            return self.llm.forward_packed(embeds_BTE, batch.documents)
        hidden_BTE: Tensor = self.llm(embeds_BTE, self._mask(batch))
        return hidden_BTE

    def _check_packed(self, batch: Batch) -> None:
        if batch.documents is not None and not self.llm.packs:
            raise ValueError(f"{type(self.llm).__name__} takes no packed batch; collate with pad='right'")

    def _mask(self, batch: Batch) -> Tensor | None:
        # causal: what stands before padding never looks at it
        return batch.mask_BT if batch.padded_left else None

    def _loss(self, hidden_SE: Tensor, targets_S: Tensor) -> Tensor:
        return F.cross_entropy(self.llm.logits(hidden_SE).float(), targets_S, reduction="sum")

    def logits(self, batch: Batch) -> Tensor:
        """Logits at every position, `[B, T, V]`; to compare models with, not to train with."""
        return self.llm.logits(self.hidden(batch))

    @torch.no_grad()
    def generate(self, batch: Batch, *, max_new_tokens: int) -> list[str]:
        """The greedy answers to a batch that was padded on the left."""
        ids = self.llm.generate(self.embed(batch), batch.mask_BT, max_new_tokens=max_new_tokens)
        return [self.llm.detokenize(row) for row in ids]

    def _with_graph(self, embeds_BTE: Tensor) -> Tensor:
        """Embeddings of a batch without images, whose loss must have a graph although nothing trained is in it.

        Workers whose batches have images reduce gradients and gather weights in their backward pass; a worker that
        had none to make would leave them waiting.
        """
        if embeds_BTE.requires_grad or not torch.is_grad_enabled():
            return embeds_BTE
        trained = next(
            (p for name in PARTS if name != "llm" for p in self.part(name).parameters() if p.requires_grad), None
        )
        return embeds_BTE if trained is None else embeds_BTE + 0 * trained.sum().to(embeds_BTE.dtype)

    def _in_sequence(self, visual_INE: Tensor, view_tokens: Sequence[int]) -> Tensor:
        """The visual tokens `[I, N, E]` of all views one after the other, `[X, E]`; those of pooled tiles pooled."""
        every = visual_INE.shape[1]
        if all(count == every for count in view_tokens):
            return visual_INE.flatten(0, 1)
        if len(view_tokens) != len(visual_INE):
            raise ValueError(f"the batch has {len(visual_INE)} views, and the number of tokens of {len(view_tokens)}")
        grid = self.adapter.out.grid
        assert grid is not None, "Views pools tokens on a grid only"
        places = [i for i, count in enumerate(view_tokens) if count != every]
        pooled_INE = visual_INE.index_select(0, torch.tensor(places, device=visual_INE.device))
        tiles = iter(pool_tokens(pooled_INE, grid, self.views.config.pool))
        return torch.cat(
            [
                visual_NE if count == every else next(tiles)
                for visual_NE, count in zip(visual_INE, view_tokens, strict=True)
            ]
        )

    def _in_dtype(self, features: list[Features]) -> list[Features]:
        """Features in the dtype of the first trained layers, which hold float32 weights where encoders hold bf16."""
        parameters = [*self.fusion.parameters(), *self.adapter.parameters()]
        dtype = parameters[0].dtype if parameters else features[0].tokens.dtype
        return [Features(item.tokens.to(dtype), item.grid) for item in features]
