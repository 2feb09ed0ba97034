"""Checkpoints shaped as published families are, through `causal` and `mistral`: each against transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from chiasm_llms.byte_tokenizer import byte_tokenizer
from chiasm_llms.causal import CausalLM
from chiasm_llms.mistral import MistralLM
from chiasm_llms.settings import CausalConfig, MistralConfig


def rope(base: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": base}


@dataclass(frozen=True)
class Shape:
    """What sets a published model apart from its neighbours."""

    family: str
    chat: bool
    tied: bool
    settings: dict[str, Any] = field(default_factory=dict)


SHAPES = {
    "llama-2": Shape("llama", False, False, {"num_key_value_heads": 4, "rope_parameters": rope(1e4)}),
    "llama-3-instruct": Shape("llama", True, False, {"rope_parameters": rope(5e5)}),
    "vicuna": Shape("llama", False, False, {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "smollm2": Shape("llama", True, True, {"num_attention_heads": 8, "num_key_value_heads": 2}),
    "qwen2.5-0.5b": Shape("qwen2", True, True, {"vocab_size": 300, "rope_parameters": rope(1e6)}),
    "qwen2.5-7b": Shape("qwen2", True, False, {"vocab_size": 320, "rope_parameters": rope(1e6)}),
    "qwen3": Shape("qwen3", True, True, {"vocab_size": 300, "head_dim": 16}),
    "mistral-v0.1": Shape("mistral", False, False, {"sliding_window": 5, "rope_parameters": rope(1e4)}),
    "mistral-instruct-v0.2": Shape("mistral", True, False, {"sliding_window": None, "rope_parameters": rope(1e6)}),
    "mistral-v0.3": Shape("mistral", False, False, {"sliding_window": None, "vocab_size": 32768}),
}


@pytest.fixture(scope="module", params=SHAPES)
def case(request: pytest.FixtureRequest, zoo: Any) -> tuple[Shape, str]:
    """A shape and the folder of a checkpoint that has it."""
    shape = SHAPES[request.param]
    model = zoo.random_model(shape.family, tie_word_embeddings=shape.tied, **shape.settings)
    folder = zoo.save(zoo.root / f"shape-{request.param}", model, tokenizer=False)
    tokenizer = byte_tokenizer()
    if not shape.chat:
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return shape, folder


def build(shape: Shape, folder: str) -> CausalLM:
    if shape.family == "mistral":
        return MistralLM.build(MistralConfig(pretrained=folder))
    return CausalLM.build(CausalConfig(pretrained=folder))


def test_geometry_embeddings_and_template(case: tuple[Shape, str]) -> None:
    shape, folder = case
    llm = build(shape, folder)
    assert CausalLM.spec(CausalConfig(pretrained=folder)) == llm.geometry
    assert llm.geometry.vocabulary == shape.settings.get("vocab_size", 259)
    table, head = llm.model.get_input_embeddings().weight, llm.model.get_output_embeddings().weight
    assert (table is head) == shape.tied
    stored = sum(value.numel() for value in llm.state_dict().values())
    assert llm.geometry.parameters == stored - shape.tied * table.numel()
    heads = shape.settings.get("num_attention_heads", 4)
    assert llm.geometry.attention_width == heads * shape.settings.get("head_dim", 32 // heads)
    assert llm.geometry.chat_template == shape.chat
    messages: Any = [{"role": "user", "content": "Why?"}]
    if shape.chat:
        assert llm.render_chat(messages, generate=True) == "<s>user\nWhy?</s>\n<s>assistant\n"
    else:
        with pytest.raises(ValueError, match="no chat template; set tokens.turns"):
            llm.render_chat(messages, generate=True)


@torch.no_grad()
def test_logits_padding_and_cached_generation(case: tuple[Shape, str], zoo: Any) -> None:
    shape, folder = case
    llm, model = build(shape, folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    for side in ("left", "right"):
        ids_BT, mask_BT = zoo.padded(side)
        logits_BTV = llm.logits(llm(llm.embed(ids_BT), mask_BT))
        for row, found_TV, real_T in zip(zoo.prompts(), logits_BTV, mask_BT, strict=True):
            wanted_TV = model(input_ids=torch.tensor([row])).logits[0]
            torch.testing.assert_close(found_TV[real_T], wanted_TV, rtol=0, atol=2e-5)
    ids_BT, mask_BT = zoo.padded("left")
    for row, answer in zip(zoo.prompts(), llm.generate(llm.embed(ids_BT), mask_BT, max_new_tokens=6), strict=True):
        ids = list(row)
        while len(ids) < len(row) + 6:  # greedy, by whole passes
            following = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if following == llm.eos_id:
                break
            ids.append(following)
        assert answer == ids[len(row) :]


@torch.no_grad()
@pytest.mark.parametrize("window", [5, None])
def test_the_window_of_mistral(window: int | None, tmp_path: Path, zoo: Any) -> None:
    """v0.1 attends 4096 positions back, each block anew; v0.2 and later to the start."""
    folder = zoo.save(tmp_path / "model", zoo.random_model("mistral", sliding_window=window))
    llm = MistralLM.build(MistralConfig(pretrained=folder))
    assert llm.model.config.sliding_window == window
    ids_BT = torch.tensor([[65, *range(97, 117)], [66, *range(97, 117)]])
    hidden_BTE = llm(llm.embed(ids_BT))
    differs = ((hidden_BTE[0] - hidden_BTE[1]).abs().amax(-1) > 1e-6).tolist()
    # two blocks reach back twice 4 positions beside the own one
    assert differs == ([True] * 9 + [False] * 12 if window else [True] * 21)
