"""A trial on several workers through Ray Train: killed, taken up by fewer, and in the end the run of one process."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from ray.util.placement_group import placement_group_table
from safetensors.torch import load_file

from chiasm.config import RunConfig
from chiasm.plan import plan_run
from chiasm_experiments.study.executor import Pool
from chiasm_experiments.study.keys import make_key
from chiasm_experiments.study.settings import Resources
from chiasm_experiments.training.local import run_here
from chiasm_experiments.training.run import Job

WORLD = {"name": "world", "image_size": 96, "skills": ["colour"]}
SHAPE = {"width": 16, "depth": 2, "heads": 2, "kv_heads": 1, "mlp_width": 24, "context_length": 256}
CLIP = {"image_size": 28, "patch_size": 14, "width": 8, "depth": 2, "heads": 2, "mlp_width": 8}
STAGE = {"lr": 1e-3, "batch_size": 5}  # shares of 2, 2 and 1
FIRST, SECOND = 4, 24
RUN = {
    "vision": {"encoders": [{"name": "clip", "shape": CLIP}], "adapter": "mlp"},
    "llm": {"name": "causal", "shape": SHAPE, "lora": {"rank": 2}},
    "system": "",
    "stages": [
        {"name": "pretrain", "data": {**WORLD, "task": "captions", "size": 12}, "train": ["adapter", "tokens"]}
        | {**STAGE, "steps": FIRST},
        {"name": "finetune", "data": {**WORLD, "task": "dialogues", "size": 12}, "train": ["adapter", "llm"]}
        | {**STAGE, "steps": SECOND},
    ],
    "evaluate": {**WORLD, "size": 5},
}


def start(folder: Path, workers: int) -> Pool:
    resources = Resources.model_validate(
        {"workers": workers, "cpus_per_worker": 0.5, "strategy": "fsdp", "checkpoint_seconds": 0}
        | {"loggers": [], "cache": "off"}
    )
    pool = Pool(resources, lambda line: None, "several")
    run = RunConfig.model_validate(RUN)
    labels = {"trial": "t", "study": "several", "cell": {}}
    pool.submit(Job(run.model_dump(mode="json"), str(folder), labels, pool.execution), make_key(run, plan_run(run)))
    return pool


def end(pool: Pool):
    """How its trial ended, with nothing of Ray Train left behind."""
    events = []
    until = time.monotonic() + 150
    while not events:
        assert time.monotonic() < until, pool.progress()
        events = pool.events(1.0)
    # before the pool is closed, which removes groups itself
    assert {group["state"] for group in placement_group_table().values()} == {"REMOVED"}
    pool.close()
    (event,) = events
    return event


def steps(folder: Path) -> list[dict]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def kill_a_worker_in_the_second_stage(pool: Pool, folder: Path) -> int:
    """The step after which it died."""
    until = time.monotonic() + 150
    while not (lines := steps(folder)) or lines[-1]["stage"] != "finetune":
        assert time.monotonic() < until, pool.progress()
        events = pool.events(0.05)
        assert not events, events
    found = [p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::RayTrainWorker")]
    assert len(found) == 3
    os.kill(found[-1].pid, signal.SIGKILL)
    return lines[-1]["step"]


@pytest.mark.slow
def test_a_killed_worker_of_three_two_that_go_on_and_the_run_of_one(cluster, tmp_path):
    """In shards, with LoRA, in both stages: every step once, the losses and the weights of one process."""
    folder, alone = tmp_path / "t", tmp_path / "alone"
    for place in (folder, alone):
        place.mkdir()
    pool = start(folder, 3)
    assert kill_a_worker_in_the_second_stage(pool, folder) < SECOND
    lost = end(pool)
    assert lost.status == "lost"
    assert "died" in lost.error
    reached = len(steps(folder))
    assert FIRST < reached < FIRST + SECOND

    ended = end(start(folder, 2))
    assert ended.status == "complete", ended.error
    assert (ended.manifest["workers"], ended.manifest["strategy"]["name"]) == (2, "fsdp")

    labels = {"trial": "alone", "study": None, "cell": {}}
    execution = Resources.model_validate({"loggers": [], "cache": "off"}).execution
    run = RunConfig.model_validate(RUN).model_dump(mode="json")
    one = run_here(Job(run, str(alone), labels, execution), quiet=True)
    found, wanted = steps(folder), steps(alone)
    assert [(line["stage"], line["step"]) for line in found] == [(line["stage"], line["step"]) for line in wanted]
    assert len(found) == FIRST + SECOND
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in wanted], abs=1e-4)
    assert ended.manifest["scores"] == one["scores"]
    for file in ("adapter", "llm", "tokens"):
        pair = [load_file(place / "stages" / "finetune" / f"{file}.safetensors") for place in (folder, alone)]
        assert set(pair[0]) == set(pair[1])
        for name, value in pair[1].items():
            torch.testing.assert_close(pair[0][name], value, rtol=0, atol=1e-4)
