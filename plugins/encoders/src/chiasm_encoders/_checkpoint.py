"""Checkpoints in Hugging Face's format: a folder or a hub id, safetensors only, never code from the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from transformers.utils import cached_file, logging

from chiasm.errors import CheckpointError

VISION_PART = {r"^(model\.)?vision_(tower|model)\.(vision_model\.)?": ""}
"""Where a whole model (CLIP, LLaVA, InternVL, ...) keeps its vision tower."""


def find_file(source: str, filename: str) -> Path | None:
    """A file of a checkpoint; None where the checkpoint has no such file.

    Raises:
        CheckpointError: the folder does not exist, or the hub id cannot be had.
    """
    folder = Path(source)
    if folder.is_dir():
        path = folder / filename
        return path if path.is_file() else None
    if folder.is_absolute():
        raise CheckpointError(f"pretrained: the folder {source!r} does not exist")
    try:
        found = cached_file(source, filename)
    except OSError as error:
        if filename != "config.json":  # the checkpoint is there, so it is the file that is not
            return None
        raise CheckpointError(_unreachable(source, error)) from error
    return None if found is None else Path(found)


def is_here(source: str) -> bool:
    """Whether a checkpoint's config.json can be read without network: from a folder, or from the hub's cache."""
    return Path(source).is_dir() or isinstance(try_to_load_from_cache(source, "config.json"), str)


def read_json(source: str, filename: str) -> dict[str, Any] | None:
    """A JSON file of a checkpoint; None where the checkpoint has no such file.

    Raises:
        CheckpointError: the folder does not exist, the hub id cannot be had, or the file is no JSON object.
    """
    path = find_file(source, filename)
    if path is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"pretrained: {filename} of {source!r} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"pretrained: {filename} of {source!r} holds no JSON object")
    return content


def read_config(source: str) -> tuple[str, dict[str, Any]]:
    """The model type and the fields of a checkpoint's vision tower, whether it stands alone or in a whole model.

    Raises:
        CheckpointError: there is no such checkpoint, or it has no config.json that names a model type.
    """
    config = read_json(source, "config.json")
    if config is None or not isinstance(config.get("model_type"), str):
        raise CheckpointError(
            f"pretrained: {source!r} has no config.json with a model_type; "
            "wanted a checkpoint in transformers' format: config.json and *.safetensors"
        )
    tower = config.get("vision_config")
    if not isinstance(tower, dict):
        return config["model_type"], config
    # older files of whole models leave out the type of their tower
    return tower.get("model_type") or f"{config['model_type']}_vision_model", tower


def weight_files(source: str) -> list[Path]:
    """The safetensors of a checkpoint: one file, or the shards that its index names.

    Raises:
        CheckpointError: there are none, or a shard is missing.
    """
    single = find_file(source, "model.safetensors")
    if single is not None:
        return [single]
    index = read_json(source, "model.safetensors.index.json")
    if index is None:
        raise CheckpointError(
            f"pretrained: {source!r} has neither model.safetensors nor model.safetensors.index.json. Where there is "
            "pytorch_model.bin alone, convert it in a place where you trust that file"
        )
    files = {name: find_file(source, name) for name in sorted(set(index["weight_map"].values()))}
    absent = {name for name, path in files.items() if path is None}
    if absent:
        raise CheckpointError(f"pretrained: {source!r} lacks the shards {some(absent)} that its index names")
    return [path for path in files.values() if path is not None]


def load_model(model_class: Any, architecture: Any, source: str) -> tuple[Any, set[str]]:
    """A transformers model in float32 with the weights of a checkpoint, and the names that the checkpoint lacks.

    Raises:
        CheckpointError: the weights are missing, unreadable, no safetensors, or disagree with config.json.
    """
    try:
        with _quiet():
            model, info = model_class.from_pretrained(
                source,
                config=architecture,
                dtype=torch.float32,
                use_safetensors=True,
                key_mapping=VISION_PART,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        name = model_class.__name__
        raise CheckpointError(
            f"pretrained: the weights of {source!r} cannot be loaded: {reason}\n"
            "Wanted model.safetensors, or its shards and their index. Where there is pytorch_model.bin alone, run "
            f"{name}.from_pretrained({source!r}).save_pretrained('FOLDER') in a place where you trust that file, "
            "copy preprocessor_config.json to FOLDER and name FOLDER"
        ) from error
    # what a whole model has beside its tower is dropped; a surplus within the tower is another architecture
    own = {name for name, _ in model.named_children()}
    surplus = {
        key for key in info["unexpected_keys"] if key.partition(".")[0] in own and not key.endswith(".position_ids")
    }
    if surplus:
        raise CheckpointError(
            f"pretrained: {source!r} has weights that its config.json knows nothing of: {some(surplus)}"
        )
    return model, set(info["missing_keys"])


def some(names: set[str]) -> str:
    """The first few names of many, for a message."""
    shown = sorted(names)[:4]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def _unreachable(source: str, error: OSError) -> str:
    reason = str(error).partition("\n")[0]
    return (
        f"pretrained: {source!r} is no folder here, and the Hugging Face hub did not give it: {reason}\n"
        f"Without network: run `hf download {source} --local-dir FOLDER` (`huggingface-cli download` in old versions) "
        "on a machine that has one, copy FOLDER here and name it, or copy that machine's cache and set HF_HOME to it"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers from reporting the parts that are left out on purpose; what matters is checked here."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
