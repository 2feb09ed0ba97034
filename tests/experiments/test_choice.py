"""Which strategy workers follow: what the settings say, else what a worker's memory holds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from chiasm.build import build_vlm
from chiasm.config import RunConfig
from chiasm.cost import SampleSize
from chiasm.errors import ConfigError
from chiasm.plan import plan_run
from chiasm_experiments.training.choice import SHARE, choose, needed_bytes
from chiasm_experiments.training.execution import Execution
from chiasm_experiments.training.workers import Workers

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CLIP = {"image_size": 28, "patch_size": 14, "width": 8, "depth": 1, "heads": 2, "mlp_width": 8}
LLAMA = {"width": 16, "depth": 1, "heads": 2, "kv_heads": 1, "mlp_width": 24, "context_length": 128}
STAGE = {"data": "world", "lr": 1e-3, "batch_size": 32}


@pytest.fixture(scope="module")
def run() -> RunConfig:
    stages = [STAGE | {"name": "a", "train": ["adapter"]}, STAGE | {"name": "b", "train": ["adapter", "llm"]}]
    vision = {"encoders": [{"name": "clip", "shape": CLIP}]}
    return RunConfig.model_validate({"vision": vision, "llm": {"name": "causal", "shape": LLAMA}, "stages": stages})


@pytest.fixture(scope="module")
def vlm(run):
    return build_vlm(run)


def chosen(strategy, run, vlm, size, device=CPU) -> tuple[str, str]:
    found, why = choose(Execution(strategy=strategy), run, vlm, Workers(0, size, device))
    return found.name, why


@pytest.mark.parametrize(
    ("strategy", "size", "name"),
    [("auto", 1, "alone"), ("fsdp", 1, "alone"), ("auto", 2, "ddp"), ("ddp", 2, "ddp"), ("fsdp", 2, "fsdp")],
)
def test_the_settings_decide_and_one_worker_needs_nobody(run, vlm, strategy, size, name):
    assert chosen(strategy, run, vlm, size)[0] == name


def test_on_a_gpu_the_memory_of_the_largest_stage_at_one_sample_decides(run, vlm, monkeypatch):
    single = [stage.model_copy(update={"micro_batch_size": 1}) for stage in run.stages]
    stages = plan_run(run.model_copy(update={"stages": tuple(single)}), SampleSize()).cost.stages
    assert needed_bytes(run) == stages["b"].gpu_bytes > stages["a"].gpu_bytes
    monkeypatch.setattr(Workers, "sum", lambda self, value: value * self.size)
    for factor, name in ((1.01, "ddp"), (0.99, "fsdp")):
        total = SimpleNamespace(total_memory=factor * needed_bytes(run) / SHARE)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, total=total: total)
        found, why = chosen("auto", run, vlm, 2, GPU)
        assert found == name
        assert "GiB" in why


def test_one_worker_with_less_memory_decides_for_all(run, vlm, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=2**40))
    monkeypatch.setattr(Workers, "sum", lambda self, value: value * (self.size - 1))
    assert chosen("auto", run, vlm, 4, GPU)[0] == "fsdp"


def test_a_language_model_without_blocks_is_not_sharded(run, make_vlm):
    assert chosen("auto", run, make_vlm(), 2)[0] == "ddp"
    with pytest.raises(ConfigError, match=r"strategy: fsdp cannot be: ToyLM names no blocks .*; choose ddp"):
        chosen("fsdp", run, make_vlm(), 2)


def test_blocks_are_those_of_the_decoder(vlm):
    (block,) = vlm.llm.block_modules()
    assert block is vlm.llm.model.model.layers[0]
