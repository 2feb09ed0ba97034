"""Published language models by name: hub id and geometry, so that they are planned without a network.

Light: nothing heavy is imported to list them. The tests make each on the meta device and compare its parameters with
the published count; a checkpoint that is loaded is compared with its row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chiasm.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """One published model.

    Args:
        name: of the component.
        source: hub id.
        family: transformers' name of the architecture.
        vocabulary: rows of the embedding.
        width: of the hidden states.
        depth: blocks.
        heads: attention heads of queries.
        kv_heads: attention heads of keys and values.
        mlp_width: of the gated MLP.
        context: positions at most.
        base: of the rotary frequencies.
        epsilon: of the normalisations.
        tied: whether the output head is the embedding.
        window: how far back a position attends; None: to the start.
        chat: whether the tokenizer on the hub has a chat template.
        template: a chat template to use where the tokenizer has none.
    """

    name: str
    source: str
    family: str
    vocabulary: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    mlp_width: int
    context: int
    base: float
    epsilon: float = 1e-5
    tied: bool = False
    window: int | None = None
    chat: bool
    template: str | None = None

    @property
    def class_name(self) -> str:
        """Of its class in `published`: `mistral-7b-v0.1` is Mistral7bV0_1."""
        return "".join(word.capitalize() for word in self.name.replace(".", "_").split("-"))

    def config(self) -> PreTrainedConfig:
        """The geometry as a configuration of transformers."""
        from transformers import AutoConfig

        extra = {"sliding_window": self.window} if self.family == "mistral" else {}
        return AutoConfig.for_model(
            self.family,
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.mlp_width,
            num_hidden_layers=self.depth,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.context,
            rope_parameters={"rope_type": "default", "rope_theta": self.base},
            rms_norm_eps=self.epsilon,
            tie_word_embeddings=self.tied,
            bos_token_id=None,
            eos_token_id=None,
            **extra,
        )

    def check(self, source: str, config: PreTrainedConfig) -> None:
        """Compares the configuration of a checkpoint with the row.

        Raises:
            CheckpointError: it has another architecture or geometry.
        """
        wanted = self.config()
        for key in _GEOMETRY:
            given = getattr(config, key, None)
            if given != getattr(wanted, key):
                raise CheckpointError(
                    f"{source!r} is no {self.name}: {key} is {given!r}, wanted {getattr(wanted, key)!r}; "
                    "the language model `causal` takes any folder"
                )


_GEOMETRY = (
    "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "tie_word_embeddings",
)  # fmt: skip
"""What decides the shapes of the weights."""

VICUNA = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}{% else %}"
    "{{ 'A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user\\'s questions. ' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER:' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT:' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""Vicuna v1.1's and v1.5's (FastChat, conversation.py), for pieces of text that are tokenised one by one.

The spaces that FastChat writes before and after a message are those that a SentencePiece tokenizer puts before each
piece, so the ids are the same.
"""


def _family(shape: dict[str, Any], *rows: tuple[str, str, dict[str, Any]]) -> tuple[Preset, ...]:
    """Presets that share a shape, each with its name, hub id, and what differs."""
    return tuple(Preset(**{**shape, "name": name, "source": source, **own}) for name, source, own in rows)


_MISTRAL_7B: dict[str, Any] = {
    "family": "mistral", "width": 4096, "depth": 32, "heads": 32, "kv_heads": 8, "mlp_width": 14336, "context": 32768,
}  # fmt: skip
_MISTRAL_V1: dict[str, Any] = {"vocabulary": 32000, "base": 1e4, "window": 4096}
_MISTRAL_V2: dict[str, Any] = {"vocabulary": 32000, "base": 1e6}
_MISTRAL_V3: dict[str, Any] = {"vocabulary": 32768, "base": 1e6}

_LLAMA_2_7B: dict[str, Any] = {
    "family": "llama", "vocabulary": 32000, "width": 4096, "depth": 32, "heads": 32, "kv_heads": 32,
    "mlp_width": 11008, "context": 4096, "base": 1e4,
}  # fmt: skip
_LLAMA_3_8B: dict[str, Any] = {
    "family": "llama", "vocabulary": 128256, "width": 4096, "depth": 32, "heads": 32, "kv_heads": 8,
    "mlp_width": 14336, "context": 8192, "base": 5e5,
}  # fmt: skip

