"""Hidden states at some positions: the last block's feed-forward part works there alone, and nothing else changes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from chiasm.cost import saved_bytes
from chiasm.documents import Documents
from chiasm_llms.causal import CausalLM
from chiasm_llms.last_block import offer_places

SETTINGS: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 5},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": {"pad_token_id": 0},
}
SHORT = ("llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3", "mixtral")
WHOLE = ("olmo2", "gemma3_text", "phi", "phi3", "gpt2", "gpt_neox", "opt")

B, T = 2, 12
# of both rows, and real whichever side of the second is padded by two
PLACES_S = torch.tensor([1, 5, T - 1, T + 2, T + 8])
LENGTHS = (7, 1, 12, 4)
SHAPE = {"width": 32, "depth": 4, "heads": 4, "kv_heads": 2, "mlp_width": 64, "context_length": 256}

Case = tuple[Tensor | None, Documents | None]


def make(lora: dict[str, float] | None = None) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM.build(CausalLM.Config.model_validate({"shape": SHAPE, "lora": lora}))


def load(zoo: Any, family: str) -> CausalLM:
    folder = zoo.root / f"places-{family}"
    if not folder.exists():
        zoo.save(folder, zoo.random_model(family, **SETTINGS.get(family, {})))
    return CausalLM.build(CausalLM.Config(pretrained=str(folder)))


def cases(llm: CausalLM) -> dict[str, Case]:
    """The mask and the documents of batches."""
    left_BT, right_BT = torch.ones(2, B, T, dtype=torch.bool)
    left_BT[1, :2] = right_BT[1, -2:] = False
    found: dict[str, Case] = {"whole": (None, None), "left": (left_BT, None), "right": (right_BT, None)}
    return found | ({"packed": (None, Documents.of(LENGTHS))} if llm.packs else {})


def embeds_of(llm: CausalLM, documents: Documents | None = None) -> Tensor:
    torch.manual_seed(1)
    embeds_BTE = torch.randn(B, T, llm.geometry.width)
    return (embeds_BTE if documents is None else embeds_BTE.view(1, B * T, -1)).requires_grad_()


def learn(llm: CausalLM, case: Case = (None, None), *, at: bool, places_S: Tensor = PLACES_S) -> dict[str, Tensor]:
    """The loss, and the gradients of the input and of every parameter that learns."""
    mask_BT, documents = case
    embeds = embeds_of(llm, documents)
    if at:
        hidden_SE = llm.forward_at(embeds, places_S, mask_BT, documents)
    else:
        hidden_BTE = llm(embeds, mask_BT) if documents is None else llm.forward_packed(embeds, documents)
        hidden_SE = hidden_BTE.flatten(0, 1)[places_S]
    loss = F.cross_entropy(llm.logits(hidden_SE), torch.arange(len(places_S)), reduction="sum")
    loss.backward()
    found = {name: p.grad for name, p in llm.named_parameters() if p.grad is not None}
    llm.zero_grad(set_to_none=True)
    assert embeds.grad is not None
    return {"loss": loss.detach(), "input": embeds.grad, **found}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def feed_forward(llm: CausalLM) -> int:
    """Parameters of the matrices of one block's feed-forward part."""
    return sum(p.numel() for p in llm.block_modules()[-1].mlp.parameters() if p.ndim == 2)


@torch.no_grad()
def counted(llm: CausalLM, case: Case, *, at: bool) -> int:
    mask_BT, documents = case
    embeds = embeds_of(llm, documents)
    with FlopCounterMode(display=False) as counter:
        if at:
            llm.forward_at(embeds, PLACES_S, mask_BT, documents)
        elif documents is None:
            llm(embeds, mask_BT)
        else:
            llm.forward_packed(embeds, documents)
    return counter.get_total_flops()


@pytest.mark.parametrize("family", SHORT + WHOLE)
def test_loss_and_gradients_are_those_of_the_whole(zoo, family):
    llm = load(zoo, family).requires_grad_(True)
    for case in cases(llm).values():
        wanted = learn(llm, case, at=False)
        assert_same(learn(llm, case, at=True), wanted)
    assert len(cases(llm)) == 4


