from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from chiasm_llms.byte_tokenizer import byte_tokenizer
from chiasm_llms.causal import CausalLM
from chiasm_llms.settings import CausalConfig


def build(folder: str) -> CausalLM:
    return CausalLM.build(CausalConfig(pretrained=folder))


def greedy(model: Any, row: list[int], new: int, stop: set[int]) -> list[int]:
    """Greedy decoding written out, without a cache."""
    ids = list(row)
    for _ in range(new):
        following = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if following in stop:
            break
        ids.append(following)
    return ids[len(row) :]


@torch.no_grad()
def test_greedy_in_batches_as_alone(folder: str, zoo: Any) -> None:
    llm, model = build(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    ids_BT, mask_BT = zoo.padded("left")
    answers = llm.generate(llm.embed(ids_BT), mask_BT, max_new_tokens=6)
    for row, answer in zip(zoo.prompts(), answers, strict=True):
        ids_1T = torch.tensor([row])
        alone = llm.generate(llm.embed(ids_1T), torch.ones_like(ids_1T, dtype=torch.bool), max_new_tokens=6)
        own = model.generate(
            input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), do_sample=False, max_new_tokens=6
        )
        own = own[0, len(row) :].tolist()
        assert answer == alone[0] == greedy(model, row, 6, {257}) == (own[: own.index(257)] if 257 in own else own)
    assert len({tuple(answer) for answer in answers}) > 1


@torch.no_grad()
def test_ends_before_the_first_end_token(zoo: Any) -> None:
    llm = CausalLM.tiny()
    head = llm.model.get_output_embeddings()
    ids_BT, mask_BT = zoo.padded("left")
    embeds_BTE = llm.embed(ids_BT)
    free = llm.generate(embeds_BTE, mask_BT, max_new_tokens=6)
    # the end token takes over the weights of what row 0 says third
    end = free[0][2]
    head.weight[llm.eos_id] = head.weight[end] * 1.001
    stopped = llm.generate(embeds_BTE, mask_BT, max_new_tokens=6)
    for before, after in zip(free, stopped, strict=True):
        assert llm.eos_id not in after
        if end in before:
            assert after == before[: before.index(end)]
    assert len(stopped[0]) < 6


@torch.no_grad()
def test_a_turn_ends_by_another_token_than_the_text(tmp_path: Path, zoo: Any) -> None:
    """Chat models end a turn by a token of the template, say <|im_end|>, while eos_token stays the end of text."""
    folder = zoo.save(tmp_path / "model", zoo.random_model("llama", vocab_size=261), tokenizer=False)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    assert tokenizer.chat_template is not None
    tokenizer.chat_template = tokenizer.chat_template.replace("<s>", "<|im_start|>").replace("</s>", "<|im_end|>")
    tokenizer.save_pretrained(folder)
    llm = CausalLM.build(CausalConfig(pretrained=folder))
    assert (llm.eos_id, llm.special_ids) == (257, {256, 257, 258, 259, 260})
    embeds_1TE = llm.embed(torch.tensor([zoo.prompts()[0]]))
    mask_1T = torch.ones(embeds_1TE.shape[:2], dtype=torch.bool)
    free = llm.generate(embeds_1TE, mask_1T, max_new_tokens=4)[0]
    head = llm.model.get_output_embeddings()
    head.weight[260] = head.weight[free[0]] * 1.001
    assert llm.generate(embeds_1TE, mask_1T, max_new_tokens=4) == [[]]


@torch.no_grad()
def test_settings_of_the_checkpoint_do_not_leak_in(tmp_path: Path, zoo: Any, capfd: pytest.CaptureFixture) -> None:
    model = zoo.random_model("llama")
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, top_p=0.5, repetition_penalty=3.0, max_length=3, min_new_tokens=9, num_beams=2
    )
    llm = build(zoo.save(tmp_path / "sampling", model))
    plain = build(zoo.checkpoint("llama"))
    ids_BT, mask_BT = zoo.padded("left")
    capfd.readouterr()
    answers = llm.generate(llm.embed(ids_BT), mask_BT, max_new_tokens=8)
    assert capfd.readouterr().err == ""
    assert answers == plain.generate(plain.embed(ids_BT), mask_BT, max_new_tokens=8)


def test_leaves_modes_and_the_random_state_as_they_were() -> None:
    llm = CausalLM.tiny().train()
    llm.model.get_decoder().layers[0].eval()
    modes = [module.training for module in llm.modules()]
    state = torch.get_rng_state()
    embeds_BTE = llm.embed(torch.tensor([[1, 2]]))
    llm.generate(embeds_BTE, torch.ones(1, 2, dtype=torch.bool), max_new_tokens=2)
    assert [module.training for module in llm.modules()] == modes
    assert torch.equal(state, torch.get_rng_state())
    assert torch.is_grad_enabled()


def test_edges() -> None:
    llm = CausalLM.tiny()
    assert llm.generate(torch.zeros(0, 3, 32), torch.zeros(0, 3, dtype=torch.bool), max_new_tokens=2) == []
    with pytest.raises(ValueError, match="at least 1"):
        llm.generate(torch.zeros(1, 3, 32), torch.ones(1, 3, dtype=torch.bool), max_new_tokens=0)
