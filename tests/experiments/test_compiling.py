"""What is compiled and what is packed, and that neither changes what is learned."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from chiasm.errors import ConfigError
from chiasm_encoders.clip import ClipEncoder
from chiasm_encoders.timm_model import TimmEncoder
from chiasm_experiments.training.compiling import ENOUGH_STEPS, compile_model, repeated_blocks
from chiasm_experiments.training.packing import WASTE, Packing
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
    assert compiled(model.llm) == (len(model.llm.blocks) if "llm" in parts else 0)
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
