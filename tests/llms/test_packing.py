"""Packed rows: each document as it is alone, and blind to the others."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from chiasm.batch import collate
from chiasm.documents import Documents
from chiasm.prompt import IGNORE, Position, Prompt
from chiasm_llms import packing
from chiasm_llms.causal import CausalLM

FAMILIES = ("llama", "mistral", "qwen2", "gpt_neox", "gpt2", "opt")
LENGTHS = (7, 1, 12, 4)


@pytest.fixture
def row() -> Tensor:
    return torch.randint(0, 256, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))


def load(zoo, family: str) -> CausalLM:
    return CausalLM.build(CausalLM.Config(pretrained=zoo.checkpoint(family)))


def packed(llm: CausalLM, row: Tensor) -> Tensor:
    return llm.logits(llm.forward_packed(llm.embed(row), Documents.of(LENGTHS)))


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_are_those_of_each_document_alone(zoo, family, row):
    llm = load(zoo, family)
    assert llm.packs
    with torch.no_grad():
        together = packed(llm, row)
        alone = [llm.logits(llm(llm.embed(part))) for part in row.split(LENGTHS, dim=1)]
        by_transformers = [llm.model(input_ids=part, use_cache=False).logits for part in row.split(LENGTHS, dim=1)]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=0, atol=1e-5)
    torch.testing.assert_close(together, torch.cat(by_transformers, dim=1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_changed_document_changes_no_bit_of_another(zoo, family, row):
    llm = load(zoo, family)
    changed = row.clone()
    changed[:, 8:20] = (changed[:, 8:20] + 1) % 256  # the third document
    with torch.no_grad():
        before, after = packed(llm, row), packed(llm, changed)
    assert torch.equal(before[:, :8], after[:, :8])
    assert torch.equal(before[:, 20:], after[:, 20:])
    assert not torch.equal(before[:, 8:20], after[:, 8:20])


def test_gradients_stay_within_their_document(zoo, row):
    llm = load(zoo, "llama")
    embeds = llm.embed(row).detach().requires_grad_()
    llm.forward_packed(embeds, Documents.of(LENGTHS))[:, 8:20].sum().backward()
    reached = embeds.grad.abs().sum(-1)[0] > 0
    assert reached[8:20].all()
    assert not reached[:8].any()
    assert not reached[20:].any()


def test_without_documents_the_attention_is_transformers_own(zoo, row):
    llm = load(zoo, "mistral")
    mask = torch.ones_like(row)
    mask[:, :3] = 0
    with torch.no_grad():
        ours = llm.model(input_ids=row, attention_mask=mask, use_cache=False).logits
        llm.model.set_attn_implementation("sdpa")
        theirs = llm.model(input_ids=row, attention_mask=mask, use_cache=False).logits
    assert torch.equal(ours, theirs)


def test_an_architecture_that_drops_the_documents_is_not_packed(zoo, monkeypatch):
    model = zoo.random_model("llama")
    decoder = model.get_decoder()
    whole = type(decoder).forward
    monkeypatch.setattr(
        type(decoder), "forward", lambda self, *args, documents=None, **rest: whole(self, *args, **rest)
    )
    assert not packing.offer_packing(model)
    assert model.config._attn_implementation == "sdpa"


def test_on_a_gpu_the_kernel_for_documents_is_called_with_their_bounds_and_window(monkeypatch):
    """The kernel is not here: what it would be given, answered by the formula that it stands for."""
    given = SimpleNamespace()

    def kernel(query_THd, key_TKd, value_TKd, bounds, bounds_k, longest, longest_k, *, scale, window_size, **_):
        given.__dict__.update(bounds=bounds.tolist(), longest=longest, window=window_size, scale=scale)
        return query_THd

    monkeypatch.setattr(packing, "varlen_attn", kernel)
    query = torch.randn(1, 4, 24, 8, dtype=torch.bfloat16)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    output, _ = packing.document_attention(
        torch.nn.Module(), query, query[:, :2], query[:, :2], None, scaling=0.5, documents=Documents.of(LENGTHS),
        sliding_window=5,
    )  # fmt: skip
    assert torch.equal(output, query.transpose(1, 2))
    assert given.bounds == [0, 7, 8, 20, 24]
    assert given.longest == 16
    assert given.window == (4, 0)
    assert given.scale == 0.5


def test_a_compiled_model_packs_and_generates(zoo, row):
    llm, compiled = load(zoo, "llama"), load(zoo, "llama")
    compiled.compile(backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(packed(compiled, row), packed(llm, row), rtol=0, atol=1e-6)
    prompt, mask = llm.embed(row), torch.ones_like(row, dtype=torch.bool)
    assert compiled.generate(prompt, mask, max_new_tokens=4) == llm.generate(prompt, mask, max_new_tokens=4)


def test_packed_batches_hold_what_padded_ones_hold():
    prompts = []
    for length in (3, 70, 9):
        ids = list(range(1, length + 1))
        prompts.append(Prompt("s", (), ids, [Position.TEXT] * length, [IGNORE, *ids[1:]]))
    one, padded = collate(prompts, pad="packed"), collate(prompts)
    assert one.ids_BT.shape == (1, 128)
    assert one.documents.lengths == (3, 70, 9, 46)
    assert not one.mask_BT[0, 82:].any()
    assert one.mask_BT.sum() == padded.mask_BT.sum() == 82
    assert one.targets_S.tolist() == padded.targets_S.tolist()
    assert one.supervised_S.tolist() == [0, 1, *range(3, 72), *range(73, 81)]
