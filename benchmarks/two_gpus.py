"""On two GPUs: the same result, in less time.

Training: CLIP-L/14-336, an MLP and Mistral-7B with LoRA (random weights at real shapes), stage 1 (connectors) and then
stage 2 (connectors and LoRA) from JPEGs on the disk, on one GPU, and on two with DDP and with FSDP2 through Ray Train:
samples/s, peak memory of each GPU, and the first losses with the same global batch. Then stage 2 in full, which one
GPU of 80 GB cannot hold, in shards on two.

Studies, on a cluster of one GPU and on one of two: trials at half a GPU each; a trial on both GPUs one of whose workers
is killed, beside the next trial of its study; and two studies at once, of halves and of a whole GPU.

    python benchmarks/two_gpus.py [--tiny] [--part training|studies]

`--tiny` takes models of a few hundred weights and gloo on the CPU, to see that it works; it writes no result.

Shape letters: none.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
import yaml
from common import RESULTS, write_result
from speed import REAL, TINY, Scale, captions

from chiasm.build import build_vlm
from chiasm.config import RunConfig
from chiasm_experiments.data.mixture import load_mixture
from chiasm_experiments.study.folder import TRIALS
from chiasm_experiments.study.storage import open_storage
from chiasm_experiments.training.compiling import compile_model
from chiasm_experiments.training.files import METRICS
from chiasm_experiments.training.packing import Packing
from chiasm_experiments.training.run import make_feed
from chiasm_experiments.training.stage import train_stage
from chiasm_experiments.training.strategy import Alone, Replicated, Sharded
from chiasm_experiments.training.workers import Workers

STEPS = 20
WARM = 5
"""Steps of a stage that are not measured: they compile."""
GIB = 2**30
FILE = RESULTS / "two_gpus.json"


@dataclass(frozen=True)
class Plan:
    """How large everything is.

    Args:
        batches: samples of a step of stage 1, of stage 2, and of stage 2 in full, over all GPUs.
        images: of the data set of training.
        trials: of a study of halves.
        steps: of a trial.
        gpus: of a whole worker: 1, or 0 on the CPU.
    """

    scale: Scale
    batches: tuple[int, int, int]
    images: int
    trials: int
    steps: int
    gpus: int


LARGE = Plan(REAL, (32, 16, 8), 640, 12, 200, 1)
SMALL = Plan(TINY, (4, 4, 2), 40, 8, 30, 0)


# -- training ---------------------------------------------------------------------------------------------------------


def training_run(plan: Plan, data: dict[str, Any], *, full: bool) -> RunConfig:
    """Both stages as one run."""
    first, second, whole = plan.batches
    llm = {"name": "mistral" if plan.gpus else "causal", "shape": plan.scale.llms["mistral-7b"], "tokenizer": "bytes"}
    stages = [
        {"name": "pretrain", "data": data, "train": ["adapter", "tokens"], "lr": 1e-3, "steps": STEPS}
        | {"batch_size": first, "micro_batch_size": max(1, first // 2)},
        {"name": "finetune", "data": data, "train": ["adapter", "tokens", "llm"], "lr": 2e-5, "steps": STEPS}
        | {"batch_size": second, "micro_batch_size": max(1, second // 2)},
    ]
    if full:
        stages = [stages[1] | {"batch_size": whole, "micro_batch_size": max(1, whole // 8), "steps": 8}]
    return RunConfig.model_validate(
        {
            "vision": {"encoders": [plan.scale.encoders["clip"]], "adapter": "mlp"},
            "llm": llm | ({} if full else {"lora": {"rank": 16}}),
            "stages": stages,
            "system": "",
        }
    )


def train_on_workers(config: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train runs on each worker; on the first one alone where the strategy is so."""
    every = Workers.current()
    run, strategy, full = RunConfig.model_validate(config["run"]), config["strategy"], config["full"]
    found: dict[str, Any] = {}
    workers = Workers(0, 1, every.device) if strategy == "alone" else every
    if strategy != "alone" or every.first:
        found = _train(run, strategy, workers, config["loaders"], full=full)
    every.barrier()
    own = found.pop("peak", 0.0) / GIB
    return found | {"peak_gib": every.sums(*(own * (rank == every.rank) for rank in range(every.size)))}


