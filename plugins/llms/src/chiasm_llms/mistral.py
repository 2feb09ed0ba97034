"""Mistral, the language model of OmniFusion (arXiv 2404.06212, section 2)."""

from __future__ import annotations

from typing import ClassVar

import transformers
from transformers import PreTrainedConfig

from chiasm.errors import CheckpointError
from chiasm.llm import LanguageModelConfig
from chiasm_llms.causal import CausalLM, shape_arguments
from chiasm_llms.settings import CausalConfig, MistralConfig, MistralShape


class MistralLM(CausalLM):
    """Mistral-7B-v0.1 (arXiv 2310.06825) and other checkpoints of its architecture.

    Random weights have the shape of Mistral-7B-v0.1 unless told otherwise.
    """

    Config: ClassVar[type[LanguageModelConfig]] = MistralConfig

    @classmethod
    def check_config(cls, source: str, config: PreTrainedConfig) -> None:
        if config.model_type != "mistral":
            raise CheckpointError(
                f"{source!r} holds a model of type {config.model_type!r}, wanted 'mistral'; "
                "the language model `causal` takes any type"
            )
        super().check_config(source, config)

    @classmethod
    def random_config(cls, config: CausalConfig, vocabulary: int) -> PreTrainedConfig:
        """The architecture of random weights: Mistral's."""
        shape = config.architecture
        assert isinstance(shape, MistralShape)
        return transformers.MistralConfig(**shape_arguments(shape, vocabulary), sliding_window=shape.window)
