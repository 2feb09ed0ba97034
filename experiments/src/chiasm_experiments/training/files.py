"""The files of a run: weights in safetensors, everything else in JSON, each written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Self

from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file, save_model

from chiasm.config import PARTS, Part
from chiasm.errors import CheckpointError
from chiasm.vlm import VLM
from chiasm_experiments.training.shards import copy_whole, is_sharded, load_sharded, whole_state, whole_tensors

RUN, MANIFEST, QUESTIONS, METRICS = "run.json", "manifest.json", "questions.parquet", "metrics.jsonl"
CURVE = "curve.json"
"""Scores at the rungs of a run."""
_WRITTEN = {RUN, MANIFEST, QUESTIONS, METRICS, CURVE, "result.json", "parts.json", "shared.json", *PARTS}


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def remove_partial(folder: Path) -> None:
    """Removes what a process was writing into a folder when it was killed; nobody else may be writing there."""
    for path in folder.glob(".*.*"):
        name, _, process = path.name[1:].rpartition(".")
        if process.isdigit() and name in _WRITTEN:
            path.unlink()


def read_json(path: Path) -> Any:
    """Reads a JSON file of a run.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error}") from error


def save_parts(
    vlm: VLM, folder: Path, parts: Iterable[Part], whole: Collection[Part] = (), *, write: bool = True
) -> None:
    """Writes `PART.safetensors` for each part with a state, and their list last: without it a folder is unfinished.

    Of a part that can learn in some of its parameters alone, such as a language model with LoRA, only those are
    written, unless `whole` names it: its other weights stand nowhere else.

    Called on every worker, as they gather what they hold shards of; the one that is told to `write` does.
    """
    if write:
        folder.mkdir(parents=True, exist_ok=True)
    written = []
    for part in parts:
        module = vlm.part(part)
        if not module.state_dict():
            continue
        temporary = folder / f".{part}.{os.getpid()}"
        learned = vlm.trainable(part)
        every = part in whole or len(learned) == len(list(module.parameters()))
        if is_sharded(module):
            tensors = whole_state(module, keep=write) if every else whole_tensors(learned, keep=write)
            if write:
                save_file(tensors, str(temporary))
        elif write and every:
            save_model(module, str(temporary))
        elif write:
            save_file({name: p.detach().contiguous() for name, p in learned.items()}, str(temporary))
        if write:
            os.replace(temporary, folder / f"{part}.safetensors")
        written.append(part)
    if write:
        write_json(folder / "parts.json", written)


def has_parts(folder: Path) -> bool:
    """Whether a folder holds a finished checkpoint."""
    return (folder / "parts.json").is_file()


def load_parts(vlm: VLM, folder: Path) -> None:
    """Reads the weights that `save_parts` wrote into a model of the same run.

    Raises:
        CheckpointError: a file is missing, damaged, or of another model.
    """
    for part in read_json(folder / "parts.json"):
        file = folder / f"{part}.safetensors"
        try:
            _load(vlm, part, str(file))
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{str(file)!r} does not fit the {part} of this run: {error}") from error
        except Exception as error:  # safetensors raises its own type for a damaged file
            raise CheckpointError(f"{str(file)!r} is damaged: {error}") from error


def _load(vlm: VLM, part: Part, file: str) -> None:
    learned = vlm.trainable(part)
    with safe_open(file, framework="pt") as stored:
        some = set(stored.keys()) == set(learned)
    if not some or len(learned) == len(list(vlm.part(part).parameters())):
        if is_sharded(vlm.part(part)):
            load_sharded(vlm.part(part), file)
        else:
            load_model(vlm.part(part), file, strict=True)
        return
    for name, value in load_file(file).items():
        copy_whole(name, learned[name], value)


class MetricsLog:
    """`metrics.jsonl`: a line for each step of each stage, each step once however often the run was taken up."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rewrite(_read_lines(path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """Adds a step; steps that the run took before it was stopped, and takes again, are dropped first."""
        if step <= self._last.get(stage, 0):
            self.file.close()
            lines = _read_lines(self.path)
            self._rewrite([line for line in lines if line["stage"] != stage or line["step"] < step])
        self._last[stage] = step
        self.file.write(json.dumps({"stage": stage, "step": step, **metrics}) + "\n")

    def take(self, stage: str, path: Path) -> None:
        """Takes the steps of a stage from another log, in place of its own."""
        self.file.close()
        lines = [line for line in _read_lines(self.path) if line["stage"] != stage]
        self._rewrite([*lines, *[line for line in _read_lines(path) if line["stage"] == stage]])

    def _rewrite(self, lines: Iterable[dict[str, Any]]) -> None:
        self._last: dict[str, int] = {}
        """The last step of each stage, so that a new one is known for it without a look at all of them."""
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        with temporary.open("w", encoding="utf-8") as file:
            for line in lines:
                self._last[line["stage"]] = max(line["step"], self._last.get(line["stage"], 0))
                file.write(json.dumps(line) + "\n")
        os.replace(temporary, self.path)
        self.file = self.path.open("a", encoding="utf-8", buffering=1)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log as far as they are whole: a kill may have cut the last one off."""
    lines: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines
