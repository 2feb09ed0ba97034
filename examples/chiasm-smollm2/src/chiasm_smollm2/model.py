"""SmolLM2-135M-Instruct (Allal et al., arXiv 2502.02737): a Llama of 30 blocks with tied embeddings."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import model_validator

from chiasm.llm import LanguageModelConfig, LanguageModelSpec
from chiasm_llms.causal import CausalLM
from chiasm_llms.checkpoint import load_tokenizer, load_weights, read_config
from chiasm_llms.geometry import geometry, random_weights
from chiasm_llms.lora import add_lora
from chiasm_llms.presets import BY_SOURCE
from chiasm_llms.settings import CausalConfig, Lora, Shape
from chiasm_smollm2.conversion import converted

SHAPE = Shape(vocabulary=49152, width=576, depth=30, heads=9, kv_heads=3, mlp_width=1536, context_length=8192)


class SmolLM2Config(LanguageModelConfig):
    """Which weights."""

    pretrained: Literal["instruct"] | None = "instruct"
    """`instruct`, or null for random weights: the same architecture and tokenizer as a control."""
    shape: Shape | None = None
    """A smaller model with random weights and one token for each byte, to try things out; null: SmolLM2's own."""
    lora: Lora | None = None
    """Train low-rank matrices beside the frozen weights; null: where a stage trains the model, all of it learns."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.pretrained is not None and self.shape is not None:
            raise ValueError("shape is for random weights; set pretrained to null, or leave shape out")
        return self


class SmolLM2(CausalLM):
    """SmolLM2-135M-Instruct with its tokenizer and chat template; it starts no text with a BOS."""

    Config: ClassVar[type[LanguageModelConfig]] = SmolLM2Config

    @classmethod
    def spec(cls, config: LanguageModelConfig) -> LanguageModelSpec:
        """Known facts: nothing is read."""
        assert isinstance(config, SmolLM2Config)
        if config.shape is not None:
            return CausalLM.spec(CausalConfig(shape=config.shape, lora=config.lora))
        published = BY_SOURCE["HuggingFaceTB/SmolLM2-135M-Instruct"]
        return geometry(published.config(), chat_template=True, lora=config.lora)

    @classmethod
    def activation_bytes(cls, config: LanguageModelConfig, positions: int, *, trained: bool) -> int | None:
        assert isinstance(config, SmolLM2Config)
        plain = CausalConfig(shape=config.shape or SHAPE, lora=config.lora)
        return super().activation_bytes(plain, positions, trained=trained)

    @classmethod
    def build(cls, config: LanguageModelConfig) -> Self:
        assert isinstance(config, SmolLM2Config)
        if config.shape is not None:
            plain = CausalLM.build(CausalConfig(shape=config.shape))
            model, tokenizer = plain.model, plain.tokenizer
        else:
            folder = str(converted())
            model = random_weights(read_config(folder)) if config.pretrained is None else load_weights(folder)
            tokenizer = load_tokenizer(folder)
        return cls(config, model, tokenizer, None if config.lora is None else add_lora(model, config.lora))

    @classmethod
    def tiny(cls) -> Self:
        shape = Shape(width=32, depth=2, heads=4, kv_heads=2, mlp_width=64, context_length=512)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return cls.build(SmolLM2Config(pretrained=None, shape=shape))
