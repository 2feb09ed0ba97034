"""Checkpoints within a stage: all that the next step depends on, so that a run killed anywhere goes on as it was.

A checkpoint is a folder that appears whole, by a rename. Tensors are safetensors, the rest is JSON. Of tensors that
workers hold shards of, each worker writes its own, and any number of workers reads them.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from chiasm.config import StageConfig
from chiasm.errors import CheckpointError
from chiasm.vlm import VLM
from chiasm_experiments.training.shards import copy_whole, read_shards, shard_like, write_shards
from chiasm_experiments.training.workers import Workers

SHARDS = "shards"
KEPT = 2
"""The newest, and the one before it in case the disk damaged the newest."""


@dataclass(slots=True)
class Position:
    """How far a stage has come, and what it has cost so far."""

    step: int = 0
    """Optimiser steps done."""
    losses: list[float] = field(default_factory=list)
    supervised_tokens: int = 0
    cut_positions: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Learner:
    """What a stage changes: the parts that learn, their optimiser, and its schedule."""

    vlm: VLM
    stage: StageConfig
    optimizer: Optimizer
    schedule: LambdaLR

    def tensors(self) -> dict[str, Tensor]:
        """The parameters that learn, and the buffers beside them, by name."""
        found: dict[str, Tensor] = {}
        for part in self.stage.train:
            found |= {f"{part}.{name}": value for name, value in self.vlm.trainable(part).items()}
            module = self.vlm.part(part)
            kept = module.state_dict(keep_vars=True)
            found |= {f"{part}.{name}": value for name, value in module.named_buffers() if name in kept}
        return found

    def moments(self) -> dict[str, Tensor]:
        """The optimiser's state, by its name and the place of the parameter in the optimiser."""
        state = self.optimizer.state_dict()["state"]
        return {f"{key}/{place}": value for place, entry in state.items() for key, value in entry.items()}

    def like(self) -> Callable[[str], Tensor | None]:
        """Of each name that the other methods give the tensor, or for a moment its parameter: it is sharded as that."""
        own, parameters = self.tensors(), self._parameters()
        return lambda name: parameters[int(name.rpartition("/")[2])] if "/" in name else own.get(name)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def restore(self, tensors: dict[str, Tensor], moments: dict[str, Tensor], scalars: dict[str, Any]) -> None:
        """Puts back what the other methods gave."""
        own = self.tensors()
        if set(own) != set(tensors):
            raise CheckpointError(f"it holds other tensors: {sorted(set(own) ^ set(tensors))[:4]}")
        for name, value in tensors.items():
            copy_whole(name, own[name], value)
        parameters = self._parameters()
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in moments.items():
            key, _, place = name.rpartition("/")
            parameter = parameters[int(place)]
            same = value.shape == parameter.shape  # others, such as the count of steps, are whole everywhere
            state.setdefault(int(place), {})[key] = shard_like(parameter, value) if same else value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        for group, rate in zip(self.optimizer.param_groups, scalars["rates"], strict=True):
            group["lr"] = rate
        self.schedule.load_state_dict(scalars["schedule"])

    def scalars(self) -> dict[str, Any]:
        """Rates and the schedule's place, exact in JSON."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return {"rates": rates, "schedule": self.schedule.state_dict()}


class Checkpoints:
    """The checkpoints of one stage of one run.

    Args:
        folder: the stage's own.
        workers: every worker makes one of these; the first writes weights, each its random state.
        seconds: between checkpoints, at least; 0: after every step.
    """

    def __init__(self, folder: Path, workers: Workers, seconds: float) -> None:
        self.folder = folder
        self.workers = workers
        self.seconds = seconds
        self.last = time.monotonic()
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[Any] | None = None
        self._group: Any = None

    def load(self, learner: Learner) -> Position:
        """Puts the newest good checkpoint into a learner; the start, if there is none."""
        for folder in reversed(self._found()):
            read = None
            try:
                read = self._read(folder, learner)
            except Exception as error:  # safetensors has types of its own for damaged files
                print(f"checkpoint {folder.name} cannot be read ({error}); going back to the one before it")
            # a file that one worker cannot read sends all of them back
            if self.workers.sum(float(read is not None)) == self.workers.size:
                assert read is not None
                return self._put(read, learner)
        return Position()

    def due(self) -> bool:
        """Whether it is time for a checkpoint; the first worker's answer is the one that counts."""
        return time.monotonic() - self.last >= self.seconds

    def write(self, learner: Learner, position: Position) -> None:
        """Writes a checkpoint, in the background once the tensors are copied; called on every worker."""
        self.last = time.monotonic()
        self.wait()
        target = self.folder / f"checkpoint-{position.step:08d}"
        partial = self.folder / f".{target.name}"
        if self.workers.first:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / SHARDS).mkdir(parents=True)
        self.workers.barrier()
        save_file(_random_state(self.workers.device), partial / f"random-{self.workers.rank}.safetensors")
        self.workers.barrier()
        # copies, because the next step changes the tensors while the disk is busy
        tensors, moments = learner.tensors(), learner.moments()
        shards = self._write_shards(tensors | moments, partial / SHARDS)
        if self.workers.first:
            files = {"model": _copied(tensors), "optimizer": _copied(moments)}
            told = {**asdict(position), "workers": self.workers.size, **learner.scalars()}
            self._writing = self._writer.submit(self._write, partial, target, files, told, shards)
        else:
            self._writing = shards

    def _write_shards(self, tensors: dict[str, Tensor], folder: Path) -> Future[Any] | None:
        """Begins to write what is sharded; nothing is, where each worker holds all."""
        sharded = {name: value for name, value in tensors.items() if isinstance(value, DTensor)}
        if not sharded:
            return None
        # training's own group is in use meanwhile, and it may have no backend for the CPU
        self._group = self._group or dist.new_group(backend="gloo")
        return write_shards(sharded, folder, self._group)

    def wait(self) -> None:
        """Waits until the checkpoint that is being written is on the disk.

        Raises:
            OSError: it could not be written.
        """
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def close(self) -> None:
        """Ends the writing thread."""
        self._writer.shutdown()
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def clear(self) -> None:
        """Removes all checkpoints: the stage is finished and its weights are saved."""
        self.wait()
        if self.workers.first:
            for folder in [*self.folder.glob("checkpoint-*"), *self.folder.glob(".checkpoint-*")]:
                shutil.rmtree(folder)

    def _found(self) -> list[Path]:
        return sorted(self.folder.glob("checkpoint-*"))

    def _read(self, folder: Path, learner: Learner) -> _Read:
        told = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        random = None
        # with another number of workers the streams are new; only dropout draws from them
        if told["workers"] == self.workers.size:
            random = load_file(folder / f"random-{self.workers.rank}.safetensors")
        shards: dict[str, Tensor] = {}
        if told["shards"]:
            if len(list((folder / SHARDS).iterdir())) != told["shards"]:
                raise CheckpointError("files of shards are missing")
            shards = read_shards(folder / SHARDS, learner.like())
        tensors, moments = load_file(folder / "model.safetensors"), load_file(folder / "optimizer.safetensors")
        tensors |= {name: value for name, value in shards.items() if "/" not in name}
        moments |= {name: value for name, value in shards.items() if "/" in name}
        return _Read(told, tensors, moments, random)

    def _put(self, read: _Read, learner: Learner) -> Position:
        learner.restore(read.tensors, read.moments, read.told)
        if read.random is not None:
            _set_random_state(read.random, self.workers.device)
        told = read.told
        names = ("step", "losses", "supervised_tokens", "cut_positions", "seconds")
        return Position(**{name: told[name] for name in names})

    def _write(
        self,
        partial: Path,
        target: Path,
        files: dict[str, dict[str, Tensor]],
        told: dict[str, Any],
        shards: Future[Any] | None,
    ) -> None:
        for name, tensors in files.items():
            save_file(tensors, partial / f"{name}.safetensors")
        if shards is not None:
            shards.result()  # the first worker's ends when all have written
        told["shards"] = len(list((partial / SHARDS).iterdir()))
        (partial / "state.json").write_text(json.dumps(told), encoding="utf-8")
        for file in partial.rglob("*.*"):
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        shutil.rmtree(target, ignore_errors=True)  # a damaged one, which the run went back behind
        partial.rename(target)
        for old in self._found()[:-KEPT]:
            shutil.rmtree(old)


@dataclass(frozen=True, slots=True)
class _Read:
    """The files of a checkpoint, read before anything is changed."""

    told: dict[str, Any]
    tensors: dict[str, Tensor]
    moments: dict[str, Tensor]
    random: dict[str, Tensor] | None


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU of what is not sharded."""
    whole = {name: value for name, value in tensors.items() if not isinstance(value, DTensor)}
    return {name: value.detach().to("cpu", copy=True) for name, value in whole.items()}


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
