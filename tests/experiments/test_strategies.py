"""The same steps on one worker, on two and on three, each with the whole model (DDP) or with shards of it (FSDP2).

All work of three workers happens in three processes, and that of two in a pair, which talk through gloo; each test
looks at a part of it.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file

from chiasm.build import build_vlm
from chiasm.config import RunConfig
from chiasm.errors import ConfigError
from chiasm.sample import Sample, Turn
from chiasm_experiments.data.mixture import Mixture
from chiasm_experiments.data.order import Order
from chiasm_experiments.evaluation import answer
from chiasm_experiments.training import guide
from chiasm_experiments.training.checkpoint import Checkpoints
from chiasm_experiments.training.execution import Execution
from chiasm_experiments.training.files import load_parts, save_parts
from chiasm_experiments.training.packing import Packing
from chiasm_experiments.training.run import Job, execute, make_feed
from chiasm_experiments.training.shards import is_sharded, whole_tensors
from chiasm_experiments.training.stage import train_stage
from chiasm_experiments.training.strategy import Alone, Replicated, Sharded
from chiasm_experiments.training.workers import Workers

CPU = torch.device("cpu")
PATIENCE = 200
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
    "packed": {"train": EVERY},  # each forward pass one row of documents
    "recomputed": {"train": EVERY},  # blocks again in the backward pass
    "tied": {"train": EVERY},
    "lora": {"train": EVERY},
    "connector": {"train": ["adapter"], "batch_size": 2, "steps": 3},  # at times one worker has no image
    "encoders": {"train": ["encoders", "adapter"], "batch_size": 2},  # and CLIP's last block is not used
    "one sample": {"train": EVERY, "batch_size": 1, "steps": 3},  # the other worker has none
    "one sample, connector": {"train": ["adapter"], "batch_size": 1, "steps": 3},  # at times nobody has an image
}
"""What a stage trains on how much; some names say more."""
OF_THREE = ("all", "accumulated", "packed", "lora", "connector", "one sample")
"""Cases that three workers train too: of five samples two have 2 and one has 1, and of two or one some have none."""
HALF = {"bfloat16": {"train": ["adapter", "tokens"]}}


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

    def __init__(self, case: str, strategy: str, workers: Workers, dropout: float = 0.0, **stage: Any) -> None:
        self.case = case
        first = STAGE | (CASES | HALF)[case] | stage
        values = BASE | {"stages": [first, first | {"name": "t", "train": ["llm"]}]}
        if case in ("lora", "bfloat16"):
            values |= {"llm": {**values["llm"], "lora": {"rank": 2, "dropout": dropout}}}
        if case == "bfloat16":
            values |= {"precision": case}
        self.run = RunConfig.model_validate(values)
        self.vlm = build_vlm(self.run)
        if case == "tied":
            self.vlm.llm.model.config.tie_word_embeddings = True
            self.vlm.llm.model.tie_weights()
        self.workers = workers
        self.strategy = STRATEGIES[strategy](workers, self.vlm)
        self.strategy.place(self.run)
        self.feed = make_feed(self.vlm, self.run)

    def train(self, folder=None, stop: int = 0, index: int = 0) -> list[tuple[float, float]]:
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
                index,
                Mixture([Samples()]),
                self.feed,
                self.workers,
                lambda step, steps, metrics: log.append((metrics["loss"], metrics["gradient_norm"])),
                checkpoints=checkpoints,
                activation_checkpointing="on" if self.case == "recomputed" else "off",
                packing=Packing.choose("on" if self.case == "packed" else "off", self.vlm.llm, CPU),
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


def stop_and_go_on(workers: Workers, folder) -> dict[str, Any]:
    """Stages of four steps that are stopped after two; some go on under another strategy."""
    found = {"undisturbed": Trial("lora", "fsdp", workers, dropout=0.5, steps=4)}
    found["undisturbed"].train()
    stopped = Trial("lora", "fsdp", workers, dropout=0.5, steps=4)
    stopped.train(folder / "lora", stop=2)
    found["stopped"] = stopped
    found["same"] = Trial("lora", "fsdp", workers, dropout=0.5, steps=4)
    found["same"].train(folder / "lora")
    for before, after in (("fsdp", "ddp"), ("ddp", "fsdp")):
        Trial("all", before, workers, steps=4).train(folder / before, stop=2)
        if workers.first:
            shutil.copytree(folder / before, folder / f"{before} for one")
        workers.barrier()
        found[f"{before} to {after}"] = Trial("all", after, workers, steps=4)
        found[f"{before} to {after}"].train(folder / before)
    return {name: trial.weights() for name, trial in found.items()}


def stop_on_three(workers: Workers, folder) -> None:
    """Stages of four steps that three workers stop after two."""
    for strategy in ("ddp", "fsdp"):
        Trial("all", strategy, workers, steps=4).train(folder / f"{strategy} of three", stop=2)


def go_on_from_three(workers: Workers, folder) -> dict[str, Any]:
    """Two workers go on where three stopped, under the other strategy."""
    found = {}
    for before, after in (("fsdp", "ddp"), ("ddp", "fsdp")):
        place = folder / f"{before} of three for two"
        if workers.first:
            shutil.copytree(folder / f"{before} of three", place)
        workers.barrier()
        trial = Trial("all", after, workers, steps=4)
        assert len(trial.train(place)) == 2 * workers.first
        found[before] = trial.weights()
    return found


def connectors_and_all(workers: Workers, folder) -> dict[str, Any]:
    """A first stage that trains the adapter alone, and a second one of the language model."""
    found = {}
    for strategy in ("ddp", "fsdp"):
        trial = Trial("connector", strategy, workers)
        found[strategy] = in_two_stages(trial)[0], trial.weights()
    return found


def save_and_load(workers: Workers, folder) -> dict[str, Any]:
    """Weights before they are saved, and those of another sharded model that reads them."""
    found = {}
    for case in ("all", "tied", "lora"):
        trial, other = (Trial(case, "fsdp", workers, lr=lr) for lr in (1e-3, 1e-2))
        trial.train()
        other.train()
        whole = () if case == "lora" else ("llm",)
        save_parts(trial.vlm, folder / case, ["adapter", "tokens", "llm"], whole, write=workers.first)
        workers.barrier()
        load_parts(other.vlm, folder / case)
        found[case] = (trial.weights(), other.weights())
    held = sum(p.to_local().numel() for p in trial.vlm.llm.parameters())
    return found | {"held": held, "of": sum(p.numel() for p in trial.vlm.llm.parameters())}


def answer_alone(workers: Workers, folder) -> list[str]:
    """Answers of a sharded model, the first worker's to more questions than the second's."""
    trial = Trial("all", "fsdp", workers)
    with trial.strategy.whole():
        answers = answers_of(trial, 2 - workers.rank)
    assert is_sharded(trial.vlm.llm)
    assert trial.train() == learn("all", "fsdp", workers)[0]
    return answers


def answers_of(trial: Trial, count: int) -> list[str]:
    samples = [Sample("q", (Turn("c?"),), (Square(colour),)) for colour in list(COLOURS)[:count]]
    trial.run = trial.run.model_copy(update={"evaluation_batch_size": 1})
    return answer(trial.vlm, trial.run, trial.feed, samples, CPU, max_new_tokens=5 * count)


def train_in_half_precision(workers: Workers, folder) -> Any:
    """A stage that trains nothing of the language model, and one that trains its float32 matrices beside bfloat16."""
    return in_two_stages(Trial("bfloat16", "fsdp", workers))


def refuse_adafactor(workers: Workers, folder) -> str:
    """What a stage says whose optimiser cannot train shards."""
    with pytest.raises(ConfigError) as refused:
        Trial("all", "fsdp", workers, optimizer="adafactor").train()
    return str(refused.value)


class Judge(guide.Unguided):
    """Stops a run after its third step, or prunes it, where this worker is the one that is asked."""

    def __init__(self, stop: int = 0, prune: int | None = None) -> None:
        self.stop = stop
        self.prune = prune
        self.steps: list[int] = []
        self.reports: list[int] = []

    def progress(self, what, step, steps, metrics):
        if metrics:
            self.steps.append(step)

    def stopping(self):
        return self.stop > 0 and self.steps[-1:] == [self.stop]

    def report(self, rung, share, scores):
        self.reports.append(rung)
        return rung != self.prune


def guided(workers: Workers, folder) -> dict[str, Any]:
    """How runs of both workers end that the first one's guide stops or prunes, and what others come to."""
    world = {"name": "world", "image_size": 96, "skills": ["colour"]}
    stage = {**STAGE, "data": {**world, "task": "dialogues", "size": 12}, "train": EVERY, "steps": 6}
    run = RunConfig.model_validate(BASE | {"stages": [stage], "evaluate": {**world, "size": 5}})
    found: dict[str, Any] = {}
    for strategy in ("ddp", "fsdp"):
        for name, judge, rungs in (
            ("plain", Judge(), ()),
            ("asked", Judge(), (0.5,)),
            ("stopped", Judge(stop=3), (0.5,)),
            ("stopped", Judge(), (0.5,)),  # and taken up
            ("pruned", Judge(prune=0), (0.5,)),
        ):
            place = folder / f"guided {strategy} {name}"
            place.mkdir(exist_ok=True)
            workers.barrier()
            execution = Execution(strategy=strategy, loggers=(), cache="off", loader_workers=0)
            labels: dict[str, Any] = {"trial": name, "study": None, "cell": {}}
            job = Job(run.model_dump(mode="json"), str(place), labels, execution, rungs=rungs, rung_questions=3)
            try:
                ended = execute(job, judge, workers=workers)["status"]
            except guide.StoppedError as stopped:
                ended = str(stopped)
            told = (judge.steps, judge.reports) if workers.first else ([], [])
            found.setdefault(f"{strategy} {name}", []).append((ended, *told))
    return found


