"""A language model for each row of `presets`: what `llm: mistral-7b-v0.3` names."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from pydantic import Field, create_model
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from chiasm.errors import ConfigError
from chiasm.settings import Source
from chiasm_llms.causal import CausalLM
from chiasm_llms.presets import PRESETS, Preset
from chiasm_llms.settings import CausalConfig


class PublishedLM(CausalLM):
    """One published model; a folder that `pretrained` names must hold its geometry.

    Random weights have its geometry too, and one token for each byte unless a tokenizer is named; a `shape` makes them
    smaller, in the same architecture.
    """

    preset: ClassVar[Preset]

    @classmethod
    def check_config(cls, source: str, config: PreTrainedConfig) -> None:
        cls.preset.check(source, config)

    @classmethod
    def random_config(cls, config: CausalConfig, vocabulary: int) -> PreTrainedConfig:
        """The architecture of random weights: the model's own."""
        shape, preset = config.shape, cls.preset
        if shape is None:
            if vocabulary > preset.vocabulary:
                raise ConfigError(
                    f"tokenizer: {config.tokenizer!r} has {vocabulary} tokens, {preset.name} has room for "
                    f"{preset.vocabulary}; leave it out"
                )
            return preset.config()
        return dataclasses.replace(
            preset,
            vocabulary=vocabulary,
            width=shape.width,
            depth=shape.depth,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            mlp_width=shape.mlp_width,
            context=shape.context_length,
        ).config()

    @classmethod
    def has_template(cls, source: str) -> bool:
        return cls.preset.template is not None or super().has_template(source)

    @classmethod
    def read_tokenizer(cls, source: str) -> PreTrainedTokenizerBase:
        tokenizer = super().read_tokenizer(source)
        if tokenizer.chat_template is None:
            tokenizer.chat_template = cls.preset.template
        return tokenizer


def published(preset: Preset) -> type[PublishedLM]:
    """The class of a preset, `pretrained` its hub id unless a run says otherwise."""
    config = create_model(
        f"{preset.class_name}Config",
        __base__=CausalConfig,
        __module__=__name__,
        __doc__=f"{preset.source} with its tokenizer, or random weights of its geometry.",
        pretrained=(
            Source | None,
            Field(default=preset.source, description="Hub id or folder; null for random weights, a control."),
        ),
    )
    members = {"Config": config, "preset": preset, "__module__": __name__, "__doc__": f"{preset.source}."}
    return type(preset.class_name, (PublishedLM,), members)


globals().update({preset.class_name: published(preset) for preset in PRESETS})
