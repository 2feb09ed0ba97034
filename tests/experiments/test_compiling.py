"""What is compiled and what is packed, and that neither changes what is learned."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from chiasm.config import RunConfig
from chiasm.errors import ConfigError
from chiasm_encoders.clip import ClipEncoder
from chiasm_encoders.timm_model import TimmEncoder
from chiasm_experiments.training.compiling import ENOUGH_STEPS, compile_model, repeated_blocks
from chiasm_experiments.training.execution import Execution
from chiasm_experiments.training.local import run_here
from chiasm_experiments.training.packing import WASTE, Packing
from chiasm_experiments.training.run import Job
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


@pytest.mark.parametrize(
    ("choice", "device", "steps", "live", "parts"),
    [
        ("off", GPU, 10**6, True, []),
        ("auto", CPU, 10**6, True, []),
        ("auto", GPU, ENOUGH_STEPS - 1, True, []),
        ("auto", GPU, ENOUGH_STEPS, True, ["llm", "encoders"]),
        ("auto", GPU, ENOUGH_STEPS, False, ["llm"]),
        ("on", CPU, 1, False, ["llm"]),
    ],
)
def test_what_is_compiled(choice, device, steps, live, parts):
    model = Model()
    told = compile_model(model, choice, device, steps, live=live)
    assert told["compiled"] == parts
    assert compiled(model.llm) == (len(model.llm.block_modules()) if "llm" in parts else 0)
    depth = model.encoders[0].geometry.depth
    assert compiled(model.encoders) == (depth if "encoders" in parts else 0)


def test_packing_is_chosen_by_the_padding_that_it_saves():
    llm = CausalLM.tiny()
    auto = Packing.choose("auto", llm, GPU)
    assert auto.pad([10, 10, 10]) == "right"
    assert auto.pad([100, 100, 100, 100 - int(400 * WASTE) + 1]) == "right"
    assert auto.pad([100, 100, 100, 100 - int(400 * WASTE)]) == "packed"
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