@pytest.mark.parametrize("family", SHORT + WHOLE)
def test_the_feed_forward_part_is_left_out_elsewhere_where_blocks_are_built_as_llamas(zoo, family):
    llm = load(zoo, family)
    if family == "mixtral":  # each position goes through some of its matrices
        assert llm._takes_places
        return
    left_out = 2 * feed_forward(llm) * (B * T - len(PLACES_S)) if family in SHORT else 0
    for case in cases(llm).values():
        assert counted(llm, case, at=False) - counted(llm, case, at=True) == left_out


def test_blocks_that_are_not_taken_stay_as_they_were(zoo):
    model = zoo.random_model("granite", residual_multiplier=0.5)  # adds less of what its parts give
    blocks = list(model.get_decoder().layers)
    before = [(type(block), dict(vars(block))) for block in blocks]
    assert not offer_places(model, blocks, packs=False)
    assert [(type(block), dict(vars(block))) for block in blocks] == before
    assert not offer_places(model, [], packs=False)


@pytest.mark.parametrize("place", ["block", "decoder"])
def test_what_a_short_row_tells(zoo, monkeypatch, place):
    """Dropout that a block draws by itself, and a decoder that does not hand on what it is told."""
    model = zoo.random_model("llama")
    if place == "block":
        whole = LlamaDecoderLayer.forward

        def forward(self, *args, **kwargs):
            return F.dropout(whole(self, *args, **kwargs), 0.5, training=self.training)

        monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    else:
        decoder = type(model.get_decoder())
        whole = decoder.forward
        monkeypatch.setattr(decoder, "forward", lambda self, *args, places=None, **rest: whole(self, *args, **rest))
    before = torch.get_rng_state()
    assert not offer_places(model, list(model.get_decoder().layers), packs=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in model.modules())


def test_a_model_may_be_handed_on_to_another():
    llm = make()
    again = CausalLM(llm.config, llm.model, llm.tokenizer)
    assert again._takes_places
    assert torch.equal(again.forward_at(embeds_of(llm), PLACES_S), llm.forward_at(embeds_of(llm), PLACES_S))