def in_two_stages(trial: Trial) -> tuple[list[tuple[float, float]], set[str]]:
    log = trial.train()
    before = trial.weights()
    log += trial.train(index=1)
    return log, {name for name, value in trial.weights().items() if not torch.equal(value, before[name])}


WORK: dict[int, tuple[Callable[[Workers, Path], Any], ...]] = {
    3: (stop_on_three, connectors_and_all),
    2: (
        stop_and_go_on,
        go_on_from_three,
        save_and_load,
        answer_alone,
        train_in_half_precision,
        refuse_adafactor,
        guided,
    ),
}
"""What so many workers do, in this order, beside training the cases."""


def work(rank: int, size: int, folder: Path) -> None:
    """All that one worker of two or of three does."""
    torch.set_num_threads(1)
    wait = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{size}", rank=rank, world_size=size, timeout=wait)
    workers = Workers(rank, size, CPU)
    cases = OF_THREE if size == 3 else CASES
    found: dict[Any, Any] = {
        (case, strategy): learn(case, strategy, workers) for case in cases for strategy in ("ddp", "fsdp")
    }
    for step in WORK[size]:
        found[step.__name__] = step(workers, folder)
    dist.destroy_process_group()
    torch.save(found, folder / f"{rank} of {size}.pt")


def main(folder: Path) -> int:
    """All workers; how many failed."""
    Trial("lora", "alone", Workers(0, 1, CPU))  # imports what all need, before they part
    context = multiprocessing.get_context("fork")
    for size in WORK:
        processes = [context.Process(target=work, args=(rank, size, folder)) for rank in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if failed := sum(process.exitcode != 0 for process in processes):
            return failed
    return 0


@pytest.fixture(scope="module")
def found(request, tmp_path_factory):
    """What the workers found, by how many they were, once for all processes that run tests."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "workers"
    files = {size: [folder / f"{rank} of {size}.pt" for rank in range(size)] for size in WORK}
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            let_them_work(folder, lambda: request.getfixturevalue("alone"))
    assert all(file.exists() for some in files.values() for file in some), (folder / "errors").read_text()
    return {size: [torch.load(file) | {"folder": folder} for file in some] for size, some in files.items()}


@pytest.fixture(scope="module")
def both(found):
    """What the two workers found."""
    return found[2]


@pytest.fixture(scope="module")
def three(found):
    """What the three workers found."""
    return found[3]


def let_them_work(folder: Path, meanwhile: Callable[[], object]) -> None:
    with (folder / "errors").open("w") as errors:
        # not forked from here, where autograd has run
        process = subprocess.Popen([sys.executable, __file__, str(folder)], stderr=errors, start_new_session=True)
    meanwhile()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"the workers wait for each other: {(folder / 'errors').read_text()}")


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
    """What one worker finds."""
    return {case: learn(case, "alone", Workers(0, 1, CPU)) for case in CASES}


@pytest.fixture(scope="module")
def undisturbed():
    trial = Trial("all", "alone", Workers(0, 1, CPU), steps=4)
    trial.train()
    return trial.weights()


def test_workers_meet_what_they_are_to_meet():
    """Of the samples of each step some workers have no image, some have none at all, and in a step nobody has one."""
    shares = []
    for size, steps in ((5, 2), (2, 3), (1, 3)):
        for step in range(steps):
            samples = [Samples()[i] for i in Order(12, size, 0, 0).step(step)]
            shares.append([[len(sample.images) for sample in samples[rank::2]] for rank in range(2)])
    assert any(sum(first) and second and not sum(second) for first, second in shares)
    assert any(sum(second) and first and not sum(first) for first, second in shares)
    assert any(not second for _, second in shares)
    assert any(not sum(first + second) for first, second in shares)
    assert any({0, 1, 2} <= {*first, *second} for first, second in shares)


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


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("case", OF_THREE)
def test_three_workers_with_uneven_shares_take_the_steps_of_one(three, alone, case, strategy):
    log, wanted = alone[case]
    for worker in three:
        assert_close(worker[case, strategy][1], wanted)
    assert three[0][case, strategy][0] == [pytest.approx(step, abs=1e-5) for step in log]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_three_workers_train_both_stages_as_one_does(three, strategy):
    one = Trial("connector", "alone", Workers(0, 1, CPU))
    wanted, changed = in_two_stages(one)
    assert changed
    assert all(name.startswith("llm") for name in changed)
    for worker in three:
        assert_close(worker["connectors_and_all"][strategy][1], one.weights())
    assert three[0]["connectors_and_all"][strategy][0] == [pytest.approx(step, abs=1e-5) for step in wanted]


@pytest.mark.parametrize("before", ["ddp", "fsdp"])
@pytest.mark.parametrize("workers", [1, 2])
def test_fewer_workers_go_on_where_three_stopped(both, undisturbed, before, workers, tmp_path):
    if workers == 2:
        for worker in both:
            assert_close(worker["go_on_from_three"][before], undisturbed)
        return
    one = Trial("all", "alone", Workers(0, 1, CPU), steps=4)
    assert len(one.train(shutil.copytree(both[0]["folder"] / f"{before} of three", tmp_path / before))) == 2
    assert_close(one.weights(), undisturbed)


@pytest.mark.parametrize("case", ["accumulated", "packed", "recomputed"])
def test_a_step_in_parts_in_one_row_or_with_blocks_computed_again_is_the_same(alone, case):
    assert_close(alone[case][1], alone["all"][1])


def test_a_sharded_stage_that_was_stopped_goes_on_to_the_same_bits(both):
    """With dropout, so that each worker's random state counts."""
    for worker in both:
        found = worker["stop_and_go_on"]
        assert any(not torch.equal(value, found["undisturbed"][name]) for name, value in found["stopped"].items())
        for name, value in found["undisturbed"].items():
            assert torch.equal(found["same"][name], value), name


@pytest.mark.parametrize(("before", "after"), [("fsdp", "ddp"), ("ddp", "fsdp"), ("fsdp", "one"), ("ddp", "one")])
def test_a_checkpoint_serves_another_strategy_and_number_of_workers(both, undisturbed, before, after, tmp_path):
    found = both[0]["stop_and_go_on"].get(f"{before} to {after}")
    if after == "one":
        folder = both[0]["folder"] / f"{before} for one"
        assert [path.name for path in sorted(folder.iterdir())] == ["checkpoint-00000001", "checkpoint-00000002"]
        files = {path.suffix for path in folder.rglob("*") if path.is_file()}
        assert files == {".safetensors", ".json"}
        one = Trial("all", "alone", Workers(0, 1, CPU), steps=4)
        log = one.train(shutil.copytree(folder, tmp_path / before))
        assert len(log) == 2
        found = one.weights()
    assert_close(found, undisturbed)


@pytest.mark.parametrize("case", ["all", "tied", "lora"])
def test_what_is_sharded_is_saved_whole_and_read_by_anyone(both, case):
    saved, read = both[0]["save_and_load"][case]
    one = Trial(case, "alone", Workers(0, 1, CPU))
    assert any(not torch.equal(value, saved[name]) for name, value in one.weights().items())
    load_parts(one.vlm, both[0]["folder"] / case)
    for found in (read, one.weights()):
        for name, value in saved.items():
            assert torch.equal(found[name], value), name


def test_each_worker_holds_its_share_of_the_language_model(both):
    held = [worker["save_and_load"]["held"] for worker in both]
    assert sum(held) == both[0]["save_and_load"]["of"]
    assert max(held) < 0.6 * sum(held)


def test_workers_answer_different_numbers_of_questions(both):
    one = Trial("all", "alone", Workers(0, 1, CPU))
    assert [worker["answer_alone"] for worker in both] == [answers_of(one, 2), answers_of(one, 1)]


def test_an_optimiser_that_cannot_train_shards_is_refused_on_every_worker(both):
    for worker in both:
        assert "adafactor" in worker["refuse_adafactor"]
        assert "strategy=ddp" in worker["refuse_adafactor"]


def test_frozen_half_precision_beside_what_learns_in_float32(both):
    wanted, changed = in_two_stages(Trial("bfloat16", "alone", Workers(0, 1, CPU)))
    assert changed
    assert all("lora" in name for name in changed)
    for worker in both:
        assert worker["train_in_half_precision"][1] == changed
    assert both[0]["train_in_half_precision"][0] == [pytest.approx(step, rel=0.02) for step in wanted]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_first_workers_guide_stops_and_prunes_all_workers_at_once(both, strategy):
    first, second = (found["guided"] for found in both)
    stopped = "stage 's' was stopped after step 3 of 6"
    every = [1, 2, 3, 4, 5, 6]
    assert first[f"{strategy} plain"] == [("complete", every, [])]
    assert first[f"{strategy} asked"] == [("complete", every, [0])]
    assert first[f"{strategy} stopped"] == [(stopped, every[:3], [0]), ("complete", every[3:], [0])]
    assert first[f"{strategy} pruned"] == [("pruned", every[:3], [0])]
    for name, ends in second.items():
        assert [end for end, *_ in ends] == [end for end, *_ in first[name]]
    wanted, *others = (
        {
            f"{file.stem}.{name}": value
            for file in (both[0]["folder"] / f"guided {strategy} {name}").glob("stages/s/*.safetensors")
            for name, value in load_file(file).items()
        }
        for name in ("plain", "asked", "stopped")
    )
    for found in others:
        assert len(found) == len(wanted) > 0
        assert all(torch.equal(found[name], value) for name, value in wanted.items())


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