_QWEN: dict[str, Any] = {"family": "qwen2", "base": 1e6, "epsilon": 1e-6, "chat": True}
_QWEN_HALF_B = _QWEN | {
    "vocabulary": 151936, "width": 896, "depth": 24, "heads": 14, "kv_heads": 2, "mlp_width": 4864, "context": 32768,
    "tied": True,
}  # fmt: skip
_QWEN_1_5B = _QWEN | {
    "vocabulary": 151936, "width": 1536, "depth": 28, "heads": 12, "kv_heads": 2, "mlp_width": 8960, "tied": True,
}  # fmt: skip
_QWEN_7B = _QWEN | {
    "vocabulary": 152064, "width": 3584, "depth": 28, "heads": 28, "kv_heads": 4, "mlp_width": 18944,
}  # fmt: skip

_SMOL: dict[str, Any] = {"family": "llama", "vocabulary": 49152, "context": 8192, "base": 1e5, "tied": True}
_SMOL_135M = _SMOL | {"width": 576, "depth": 30, "heads": 9, "kv_heads": 3, "mlp_width": 1536}
_SMOL_360M = _SMOL | {"width": 960, "depth": 32, "heads": 15, "kv_heads": 5, "mlp_width": 2560}
_SMOL_1_7B = _SMOL | {"width": 2048, "depth": 24, "heads": 32, "kv_heads": 32, "mlp_width": 8192, "base": 1.3e5}

PRESETS: tuple[Preset, ...] = (
    # Mistral (arXiv 2310.06825) and its later versions
    *_family(
        _MISTRAL_7B,
        ("mistral-7b-v0.1", "mistralai/Mistral-7B-v0.1", _MISTRAL_V1 | {"chat": False}),
        ("mistral-7b-instruct-v0.1", "mistralai/Mistral-7B-Instruct-v0.1", _MISTRAL_V1 | {"chat": True}),
        # published as a file of its own format; this is the conversion that is used for it
        ("mistral-7b-v0.2", "mistral-community/Mistral-7B-v0.2", _MISTRAL_V2 | {"chat": False}),
        ("mistral-7b-instruct-v0.2", "mistralai/Mistral-7B-Instruct-v0.2", _MISTRAL_V2 | {"chat": True}),
        ("mistral-7b-v0.3", "mistralai/Mistral-7B-v0.3", _MISTRAL_V3 | {"chat": False}),
        ("mistral-7b-instruct-v0.3", "mistralai/Mistral-7B-Instruct-v0.3", _MISTRAL_V3 | {"chat": True}),
    ),
    # Llama 2 (arXiv 2307.09288), Vicuna on top of it, Llama 3 (arXiv 2407.21783)
    *_family(
        _LLAMA_2_7B,
        ("llama-2-7b", "meta-llama/Llama-2-7b-hf", {"chat": False}),
        ("llama-2-7b-chat", "meta-llama/Llama-2-7b-chat-hf", {"chat": True}),
        ("vicuna-7b-v1.5", "lmsys/vicuna-7b-v1.5", {"chat": False, "template": VICUNA}),
    ),
    *_family(
        _LLAMA_3_8B,
        ("llama-3-8b", "meta-llama/Meta-Llama-3-8B", {"chat": False}),
        ("llama-3-8b-instruct", "meta-llama/Meta-Llama-3-8B-Instruct", {"chat": True}),
    ),
    # Qwen2.5 (arXiv 2412.15115)
    *_family(
        _QWEN_HALF_B,
        ("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B", {}),
        ("qwen2.5-0.5b-instruct", "Qwen/Qwen2.5-0.5B-Instruct", {}),
    ),
    *_family(
        _QWEN_1_5B,
        ("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B", {"context": 131072}),
        ("qwen2.5-1.5b-instruct", "Qwen/Qwen2.5-1.5B-Instruct", {"context": 32768}),
    ),
    *_family(
        _QWEN_7B,
        ("qwen2.5-7b", "Qwen/Qwen2.5-7B", {"context": 131072}),
        ("qwen2.5-7b-instruct", "Qwen/Qwen2.5-7B-Instruct", {"context": 32768}),
    ),
    # SmolLM2 (arXiv 2502.02737)
    *_family(
        _SMOL_135M,
        ("smollm2-135m-base", "HuggingFaceTB/SmolLM2-135M", {"chat": False}),
        ("smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", {"chat": True}),
    ),
    *_family(
        _SMOL_360M,
        ("smollm2-360m-base", "HuggingFaceTB/SmolLM2-360M", {"chat": False}),
        ("smollm2-360m-instruct", "HuggingFaceTB/SmolLM2-360M-Instruct", {"chat": True}),
    ),
    *_family(
        _SMOL_1_7B,
        ("smollm2-1.7b-base", "HuggingFaceTB/SmolLM2-1.7B", {"chat": False}),
        ("smollm2-1.7b-instruct", "HuggingFaceTB/SmolLM2-1.7B-Instruct", {"chat": True}),
    ),
)

BY_SOURCE = {preset.source: preset for preset in PRESETS}
"""The presets by hub id."""
