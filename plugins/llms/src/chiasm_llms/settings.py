"""What a run can choose about a language model."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from chiasm.llm import LanguageModelConfig
from chiasm.settings import Settings, Source
from chiasm_llms.byte_tokenizer import BYTE_VOCABULARY

Quantize = Literal["8bit", "4bit"]
"""How many bits hold a weight."""


class Lora(Settings):
    """Low-rank adaptation: what a stage that trains the model trains instead of its weights (arXiv 2106.09685)."""

    rank: int = Field(default=16, gt=0)
    """Rows of A and columns of B."""
    alpha: float = Field(default=32, gt=0)
    """The product B A is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """On the input of A, in training."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """The layers: all linear ones but the output head, or those of these names, such as `q_proj`. The experts of a
    mixture, which transformers stacks, are none."""

    @model_validator(mode="after")
    def _some_target(self) -> Self:
        if self.targets == ():
            raise ValueError("targets is empty; name linear layers, or say all-linear")
        return self


class Shape(Settings):
    """The shape of a model with random weights: the Llama family's blocks (arXiv 2302.13971, section 2.2)."""

    vocabulary: int | None = Field(default=None, gt=0)
    """Rows of the embedding; null: as many as the tokenizer has."""
    width: int = Field(default=256, gt=0)
    """Of the hidden states."""
    depth: int = Field(default=4, gt=0)
    """Blocks."""
    heads: int = Field(default=4, gt=0)
    """Attention heads of queries."""
    kv_heads: int = Field(default=4, gt=0)
    """Attention heads of keys and values; fewer than `heads` is grouped-query attention."""
    mlp_width: int = Field(default=768, gt=0)
    """Of the gated MLP."""
    context_length: int = Field(default=2048, gt=0)
    """Positions at most."""

    @model_validator(mode="after")
    def _heads(self) -> Self:
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width {self.width} and {self.heads} heads: rotary positions want an even width for each head, "
                f"so a multiple of {2 * self.heads}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot be shared evenly by {self.kv_heads} kv_heads")
        return self


class CausalConfig(LanguageModelConfig):
    """A checkpoint with its tokenizer, or a shape for random weights."""

    shape: Shape | None = None
    """Of random weights; null: the defaults. A checkpoint has its own."""
    tokenizer: Annotated[Literal["bytes"] | Source | None, Field(union_mode="left_to_right")] = None
    """Hub id or folder of another tokenizer; `bytes`: one token for each byte, without any file. null: the
    checkpoint's, or `bytes` for random weights."""
    lora: Lora | None = None
    """Train low-rank matrices beside the frozen weights; null: where a stage trains the model, all of it learns."""
    quantize: Quantize | None = None
    """Hold the weights in 8 or 4 bits (a GPU, and `chiasm-llms[quantize]`); they can learn by `lora` alone."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.pretrained is not None and self.shape is not None:
            raise ValueError(
                f"shape is for random weights, and pretrained names {self.pretrained!r}, which has its own; give one"
            )
        if self.pretrained is not None and self.tokenizer == "bytes":
            raise ValueError(
                f"tokenizer 'bytes' is for random weights, and {self.pretrained!r} has its own; leave it out"
            )
        if self.pretrained is None and self.quantize is not None:
            raise ValueError("quantize is for the weights of a checkpoint; name one with pretrained, or leave it out")
        vocabulary = self.architecture.vocabulary
        if self.random_tokenizer == "bytes" and vocabulary is not None and vocabulary < BYTE_VOCABULARY:
            raise ValueError(
                f"shape.vocabulary is {vocabulary}, the tokenizer 'bytes' needs {BYTE_VOCABULARY}; leave it out"
            )
        return self

    @property
    def architecture(self) -> Shape:
        """The shape of random weights, defaults filled in."""
        return self.shape or Shape()

    @property
    def random_tokenizer(self) -> str | None:
        """The tokenizer of random weights; None where a checkpoint is named."""
        return None if self.pretrained is not None else self.tokenizer or "bytes"


class MistralShape(Shape):
    """Mistral's shape; the defaults are Mistral-7B-v0.1's (arXiv 2310.06825, table 1)."""

    vocabulary: int | None = Field(default=32000, gt=0)
    """Rows of the embedding; null: as many as the tokenizer has."""
    width: int = Field(default=4096, gt=0)
    """Of the hidden states."""
    depth: int = Field(default=32, gt=0)
    """Blocks."""
    heads: int = Field(default=32, gt=0)
    """Attention heads of queries."""
    kv_heads: int = Field(default=8, gt=0)
    """Attention heads of keys and values; fewer than `heads` is grouped-query attention."""
    mlp_width: int = Field(default=14336, gt=0)
    """Of the gated MLP."""
    context_length: int = Field(default=32768, gt=0)
    """Positions at most."""
    window: int | None = Field(default=4096, gt=0)
    """How far back a position attends; null: to the start."""


class MistralConfig(CausalConfig):
    """A Mistral checkpoint with its tokenizer, or a shape for random weights."""

    shape: MistralShape | None = None
    """Of random weights; null: Mistral-7B-v0.1's. A checkpoint has its own."""

    @property
    def architecture(self) -> MistralShape:
        """The shape of random weights, defaults filled in."""
        return self.shape or MistralShape()