def _train(run: RunConfig, strategy: str, workers: Workers, loaders: int, *, full: bool) -> dict[str, Any]:
    cuda = workers.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with workers.device:  # a CPU takes minutes for seven billion numbers
        vlm = build_vlm(run)
    way = {"alone": Alone, "ddp": Replicated, "fsdp": Sharded}[strategy](workers, vlm)
    way.place(run)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    compile_model(vlm, "on" if cuda and not full else "off", workers.device, live=True)
    feed = make_feed(vlm, run)
    found: dict[str, Any] = {"stages": {}}
    for index, stage in enumerate(run.stages):
        log: list[dict[str, float]] = []
        train_stage(
            vlm,
            run,
            index,
            load_mixture(stage.data),
            feed,
            workers,
            lambda step, steps, metrics, log=log: log.append(dict(metrics)),
            loaders,
            activation_checkpointing="on" if full else "off",
            packing=Packing.choose("off", vlm.llm, workers.device),
            strategy=way,
        )
        if workers.first:
            rates = [line["samples_per_second"] for line in log[WARM:]]
            found["stages"][stage.name] = {
                "samples_per_second": statistics.median(rates),
                "losses": [line["loss"] for line in log],
            }
    feed.close()
    found["peak"] = float(torch.cuda.max_memory_allocated()) if cuda else 0.0
    return found


def training(plan: Plan) -> dict[str, Any]:
    """Each strategy's speed, losses and memory."""
    from ray.train import RunConfig as TrainRun
    from ray.train import ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    found: dict[str, Any] = {}
    with captions(plan.images) as data, tempfile.TemporaryDirectory() as folder:
        for name, strategy, full in (
            ("one GPU", "alone", False),
            ("two GPUs, ddp", "ddp", False),
            ("two GPUs, fsdp", "fsdp", False),
            ("two GPUs, fsdp, stage 2 in full", "fsdp", True),
        ):
            size = 1 if strategy == "alone" else 2
            run = training_run(plan, data, full=full).model_dump(mode="json")
            scaling = ScalingConfig(
                num_workers=size,
                use_gpu=bool(plan.gpus),
                resources_per_worker={"CPU": 8 if plan.gpus else 0.5} | ({"GPU": 1} if plan.gpus else {}),
            )
            started = time.monotonic()
            trainer = TorchTrainer(
                train_on_workers,
                train_loop_config={"run": run, "strategy": strategy, "full": full, "loaders": 6 if plan.gpus else 0},
                scaling_config=scaling,
                run_config=TrainRun(name=name.replace(" ", "-").replace(",", ""), storage_path=folder),
                torch_config=TorchConfig(backend="nccl" if plan.gpus else "gloo"),
            )
            try:
                found[name] = dict(trainer.fit().return_value)
            except Exception as error:  # the others are measured all the same
                found[name] = {"error": str(error)[-2000:]}
            found[name]["seconds_in_all"] = time.monotonic() - started
            print(name, json.dumps(found[name]), flush=True)
    return found


def judge_training(found: dict[str, Any]) -> dict[str, Any]:
    """Two GPUs to one: speed of each stage, memory, and the largest relative difference of a loss."""
    one, told = found["one GPU"], {}
    for name in ("two GPUs, ddp", "two GPUs, fsdp"):
        two = found[name]
        if "error" in two or "error" in one:
            continue
        ratios = {
            stage: two["stages"][stage]["samples_per_second"] / one["stages"][stage]["samples_per_second"]
            for stage in one["stages"]
        }
        differences = {
            stage: max(
                abs(a - b) / abs(b)
                for a, b in zip(two["stages"][stage]["losses"], one["stages"][stage]["losses"], strict=True)
            )
            for stage in one["stages"]
        }
        memory = max(two["peak_gib"]) / one["peak_gib"][0] if one["peak_gib"][0] else None
        told[name] = {"speed": ratios, "loss_difference": differences, "memory": memory}
    return told


# -- studies ----------------------------------------------------------------------------------------------------------


def write_study(folder: Path, name: str, plan: Plan, trials: int, steps: int, **resources: Any) -> Path:
    """A study of so many equal trials that differ in their learning rate."""
    world = {"name": "world", "image_size": 96, "skills": ["colour"]}
    shape = plan.scale.llms["135m"] | {"context_length": 512}
    run = {
        "vision": {"encoders": [plan.scale.encoders["clip"]], "adapter": "mlp"},
        "llm": {"name": "causal", "shape": shape, "tokenizer": "bytes"},
        "system": "",
        "stages": [
            {"name": "s", "data": {**world, "task": "captions", "size": 64}, "train": ["adapter", "tokens"]}
            | {"batch_size": 8, "steps": steps}
        ],
        "evaluate": {**world, "size": 8},
    }
    study = {
        "name": name,
        "base": run,
        "factors": {"stages.s.lr": {f"lr{i}": 1e-4 * (1 + i) for i in range(trials)}},
        "seeds": [0],
        "resources": {"compile": "off", "loggers": [], "cache": "off"} | resources,
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(study))
    return file


