"""What is compiled and what is packed, and that neither changes what is learned."""

from __future__ import annotations

import json
import math

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from chiasm.build import build_vlm
from chiasm.config import RunConfig
from chiasm.errors import ConfigError
from chiasm_encoders.clip import ClipEncoder
from chiasm_encoders.timm_model import TimmEncoder
from chiasm_experiments.data.mixture import load_mixture
from chiasm_experiments.training.compiling import (
    BLOCK_SECONDS,
    choose_attention,
    compile_model,
    repeated_blocks,
    uncompiled_seconds,
)
from chiasm_experiments.training.execution import Execution
from chiasm_experiments.training.local import run_here
from chiasm_experiments.training.operations import ModelOperations
from chiasm_experiments.training.packing import WASTE, Packing
from chiasm_experiments.training.run import Job, make_feed
from chiasm_experiments.training.stage import check_stage
from chiasm_llms.causal import CausalLM

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Model(nn.Module):
    """The parts that are compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleList([ClipEncoder.tiny()])
        self.llm = CausalLM.tiny()


def compiled(module: nn.Module) -> int:
    return sum(part._compiled_call_impl is not None for part in module.modules())


def test_repeated_blocks_are_those_of_the_tower():
    clip = ClipEncoder.tiny()
    assert len(list(repeated_blocks(clip))) == clip.geometry.depth
    assert len({type(block) for block in repeated_blocks(clip)}) == 1
    assert len(list(repeated_blocks(TimmEncoder.tiny()))) >= 2


def test_blocks_of_different_shapes_are_not_compiled_one_by_one():
    """Each would be compiled anew, which took two minutes of an EfficientNet."""
    network = timm.create_model("efficientnet_lite0", pretrained=False)
    assert list(repeated_blocks(network)) == []
    alike = nn.Sequential(nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)]), nn.Linear(4, 4))
    assert list(repeated_blocks(alike)) == list(alike[0])


def test_attention_that_is_made_ready_for_each_shape_is_for_long_runs():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        for long in (False, True):
            choose_attention(GPU, long=long)
            assert torch.backends.cuda.cudnn_sdp_enabled() == long
            choose_attention(CPU, long=not long)
            assert torch.backends.cuda.cudnn_sdp_enabled() == long
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_a_run_takes_as_long_as_its_operations_or_as_the_host_needs_to_start_them(monkeypatch):
    shape = {"image_size": 28, "patch_size": 14, "width": 16, "depth": 2, "heads": 2, "mlp_width": 16}
    llm = {"width": 32, "depth": 2, "heads": 2, "kv_heads": 1, "mlp_width": 32, "context_length": 512}
    data = {"name": "world", "task": "captions", "size": 8, "image_size": 96, "skills": ["colour"]}
    stages = [
        {"name": name, "data": data, "train": ["adapter"], "lr": 1e-3, "batch_size": size, "steps": 1}
        for name, size in (("small", 4), ("large", 8))
    ]
    vision = {"encoders": [{"name": "clip", "shape": shape}], "adapter": "mlp"}
    run = RunConfig.model_validate({"vision": vision, "llm": {"name": "causal", "shape": llm}, "stages": stages})
    vlm = build_vlm(run)
    feed = make_feed(vlm, run)
    some = {stage.name: check_stage(stage, feed, load_mixture(stage.data)) for stage in run.stages}
    assert [len(examples) for examples in some.values()] == [4, 4]
    steps = {"small": 300, "large": 20}
    least = uncompiled_seconds(vlm, run, some, steps, CPU)
    assert least == pytest.approx(320 * 2 * BLOCK_SECONDS)
    # a device so slow that operations are all that counts
    monkeypatch.setattr("chiasm_experiments.training.compiling.UNKNOWN_PEAK", 1e6)
    needed = [ModelOperations(vlm, run, stage)(some[stage.name]) / 4 for stage in run.stages]
    wanted = (300 * 4 * needed[0] + 20 * 8 * needed[1]) / (0.3 * 1e6)
    assert uncompiled_seconds(vlm, run, some, steps, CPU) == pytest.approx(wanted)
    assert uncompiled_seconds(vlm, run, some, steps, CPU, workers=2) == pytest.approx(wanted / 2)
    # with kept features an image that is not known yet is encoded in one of many steps
    for examples in some.values():
        for example in examples:
            example.pixels = ()
    kept = uncompiled_seconds(vlm, run, some, steps, CPU)
    assert kept < wanted
    again = {stage.name: check_stage(stage, feed, load_mixture(stage.data)) for stage in run.stages}
    assert uncompiled_seconds(vlm, run, again, steps, CPU, live=False) == pytest.approx(kept)


@pytest.mark.parametrize(
    ("choice", "device", "seconds", "live", "parts"),
    [
        ("off", GPU, 10**6, True, []),
        ("auto", CPU, 10**6, True, []),
        ("auto", GPU, 39.0, True, []),
        ("auto", GPU, 40.0, True, ["llm", "encoders"]),
        ("auto", GPU, 40.0, False, ["llm"]),
        ("on", CPU, 0.0, False, ["llm"]),
    ],
)
def test_what_is_compiled(choice, device, seconds, live, parts):
    model = Model()
    told = compile_model(model, choice, device, live=live, seconds=seconds, enough=40.0)
    assert told["compiled"] == parts
    assert compiled(model.llm) == (len(model.llm.block_modules()) if "llm" in parts else 0)
    depth = model.encoders[0].geometry.depth
    assert compiled(model.encoders) == (depth if "encoders" in parts else 0)


def test_packing_is_chosen_by_the_padding_that_it_saves():
    llm = CausalLM.tiny()
    auto = Packing.choose("auto", llm, GPU)
    assert auto.pad([128, 128, 128]) == "right"
    least = 4 * 128 * WASTE
    assert auto.pad([128, 128, 128, 128 - math.ceil(least) + 1]) == "right"
    assert auto.pad([128, 128, 128, 128 - math.ceil(least)]) == "packed"
    assert auto.pad([65, 65, 65]) == "packed", "rows end on a multiple of 64 positions"
    assert Packing.choose("auto", llm, CPU).pad([10, 1]) == "right"
    assert Packing.choose("off", llm, GPU).pad([10, 1]) == "right"
    assert Packing.choose("on", llm, CPU).pad([10, 10]) == "packed"


def test_a_language_model_that_cannot_pack_is_padded_or_refused():
    llm = CausalLM.tiny()
    llm._packs = False
    assert Packing.choose("auto", llm, GPU).pad([10, 1]) == "right"
    with pytest.raises(ConfigError, match=r"pack=on, and CausalLM cannot keep .* set pack=auto"):
        Packing.choose("on", llm, GPU)


def test_a_packed_run_learns_what_a_padded_one_learns(tmp_path):
    world = {"name": "world", "task": "dialogues", "size": 12, "image_size": 96, "skills": ["colour", "existence"]}
    shape = {"image_size": 28, "patch_size": 14, "width": 16, "depth": 2, "heads": 2, "mlp_width": 16}
    llm = {"width": 32, "depth": 2, "heads": 2, "kv_heads": 1, "mlp_width": 32, "context_length": 512}
    stage = {"train": ["fusion", "adapter", "tokens", "llm"], "lr": 1e-3, "batch_size": 6, "micro_batch_size": 4}
    run = {
        "vision": {"encoders": [{"name": "clip", "shape": shape}], "adapter": "mlp"},
        "llm": {"name": "causal", "shape": llm},
        "system": "",
        "stages": [{"name": "one", "data": [world], **stage}],
    }
    weights, losses = {}, {}
    for pack in ("off", "on"):
        folder = tmp_path / pack
        labels = {"trial": pack, "study": None, "cell": {}}
        execution = Execution(pack=pack, cache="off")
        run_here(Job(RunConfig.model_validate(run).model_dump(mode="json"), str(folder), labels, execution), quiet=True)
        files = sorted((folder / "stages" / "one").glob("*.safetensors"))
        weights[pack] = {f"{file.name}/{name}": value for file in files for name, value in load_file(file).items()}
        losses[pack] = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert weights["on"].keys() == weights["off"].keys()
    assert losses["on"] == pytest.approx(losses["off"], abs=1e-5)
    for name, value in weights["off"].items():
        torch.testing.assert_close(weights["on"][name], value, rtol=0, atol=1e-6)
