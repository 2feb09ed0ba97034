"""Activation checkpointing: the same gradients to the bit for less memory, whatever the mode and the way of running."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from chiasm.cost import saved_bytes
from chiasm.documents import Documents
from chiasm.errors import ConfigError
from chiasm_llms.causal import CausalLM

SHAPE = {"width": 32, "depth": 4, "heads": 4, "kv_heads": 2, "mlp_width": 64, "context_length": 256}


def make(lora: dict[str, float] | None = None) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM.build(CausalLM.Config.model_validate({"shape": SHAPE, "lora": lora}))


def embeds_of(llm: CausalLM) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(1, 24, llm.geometry.width, requires_grad=True)


def gradients(llm: CausalLM, packed: bool = False) -> dict[str, torch.Tensor]:
    """Of the input and of every parameter that learns."""
    embeds = embeds_of(llm)
    torch.manual_seed(2)  # for dropout
    hidden = llm.forward_packed(embeds, Documents.of([10, 14])) if packed else llm(embeds)
    hidden.square().sum().backward()
    found = {name: p.grad for name, p in llm.named_parameters() if p.grad is not None}
    llm.zero_grad(set_to_none=True)
    assert embeds.grad is not None
    return {"input": embeds.grad, **found}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("learns", [False, True])
def test_gradients_are_the_same_bits_and_less_is_kept(learns, packed):
    llm = make().train(learns).requires_grad_(learns)
    names = list(llm.state_dict())
    wanted = gradients(llm, packed)
    kept = saved_bytes(lambda: llm(embeds_of(llm)), llm)
    llm.checkpoint_activations(True)
    assert same(gradients(llm, packed), wanted)
    assert len(wanted) == (1 + len(names) - 2 if learns else 1)  # embeddings and head are not used here
    assert list(llm.state_dict()) == names
    less = saved_bytes(lambda: llm(embeds_of(llm)), llm)
    # of each block its input alone, and what stands around the blocks
    assert less < kept / 4
    assert less >= SHAPE["depth"] * 24 * 32 * 4
    llm.checkpoint_activations(False)
    assert saved_bytes(lambda: llm(embeds_of(llm)), llm) == kept


def test_blocks_stay_of_one_class():
    """Compiled code would be compiled anew for each class, up to a limit behind which it runs uncompiled."""
    llm = make()
    llm.checkpoint_activations(True)
    assert len({type(block) for block in llm.block_modules()}) == 1


def test_dropout_draws_the_same_again():
    llm = make({"rank": 2, "dropout": 0.5}).train()
    wanted = gradients(llm)
    llm.checkpoint_activations(True)
    assert same(gradients(llm), wanted)
    llm.eval()
    assert not same(gradients(llm), wanted)


def test_blocks_are_computed_again_in_the_backward_pass_only():
    llm = make()
    calls = []
    for block in llm.block_modules():
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    llm.checkpoint_activations(True)
    with torch.no_grad():
        llm(embeds_of(llm))
    assert len(calls) == SHAPE["depth"]
    hidden = llm(embeds_of(llm))
    assert len(calls) == 2 * SHAPE["depth"]
    hidden.sum().backward()
    assert len(calls) == 3 * SHAPE["depth"]


# what dynamo looks at, and hides the warning of where warnings are not errors
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_are_computed_again_as_compiled():
    wanted = gradients(make())
    llm = make()
    torch.compiler.reset()
    llm.compile(backend="eager")
    llm.checkpoint_activations(True)
    found = gradients(llm)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    assert saved_bytes(lambda: llm(embeds_of(llm)), llm) < saved_bytes(lambda: make()(embeds_of(llm)), llm) / 4
    assert {type(block).__name__ for block in llm.block_modules()} == {"LlamaDecoderLayer"}
    torch.compiler.reset()


def test_sharded_blocks_are_computed_again():
    wanted = gradients(make())
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        llm = make()
        for block in llm.block_modules():
            fully_shard(block, mesh=init_device_mesh("cpu", (1,)))
        fully_shard(llm, mesh=init_device_mesh("cpu", (1,)))
        llm.checkpoint_activations(True)
        found = gradients(llm)
        assert found.keys() == wanted.keys()
        whole = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in found.items()}
        assert same(whole, wanted)
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_that_names_no_blocks_says_so():
    class Bare(CausalLM):
        def block_modules(self) -> list[nn.Module]:
            return []

    llm = Bare.tiny()
    llm.checkpoint_activations(False)
    with pytest.raises(ConfigError, match="Bare names no blocks"):
        llm.checkpoint_activations(True)