class Sweep:
    """`chiasm sweep` as a process on a running cluster."""

    def __init__(self, study: Path, runs: Path, address: str) -> None:
        self.folder = runs / study.stem
        self.file = (runs / f"{study.stem}.log").open("w")
        env = {**os.environ, "CHIASM_RUNS": str(runs), "RAY_ADDRESS": address}
        words = [sys.executable, "-m", "chiasm.cli", "sweep", str(study), "--json"]
        self.process = subprocess.Popen(words, env=env, stdout=self.file, stderr=subprocess.STDOUT)

    def end(self) -> dict[str, Any]:
        """What became of it: trials, trials at once, and trials an hour once the first ones are through."""
        try:
            code = self.process.wait(300)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise RuntimeError(f"no end in sight: {Path(self.file.name).read_text()[-2000:]}") from None
        self.file.close()
        if code:
            print(Path(self.file.name).read_text()[-4000:], flush=True)
        storage = open_storage(None, self.folder)
        trials = [t for s in storage.get_all_studies() for t in storage.get_all_trials(s._study_id)]
        times = [(t.datetime_start.timestamp(), t.datetime_complete.timestamp()) for t in trials if t.datetime_complete]
        edges = sorted([(start, 1) for start, _ in times] + [(end, -1) for _, end in times])
        running, most = 0, 0
        for _, change in edges:
            running += change
            most = max(most, running)
        # from when the first ones are through, which had processes to start and models to load
        ends = sorted(end for _, end in times)
        counted = len(ends) - most
        return {
            "exit_code": code,
            "states": sorted(t.state.name for t in trials),
            "at_once": most,
            "seconds": ends[-1] - min(start for start, _ in times),
            "trials_per_hour": 3600 * counted / (ends[-1] - ends[most - 1]) if counted > 0 else None,
        }


