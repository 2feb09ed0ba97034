"""Training on two GPUs beside one: CLIP-L/14-336, an MLP and Mistral-7B with LoRA, stage 1 and then stage 2.

The images are JPEGs on the disk. See two_gpus.py.

Shape letters: none.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

import torch
from speed import captions
from two_gpus_plan import Plan, cluster

from chiasm.build import build_vlm
from chiasm.config import RunConfig
from chiasm_experiments.data.mixture import load_mixture
from chiasm_experiments.training.compiling import compile_model
from chiasm_experiments.training.packing import Packing
from chiasm_experiments.training.run import make_feed
from chiasm_experiments.training.stage import train_stage
from chiasm_experiments.training.strategy import Alone, Replicated, Sharded
from chiasm_experiments.training.workers import Workers

STEPS = 20
WARM = 5
"""Steps of a stage that are not measured: they compile."""
GIB = 2**30
ONE, DDP, FSDP = "one GPU", "two GPUs, ddp", "two GPUs, fsdp"
WHOLE = "two GPUs, fsdp, stage 2 in full"
STRATEGIES = {ONE: "alone", DDP: "ddp", FSDP: "fsdp", WHOLE: "fsdp"}
LR = 1e-6
"""Of both stages: small, as losses are compared of random weights, which answer 2e-5 with leaps of nine nats."""


def training_run(plan: Plan, data: dict[str, Any], *, full: bool) -> RunConfig:
    """Both stages as one run."""
    first, second, whole = plan.batches
    llm = {"name": "mistral" if plan.gpus else "causal", "shape": plan.scale.llms["mistral-7b"], "tokenizer": "bytes"}
    stages = [
        {"name": "pretrain", "data": data, "train": ["adapter", "tokens"], "lr": LR, "steps": STEPS}
        | {"batch_size": first, "micro_batch_size": max(1, first // 2)},
        {"name": "finetune", "data": data, "train": ["adapter", "tokens", "llm"], "lr": LR, "steps": STEPS}
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
    torch.manual_seed(0)  # `build_vlm` seeds the CPU's numbers only
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


def training(plan: Plan, name: str) -> dict[str, Any]:
    """Speed, losses and memory of one of `STRATEGIES`, or its error: the others are measured all the same."""
    from ray.train import RunConfig as TrainRun
    from ray.train import ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    strategy, full = STRATEGIES[name], name == WHOLE
    scaling = ScalingConfig(
        num_workers=1 if strategy == "alone" else 2,
        use_gpu=bool(plan.gpus),
        resources_per_worker={"CPU": 8 if plan.gpus else 0.5} | ({"GPU": 1} if plan.gpus else {}),
    )
    started = time.monotonic()
    # a cluster of its own: workers of a run that fails may stay, with the GPUs that they hold
    with captions(plan.images) as data, cluster(plan, scaling.num_workers), tempfile.TemporaryDirectory() as folder:
        run = training_run(plan, data, full=full).model_dump(mode="json")
        trainer = TorchTrainer(
            train_on_workers,
            train_loop_config={"run": run, "strategy": strategy, "full": full, "loaders": 6 if plan.gpus else 0},
            scaling_config=scaling,
            run_config=TrainRun(name=name.replace(" ", "-").replace(",", ""), storage_path=folder),
            torch_config=TorchConfig(backend="nccl" if plan.gpus else "gloo"),
        )
        try:
            found = dict(trainer.fit().return_value)
        except Exception as error:
            found = {"error": str(error)[-2000:]}
    found["seconds_in_all"] = time.monotonic() - started
    return found


def judge_training(found: dict[str, Any]) -> dict[str, Any]:
    """Two GPUs to one: speed of each stage, memory, and the largest relative difference of a loss."""
    one, told = found.get(ONE, {"error": "not run"}), {}
    for name in (DDP, FSDP):
        two = found.get(name, {"error": "not run"})
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