def test_a_subclass_with_a_forward_of_its_own_is_asked_for_all_of_it():
    class Doubled(CausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return 2 * super().forward(*args, **kwargs)

    llm = Doubled.tiny()
    with torch.no_grad():
        found, wanted = llm.forward_at(embeds_of(llm), PLACES_S), llm(embeds_of(llm))
    torch.testing.assert_close(found, wanted.flatten(0, 1)[PLACES_S], rtol=0, atol=1e-5)


def test_the_model_stays_what_it_was(zoo):
    """Names in its state, the name of its blocks' class, its answers; and it can be copied and pickled."""
    llm, model = load(zoo, "llama"), zoo.random_model("llama")
    assert list(llm.model.state_dict()) == list(model.state_dict())
    assert {type(block).__name__ for block in llm.block_modules()} == {"LlamaDecoderLayer"}
    assert len({type(block) for block in llm.block_modules()}) == 1
    ids_BT, mask_BT = zoo.padded("left")
    answers = llm.generate(llm.embed(ids_BT), mask_BT, max_new_tokens=4)
    embeds = embeds_of(llm)
    for again in (copy.deepcopy(llm), pickle.loads(pickle.dumps(llm))):
        assert again.generate(llm.embed(ids_BT), mask_BT, max_new_tokens=4) == answers
        assert {type(block) for block in again.block_modules()} == {type(block) for block in llm.block_modules()}
        assert torch.equal(again.forward_at(embeds, PLACES_S), llm.forward_at(embeds, PLACES_S))
    llm.checkpoint_activations(True)
    again = copy.deepcopy(llm)
    assert torch.equal(again.forward_at(embeds, PLACES_S), llm.forward_at(embeds, PLACES_S))


@pytest.mark.parametrize("case", ["whole", "packed"])
def test_lora_learns_the_same(case):
    llm = make({"rank": 2})
    for parameter in llm.trainable().values():
        nn.init.normal_(parameter, std=0.2)
    given = cases(llm)[case]
    assert counted(llm, given, at=False) - counted(llm, given, at=True) == 2 * feed_forward(llm) * (B * T - 5)
    wanted = learn(llm, given, at=False)
    assert len(wanted) == 2 + len(llm.trainable())
    assert_same(learn(llm, given, at=True), wanted)


def test_dropout_of_a_part_draws_for_these_positions():
    """LoRA's, inside of the feed-forward part: two passes from one seed are one, and computed again they are too."""
    llm = make({"rank": 2, "dropout": 0.5}).train()
    assert llm._takes_places
    found = []
    for again in (False, False, True):
        llm.checkpoint_activations(again)
        torch.manual_seed(2)
        found.append(learn(llm, at=True))
    for one in found[1:]:
        assert all(torch.equal(one[name], value) for name, value in found[0].items())


@pytest.mark.parametrize("case", ["whole", "packed"])
def test_computed_again_in_the_backward_pass(case):
    llm = make().requires_grad_(True)
    given = cases(llm)[case]
    wanted = learn(llm, given, at=True)
    kept = saved_bytes(lambda: llm.forward_at(embeds_of(llm), PLACES_S), llm)
    # what the last feed-forward part keeps elsewhere: four products of gate, activation, up and down and more
    assert saved_bytes(lambda: llm(embeds_of(llm)), llm) - kept > 4 * (B * T - 5) * SHAPE["mlp_width"] * 4
    llm.checkpoint_activations(True)
    found = learn(llm, given, at=True)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert saved_bytes(lambda: llm.forward_at(embeds_of(llm), PLACES_S), llm) < kept / 4


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_are_two_pieces_of_code_whatever_the_number_of_positions(again):
    llm = make().requires_grad_(True)
    counts = [torch.randperm(B * T)[:count] for count in (3, 5, 9, 2, 17)]
    wanted = [learn(llm, at=False, places_S=places_S) for places_S in counts]
    torch.compiler.reset()
    counters.clear()
    llm.compile(backend="eager")
    llm.checkpoint_activations(again)
    for places_S, one in zip(counts, wanted, strict=True):
        assert_same(learn(llm, at=True, places_S=places_S), one)
    assert counters["stats"]["unique_graphs"] == 2  # of the last block, and of all others
    # torch compiles for no position and for one apart
    for count in (0, 1, 0, 1, 4):
        learn(llm, at=True, places_S=torch.arange(count))
    assert counters["stats"]["unique_graphs"] <= 4
    assert not counters["graph_break"]
    torch.compiler.reset()


@pytest.mark.parametrize("case", ["whole", "packed"])
def test_no_position_at_all(case):
    llm = make().requires_grad_(True)
    given = cases(llm)[case]
    found = learn(llm, given, at=True, places_S=PLACES_S[:0])
    assert found.keys() == learn(llm, given, at=True).keys()  # workers add all of them
    assert not any(value.any() for value in found.values())


class Asking(nn.Module):
    """The root of what is sharded."""

    def __init__(self, llm: CausalLM) -> None:
        super().__init__()
        self.llm = llm

    def forward(self, embeds: Tensor, places_S: Tensor) -> Tensor:
        return self.llm.forward_at(embeds, places_S).square().sum()


@pytest.mark.parametrize("again", [False, True])
def test_sharded_blocks_learn_the_same(again):
    llm = make().requires_grad_(True)
    embeds = embeds_of(llm)
    llm.forward_at(embeds, PLACES_S).square().sum().backward()
    wanted = {name: p.grad for name, p in llm.named_parameters() if p.grad is not None}
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        root = Asking(make().requires_grad_(True))
        mesh = init_device_mesh("cpu", (1,))
        for block in root.llm.block_modules():
            fully_shard(block, mesh=mesh)
        fully_shard(root, mesh=mesh)
        root.llm.checkpoint_activations(again)
        for places_S in (PLACES_S, PLACES_S[:0]):  # the second adds nothing
            root(embeds, places_S).backward()
        found = {name: p.grad for name, p in root.llm.named_parameters() if p.grad is not None}
        whole = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in found.items()}
        assert_same(whole, wanted)
    finally:
        torch.distributed.destroy_process_group()
