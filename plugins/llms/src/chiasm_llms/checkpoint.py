"""Reads Hugging Face checkpoints: configuration, weights, tokenizer.

Every failure becomes a CheckpointError. What transformers raises for a file that it cannot use has no common base, so
any exception of its readers is caught: the input is not ours, and the cause stays chained. No code of a checkpoint is
ever executed (`trust_remote_code` is False, not unset: unset, transformers asks at the terminal), and weights are read
from safetensors alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from chiasm.errors import CheckpointError


def read_config(source: str) -> PreTrainedConfig:
    """The configuration of a checkpoint; reads its config.json only.

    Args:
        source: hub id or absolute path of a folder.

    Raises:
        CheckpointError: it is missing, or of an architecture that transformers does not have.
    """
    _check_folder(source, "config.json")
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(_explain(source, "configuration", error)) from error


def load_weights(
    source: str, config: PreTrainedConfig | None = None, quantization: BitsAndBytesConfig | None = None
) -> PreTrainedModel:
    """A causal language model with the weights of a checkpoint, in float32 on the CPU and in eval mode.

    Args:
        source: hub id or absolute path of a folder.
        config: as `read_config` gives it; None: reads it.
        quantization: how to quantise it; then it is on the GPU, and in bfloat16 where it is not quantised.

    Raises:
        CheckpointError: weights are missing, too many, not safetensors, or of another architecture.
    """
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            config=config or read_config(source),
            dtype=torch.float32 if quantization is None else torch.bfloat16,
            quantization_config=quantization,
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(_explain(source, "weights (*.safetensors)", error)) from error
    # transformers only logs these and fills missing weights with random numbers
    for trouble, keys in (("lacks", info["missing_keys"]), ("has unknown", info["unexpected_keys"])):
        if keys:
            raise CheckpointError(
                f"checkpoint {source!r} does not fit {type(model).__name__}: it {trouble} weights {_some(keys)}"
            )
    model.eval()
    return model


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint.

    Args:
        source: hub id or absolute path of a folder.

    Raises:
        CheckpointError: there is none, it is empty, or it names no end-of-sequence token.
    """
    remedy = "name one with `tokenizer: FOLDER OR HUB ID`"
    folder = Path(source)
    if folder.is_absolute() and not any("token" in path.name or "vocab" in path.name for path in _listed(folder)):
        raise CheckpointError(f"{_name(source)} holds no tokenizer (such as tokenizer.json); {remedy}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(f"{_explain(source, 'tokenizer', error)}; {remedy}") from error
    # for a folder without tokenizer files transformers may make one that knows its special tokens alone
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_ids):
        raise CheckpointError(f"{_name(source)} holds no vocabulary (such as tokenizer.json); {remedy}")
    if tokenizer.eos_token_id is None:
        raise CheckpointError(
            f"the tokenizer of {source!r} names no end-of-sequence token, so no answer could end; {remedy}"
        )
    return tokenizer


def has_chat_template(source: str) -> bool:
    """Whether the tokenizer of a checkpoint has a chat template; reads small files only."""
    if _file(source, "chat_template.jinja") is not None:
        return True
    path = _file(source, "tokenizer_config.json")
    try:
        settings = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except ValueError as error:
        raise CheckpointError(f"tokenizer_config.json of {source!r} is not valid JSON: {error}") from error
    template = settings.get("chat_template")
    # a list holds named templates, of which `default` is the one used without a name
    return any(item.get("name") == "default" for item in template) if isinstance(template, list) else bool(template)


def _file(source: str, name: str) -> Path | None:
    try:
        path = cached_file(
            source,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except Exception as error:
        raise CheckpointError(_explain(source, name, error)) from error
    return Path(path) if path else None


def _check_folder(source: str, file: str) -> None:
    folder = Path(source)
    if not folder.is_absolute():
        return
    held = [path.name for path in _listed(folder)]
    if file not in held:
        raise CheckpointError(
            f"{_name(source)} holds no {file}, so it is no checkpoint of transformers; it holds {_some(held)}"
        )


def _listed(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise CheckpointError(f"{_name(str(folder))} does not exist")
    return sorted(folder.iterdir())


def _name(source: str) -> str:
    return f"folder {source!r}" if Path(source).is_absolute() else f"hub id {source!r}"


def _explain(source: str, what: str, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    text = f"cannot read the {what} of {_name(source)}: {reason}"
    if Path(source).is_absolute():
        return text
    return (
        f"{text}; where the hub cannot be reached, download {source!r} elsewhere and name its folder, or set HF_HOME "
        "to a cache that holds it"
    )


def _some(keys: Any) -> str:
    names = sorted(map(str, keys))
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more if names else "nothing"