@contextmanager
def cluster(plan: Plan, gpus: int) -> Iterator[str]:
    """Ray with so many GPUs, or CPUs where there are none; its address."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    given = {"num_cpus": 16 * gpus, "num_gpus": gpus} if plan.gpus else {"num_cpus": gpus, "num_gpus": 0}
    context = ray.init(include_dashboard=False, log_to_driver=False, logging_level="error", **given)
    try:
        yield context.address_info["gcs_address"]
    finally:
        ray.shutdown()


@contextmanager
def watching_gpus(plan: Plan) -> Iterator[Callable[[], list[float] | None]]:
    """The share of looks, one in half a second, at which each GPU was found busy."""
    looks: list[list[float]] = []
    ended = threading.Event()

    def look() -> None:
        command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
        while not ended.wait(0.5):
            said = subprocess.run(command, capture_output=True, text=True).stdout.split()
            looks.append([float(word) for word in said])

    thread = threading.Thread(target=look, daemon=True)
    if plan.gpus:
        thread.start()
    try:
        yield lambda: [sum(v > 0 for v in gpu) / len(gpu) for gpu in zip(*looks, strict=True)] if looks else None
    finally:
        ended.set()


def kill_a_worker(sweep: Sweep, after: int) -> int:
    """Kills the second worker of the first trial once that has logged some steps; the step that it had reached."""
    until = time.monotonic() + 300
    while time.monotonic() < until:
        logs = list(sweep.folder.glob(f"{TRIALS}/*/{METRICS}"))
        lines = logs[0].read_text().splitlines() if logs else []
        found = [p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::RayTrainWorker")]
        if len(lines) >= after and len(found) >= 2:
            found[-1].send_signal(signal.SIGKILL)
            return len(lines)
        if sweep.process.poll() is not None:
            break
        time.sleep(0.05)
    raise RuntimeError("no worker to kill: " + Path(sweep.file.name).read_text()[-3000:])


def steps_once(folder: Path, steps: int) -> bool:
    """Whether the log of every trial has each step once."""
    files = folder.glob(f"{TRIALS}/*/{METRICS}")
    logs = [[json.loads(line)["step"] for line in file.read_text().splitlines()] for file in files]
    return bool(logs) and all(log == list(range(1, steps + 1)) for log in logs)


def studies(plan: Plan) -> dict[str, Any]:
    """Trials at half a GPU on one and on two GPUs; on both GPUs with a kill; and a mixture."""
    # where there is no GPU a CPU stands for one
    half, one = (
        {"gpus_per_worker": share if plan.gpus else 0, "cpus_per_worker": 2 if plan.gpus else share}
        for share in (0.5, 1)
    )
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="two-gpus-", dir="/tmp") as name:
        folder = Path(name)

        def halves(gpus: int) -> None:
            with cluster(plan, gpus) as address, watching_gpus(plan) as busy:
                study = write_study(folder, f"halves-on-{gpus}", plan, plan.trials, plan.steps, **half)
                found[study.stem] = Sweep(study, folder, address).end() | {"gpus_busy": busy()}

        def both() -> None:
            with cluster(plan, 2) as address:
                settings = one | {"workers": 2, "checkpoint_seconds": 0, "concurrent": 1}
                study = write_study(folder, "both-with-a-kill", plan, 2, plan.steps // 2, **settings)
                sweep = Sweep(study, folder, address)
                killed = kill_a_worker(sweep, 5)
                ended, once = sweep.end(), steps_once(sweep.folder, plan.steps // 2)
                found[study.stem] = ended | {"killed_at_step": killed, "steps_once": once}

        def mixture() -> None:
            with cluster(plan, 2) as address, watching_gpus(plan) as busy:
                some = write_study(folder, "mixture-halves", plan, 4, plan.steps, **half, concurrent=2)
                whole = write_study(folder, "mixture-whole", plan, 2, plan.steps, **one, concurrent=1)
                sweeps = [Sweep(some, folder, address), Sweep(whole, folder, address)]
                for study, sweep in zip((some, whole), sweeps, strict=True):
                    found[study.stem] = sweep.end()
                found["mixture-gpus_busy"] = busy()

        for part in (lambda: halves(1), lambda: halves(2), both, mixture):
            known = set(found)
            try:
                part()
            except Exception as error:  # the others are run all the same
                found.setdefault("errors", []).append(repr(error)[-2000:])
            print(
                json.dumps({name: found[name] for name in found if name not in known or name == "errors"}), flush=True
            )
    return found


def judge_studies(found: dict[str, Any]) -> dict[str, Any]:
    """Whether each study ended as asked, and the throughput of two GPUs to one."""
    ended = [value for value in found.values() if isinstance(value, dict)]
    if "errors" in found:
        return {"throughput": 0.0, "none_failed": False}
    return {
        "throughput": found["halves-on-2"]["trials_per_hour"] / found["halves-on-1"]["trials_per_hour"],
        "at_once_as_asked": (found["halves-on-1"]["at_once"], found["halves-on-2"]["at_once"]) == (2, 4)
        and found["mixture-halves"]["at_once"] == 2
        and found["mixture-whole"]["at_once"] == 1,
        "all_complete": all(set(item["states"]) == {"COMPLETE"} and item["exit_code"] == 0 for item in ended),
        "killed_run_takes_each_step_once": found["both-with-a-kill"]["steps_once"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small models on the CPU, with gloo; writes no result")
    parser.add_argument("--part", choices=["training", "studies"], help="only one of the two")
    asked = parser.parse_args()
    plan = SMALL if asked.tiny else LARGE
    if plan.gpus and torch.cuda.device_count() < 2:
        raise SystemExit(f"there are {torch.cuda.device_count()} GPUs; give --tiny to see whether it works")
    figures: dict[str, Any] = {}
    if asked.part and FILE.is_file():
        figures = json.loads(FILE.read_text())["figures"]  # the other part's stay
    if asked.part != "studies":
        with cluster(plan, 2):
            figures["training"] = training(plan)
        figures["two to one in training"] = judge_training(figures["training"])
        write(figures, plan)
    if asked.part != "training":
        figures["studies"] = studies(plan)
        figures["two to one in studies"] = judge_studies(figures["studies"])
        write(figures, plan)


def write(figures: dict[str, Any], plan: Plan) -> None:
    """What was found so far."""
    told, studied = figures.get("two to one in training", {}), figures.get("two to one in studies", {})
    met = (
        len(told) == 2
        and bool(studied)
        and max(item["speed"]["pretrain"] for item in told.values()) >= 1.9
        and max(item["speed"]["finetune"] for item in told.values()) >= 1.8
        and all(max(item["loss_difference"].values()) <= 2**-7 for item in told.values())
        and "error" not in figures["training"]["two GPUs, fsdp, stage 2 in full"]
        and studied["throughput"] >= 1.9
        and all(value for name, value in studied.items() if name != "throughput")
    )
    write_result(
        FILE.stem,
        figures=figures,
        ratio=max((item["speed"]["pretrain"] for item in told.values()), default=None),
        asked="samples/s 1.9 times one GPU's in stage 1 and 1.8 in stage 2; the first 20 losses equal within the "
        "rounding of bfloat16 (2^-7); studies of halves, of both GPUs with a worker killed, and mixed all complete, "
        "placed as asked, with 1.9 times one GPU's trials an hour",
        met=met,
        write=bool(plan.gpus),
    )


if __name__ == "__main__":
    main()
