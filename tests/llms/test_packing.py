"""Packed rows: each document as it is alone, and blind to the others."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from chiasm.batch import collate
from chiasm.config import TokensConfig
from chiasm.documents import Documents
from chiasm.prompt import IGNORE, Position, Prompt, PromptBuilder
from chiasm.sample import Sample, Turn
from chiasm.vlm import VLM
from chiasm_adapters.mlp import Mlp
from chiasm_adapters.single import Single
from chiasm_encoders.clip import ClipEncoder
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


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_without_a_mask_have_the_states_that_transformers_gives_them(zoo, family):
    llm = load(zoo, family)
    assert llm._unmasked
    rows = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours = llm.logits(llm(llm.embed(rows)))
        llm.model.set_attn_implementation("sdpa")
        theirs = llm.model(input_ids=rows, use_cache=False).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_rows_longer_than_a_window_see_no_further(zoo):
    llm = load(zoo, "mistral")
    query = torch.randn(2, 4, 9, 8)
    key, value = torch.randn(2, 2, 2, 9, 8)
    unused = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    layer = llm.block_modules()[0].self_attn
    output, _ = packing.document_attention(layer, query, key, value, unused, scaling=0.5, sliding_window=4)
    for place in range(9):
        seen = slice(max(0, place - 3), place + 1)
        keys, values = (x[:, :, seen].repeat_interleave(2, dim=1) for x in (key, value))
        weights = (query[:, :, place : place + 1] @ keys.mT * 0.5).softmax(-1)
        torch.testing.assert_close(output[:, place], (weights @ values)[:, :, 0], rtol=0, atol=1e-5)


class Blank:
    """A white image."""

    key = "blank"

    def load(self) -> Image.Image:
        return Image.new("RGB", (16, 16), "white")


class Asked(TorchDispatchMode):
    """Notes what a device would have to answer before the host could go on."""

    QUESTIONS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name.startswith("index") and any(
            isinstance(item, Tensor) and item.dtype == torch.bool
            for item in (args[1] if isinstance(args[1], list | tuple) else args[1:2])
        )
        if name in self.QUESTIONS or name.startswith("_unique") or masks:
            self.found.append(name)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("pad", ["right", "packed"])
def test_a_step_asks_the_device_for_nothing(zoo, pad):
    """Forward and backward pass of a whole model, with images, padding and what learns before the language model."""
    llm = load(zoo, "llama")
    encoder = ClipEncoder.tiny()
    fusion = Single(Single.Config(), [encoder.geometry.features], llm.geometry.width)
    vlm = VLM([encoder], fusion, Mlp(Mlp.Config(), fusion.out, llm.geometry.width), llm)
    vlm.set_trained(("fusion", "adapter", "tokens"))
    samples = [
        Sample("a", (Turn("what?", "this"),), (Blank(), Blank())),
        Sample("b", (Turn("who?", "that one"),)),
    ]
    builder = PromptBuilder(llm, TokensConfig(), vlm.visual_tokens, "")
    images = [image.load() for image in samples[0].images]
    batch = collate([builder.train(sample) for sample in samples], [encoder.preprocess(images)], pad=pad)
    with Asked() as asked:
        loss, _ = vlm(batch)
        loss.backward()
    assert asked.found == []
    with Asked() as asked:
        assert loss.item() > 0
    assert asked.found == ["_local_scalar_dense"]
