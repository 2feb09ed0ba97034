"""The same steps on one worker and on two, each with the whole model (DDP) or with shards of it (FSDP2), give the same.

All work of the two workers happens in one pair of processes, which talk through gloo; each test looks at a part of it.
"""

from __future__ import annotations

import multiprocessing
import traceback
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image

from chiasm.build import build_vlm
from chiasm.config import RunConfig
from chiasm.sample import Sample, Turn
from chiasm_experiments.data.mixture import Mixture
from chiasm_experiments.training.checkpoint import Checkpoints
from chiasm_experiments.training.run import make_feed
from chiasm_experiments.training.shards import whole_tensors
from chiasm_experiments.training.stage import train_stage
from chiasm_experiments.training.strategy import Alone, Replicated, Sharded
from chiasm_experiments.training.workers import Workers

CPU = torch.device("cpu")
PATIENCE = 120
"""Seconds after which the workers are taken to wait for each other."""
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
STRATEGIES = {"alone": Alone, "ddp": Replicated, "fsdp": Sharded}

CLIP = {"image_size": 28, "patch_size": 14, "width": 8, "depth": 2, "heads": 2, "mlp_width": 8}
LLAMA = {"width": 16, "depth": 2, "heads": 2, "kv_heads": 1, "mlp_width": 24, "context_length": 128}
BASE = {
    "vision": {"encoders": [{"name": "clip", "shape": CLIP}]},
    "llm": {"name": "causal", "shape": LLAMA},
    "system": "",
}
STAGE = {"name": "s", "data": "world", "lr": 1e-3, "batch_size": 5, "steps": 2, "warmup": 0.0, "weight_decay": 0.1}
STAGE |= {"clip_norm": 0.5}  # less than the first steps have

EVERY = ["adapter", "tokens", "llm"]
CASES: dict[str, dict[str, Any]] = {
    "all": {"train": EVERY},
    "accumulated": {"train": EVERY, "micro_batch_size": 1},  # of 5 samples, so 3 on one worker and 2 on the other
    "tied": {"train": EVERY},
    "lora": {"train": EVERY},
    "connector": {"train": ["adapter"], "batch_size": 2, "steps": 6},  # at times one worker has no image
    "encoders": {"train": ["encoders", "adapter"], "batch_size": 2, "steps": 6},  # and CLIP's last block is not used
    "one sample": {"train": EVERY, "batch_size": 1, "steps": 6},  # the other worker has none
    "one sample, connector": {"train": ["adapter"], "batch_size": 1, "steps": 6},  # at times nobody has an image
}
"""What a stage trains on how much; `tied` and `lora` change the model as well."""


class Square:
    """An image of one colour."""

    def __init__(self, colour: str) -> None:
        self.key = colour

    def load(self) -> Image.Image:
        return Image.new("RGB", (28, 28), COLOURS[self.key])


class Samples:
    """Text, image and two-image samples with answers of different lengths."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Sample:
        names = list(COLOURS)
        colour = names[index % 3]
        if index % 4 == 3:
            return Sample(f"text{index}", (Turn("say", "ok" * (index % 3 + 1)),))
        images = (Square(colour),) if index % 4 else (Square(colour), Square(names[(index + 1) % 3]))
        return Sample(f"s{index}", (Turn("c?", colour),), images)


class StoppedError(Exception):
    pass


class StoppingCheckpoints(Checkpoints):
    """Checkpoints after every step; training is stopped after that of a step."""

    stop = 0

    def write(self, learner, position):
        super().write(learner, position)
        if position.step == self.stop:
            self.wait()
            self.workers.barrier()
            raise StoppedError


class Trial:
    """The model of a case under a strategy."""

    def __init__(self, case: str, strategy: str, workers: Workers, **stage: Any) -> None:
        values = BASE | {"stages": [STAGE | CASES[case] | stage]}
        if case == "lora":
            values |= {"llm": {**values["llm"], "lora": {"rank": 2}}}
        self.run = RunConfig.model_validate(values)
        self.vlm = build_vlm(self.run)
        if case == "tied":
            self.vlm.llm.model.config.tie_word_embeddings = True
            self.vlm.llm.model.tie_weights()
        self.workers = workers
        self.strategy = STRATEGIES[strategy](workers, self.vlm)
        self.strategy.place(self.run)
        self.feed = make_feed(self.vlm, self.run)

    def train(self, folder=None, stop: int = 0) -> list[tuple[float, float]]:
        """The loss and the gradients' norm of each step, on the first worker."""
        log: list[tuple[float, float]] = []
        checkpoints = None
        if folder is not None:
            checkpoints = StoppingCheckpoints(folder, self.workers, 0)
            checkpoints.stop = stop
        with suppress(StoppedError):
            train_stage(
                self.vlm,
                self.run,
                0,
                Mixture([Samples()]),
                self.feed,
                self.workers,
                lambda step, steps, metrics: log.append((metrics["loss"], metrics["gradient_norm"])),
                checkpoints=checkpoints,
                strategy=self.strategy,
            )
        if checkpoints is not None:
            checkpoints.close()
        return log

    def weights(self) -> dict[str, torch.Tensor]:
        tensors = dict(self.vlm.named_parameters())
        return {name: value.clone() for name, value in whole_tensors(tensors, keep=True).items()}


def learn(case: str, strategy: str, workers: Workers):
    """One case under one strategy: the log, and the weights after it."""
    trial = Trial(case, strategy, workers)
    return trial.train(), trial.weights()


def work(rank: int, folder, pipe) -> None:
    """All that one of the two workers does."""
    try:
        torch.set_num_threads(1)
        wait = timedelta(seconds=60)
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=wait)
        workers = Workers(rank, 2, CPU)
        found: dict[Any, Any] = {
            (case, strategy): learn(case, strategy, workers) for case in CASES for strategy in ("ddp", "fsdp")
        }
        dist.destroy_process_group()
        torch.save(found, folder / f"{rank}.pt")
        pipe.send(None)
    except BaseException:
        pipe.send(traceback.format_exc())


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What the two workers found."""
    folder = tmp_path_factory.mktemp("workers")
    context = multiprocessing.get_context("fork")  # each would take seconds to import what is imported here already
    pipes, processes = [], []
    for rank in range(2):
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(rank, folder, theirs))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        for pipe in pipes:
            assert pipe.poll(PATIENCE), "the workers wait for each other"
            error = pipe.recv()
            assert error is None, error
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def assert_close(found, wanted, tolerance=1e-6):
    """Biases of keys are left out: attention cancels them, so their gradients are rounding, which Adam makes large."""
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        if name.endswith("k_proj.bias"):
            continue
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture(scope="module")
def alone():
    return {case: learn(case, "alone", Workers(0, 1, CPU)) for case in CASES}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("case", CASES)
def test_two_workers_take_the_steps_of_one(both, alone, case, strategy):
    log, wanted = alone[case]
    start = Trial(case, "alone", Workers(0, 1, CPU)).weights()
    assert any(not torch.equal(value, start[name]) for name, value in wanted.items())
    for worker in both:
        assert_close(worker[case, strategy][1], wanted)
    found, _ = both[0][case, strategy]
    assert found == [pytest.approx(step, abs=1e-5) for step in log]


def test_accumulation_takes_the_steps_of_one_batch(alone):
    assert_close(alone["accumulated"][1], alone["all"][1])
