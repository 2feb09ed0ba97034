"""The smallest parts that make a whole model around the one that is tested.

Shape letters: B images or sequences, N tokens, T positions, D width in, E width of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from chiasm.adapter import Adapter
from chiasm.encoder import Encoder, EncoderConfig, EncoderSpec
from chiasm.features import Features, FeatureSpec, SequenceSpec, TokenSequence
from chiasm.fusion import Fusion
from chiasm.image import ImageSpec
from chiasm.llm import LanguageModel, LanguageModelConfig, LanguageModelSpec
from chiasm.settings import Settings

EOS = 256


class GridConfig(EncoderConfig):
    """Features of any geometry."""

    pretrained: None = None
    feature: tuple[int, tuple[int, int], int] = (1, (2, 2), 4)
    """Layers, grid, width."""


class StandInEncoder(Encoder):
    """The mean of each cell's pixels times a learned matrix, for features of any geometry."""

    Config = GridConfig
    config: GridConfig

    def __init__(self, config: GridConfig) -> None:
        super().__init__(config)
        feature = self.geometry.features
        self.matrix = nn.Linear(3, feature.layers * feature.width)

    @classmethod
    def of(cls, feature: FeatureSpec) -> Self:
        """An encoder that gives these features."""
        return cls(GridConfig(feature=(feature.layers, feature.grid, feature.width)))

    @classmethod
    def spec(cls, config: EncoderConfig) -> EncoderSpec:
        assert isinstance(config, GridConfig)
        layers, grid, width = config.feature
        image = ImageSpec(height=grid[0], width=grid[1])
        return EncoderSpec(image, FeatureSpec(layers, grid, width), layers, 4 * layers * width, 0)

    @classmethod
    def build(cls, config: EncoderConfig) -> Self:
        assert isinstance(config, GridConfig)
        return cls(config)

    @classmethod
    def tiny(cls) -> Self:
        return cls(GridConfig())

    def forward(self, pixels_B3HW: Tensor) -> Features:
        feature = self.geometry.features
        tokens_BNC: Tensor = self.matrix(pixels_B3HW.flatten(2).transpose(1, 2))
        tokens_BNLD = torch.unflatten(tokens_BNC, 2, (feature.layers, feature.width))
        return Features(tokens_BNLD.transpose(1, 2), feature.grid)


class FlatConfig(Settings):
    """Whether the tokens keep their grid."""

    grid: bool = True
    """Else they have no place in the image."""


class StandInFusion(Fusion):
    """The tokens of the first layer of one encoder."""

    Config = FlatConfig

    @classmethod
    def spec(cls, config: Settings, features: Sequence[FeatureSpec], llm_width: int) -> SequenceSpec:
        assert isinstance(config, FlatConfig)
        return SequenceSpec(features[0].tokens, features[0].width, features[0].grid if config.grid else None)

    @classmethod
    def tiny(cls) -> Self:
        return cls(FlatConfig(), [FeatureSpec(1, (2, 2), 4)], 8)

    def forward(self, features: Sequence[Features]) -> TokenSequence:
        return TokenSequence(features[0].tokens[:, 0], self.out.grid)


class StandInAdapter(Adapter):
    """One matrix."""

    def __init__(self, config: Settings, sequence: SequenceSpec, llm_width: int) -> None:
        super().__init__(config, sequence, llm_width)
        self.matrix = nn.Linear(sequence.width, llm_width)

    @classmethod
    def spec(cls, config: Settings, sequence: SequenceSpec, llm_width: int) -> SequenceSpec:
        return SequenceSpec(sequence.tokens, llm_width, sequence.grid)

    @classmethod
    def tiny(cls) -> Self:
        return cls(cls.Config(), SequenceSpec(4, 4, (2, 2)), 8)

    def forward(self, sequence: TokenSequence) -> TokenSequence:
        return TokenSequence(self.matrix(sequence.tokens), sequence.grid)


class WidthConfig(LanguageModelConfig):
    """Any width."""

    pretrained: None = None
    width: int = 8
    """Of the hidden states."""


class StandInLanguageModel(LanguageModel):
    """Bytes, and a running mean over the real positions so far: causal, and blind to padding."""

    Config = WidthConfig
    config: WidthConfig
    bos_id = None
    eos_id = EOS

    def __init__(self, config: WidthConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(EOS + 1, config.width)

    @classmethod
    def spec(cls, config: LanguageModelConfig) -> LanguageModelSpec:
        assert isinstance(config, WidthConfig)
        return LanguageModelSpec(config.width, EOS + 1, 1 << 20, 1, (EOS + 1) * config.width, chat_template=False)

    @classmethod
    def build(cls, config: LanguageModelConfig) -> Self:
        assert isinstance(config, WidthConfig)
        return cls(config)

    @classmethod
    def tiny(cls) -> Self:
        return cls(WidthConfig())

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode())

    def detokenize(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < EOS).decode(errors="replace")

    def embed(self, ids: Tensor) -> Tensor:
        embeds: Tensor = self.embedding(ids)
        return embeds

    def forward(self, embeds_BTE: Tensor, mask_BT: Tensor | None = None, positions_BT: Tensor | None = None) -> Tensor:
        real_BT = embeds_BTE.new_ones(embeds_BTE.shape[:2]) if mask_BT is None else mask_BT.to(embeds_BTE.dtype)
        real_BT1 = real_BT.unsqueeze(-1)
        return (embeds_BTE * real_BT1).cumsum(1) / real_BT1.cumsum(1).clamp(min=1)

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.embedding.weight.T

    def generate(self, embeds_BTE: Tensor, mask_BT: Tensor, *, max_new_tokens: int) -> list[list[int]]:
        return [[] for _ in embeds_BTE]
