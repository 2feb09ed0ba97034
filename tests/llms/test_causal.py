from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from chiasm.llm import LanguageModel
from chiasm.registry import registry
from chiasm_llms.causal import CausalLM
from chiasm_llms.mistral import MistralLM
from chiasm_llms.settings import CausalConfig, MistralConfig


def build(folder: str) -> CausalLM:
    return CausalLM.build(CausalConfig(pretrained=folder))


def reference(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


# discovery


def test_components_by_name() -> None:
    assert registry().load("llm", "causal") is CausalLM
    assert registry().load("llm", "mistral") is MistralLM


# geometry


def test_spec_is_what_build_holds(folder: str) -> None:
    state = torch.get_rng_state()
    spec = CausalLM.spec(CausalConfig(pretrained=folder))
    assert torch.equal(state, torch.get_rng_state())
    llm = build(folder)
    assert llm.geometry == spec
    assert spec.parameters == sum(p.numel() for p in llm.parameters())
    assert spec.width == llm.embed(torch.tensor([1])).shape[-1]
    assert (spec.vocabulary, spec.context_length, spec.depth) == (llm.model.config.vocab_size, 128, 2)
    assert {p.dtype for p in llm.parameters()} == {torch.float32}


def test_tied_weights_count_once(zoo: Any) -> None:
    llm = build(zoo.checkpoint("qwen2"))
    assert llm.model.get_output_embeddings().weight is llm.model.get_input_embeddings().weight
    untied = sum(v.numel() for v in llm.state_dict().values())
    assert llm.geometry.parameters == untied - 260 * 32


def test_mistral_7b_is_planned_without_weights() -> None:
    spec = MistralLM.spec(MistralConfig())
    assert spec.parameters == 7_241_732_096
    assert (spec.width, spec.vocabulary, spec.depth, spec.context_length) == (4096, 32000, 32, 32768)


@pytest.mark.parametrize("cls", [CausalLM, MistralLM])
def test_random_weights(cls: type[CausalLM]) -> None:
    shape = {"width": 32, "depth": 1, "heads": 2, "kv_heads": 1, "mlp_width": 48, "context_length": 64}
    config = cls.Config.model_validate({"shape": shape})
    torch.manual_seed(3)
    llm = cls.build(config)
    torch.manual_seed(3)
    again = cls.build(config)
    other = cls.build(config)
    weights, same, different = (torch.nn.utils.parameters_to_vector(m.parameters()) for m in (llm, again, other))
    assert torch.equal(weights, same)
    assert not torch.equal(weights, different)
    assert llm.geometry == cls.spec(config)
    assert llm.geometry.parameters == weights.numel()


def test_random_weights_with_a_tokenizer(zoo: Any) -> None:
    config = CausalConfig.model_validate({"shape": {"width": 32, "depth": 1}, "tokenizer": zoo.checkpoint("llama")})
    assert CausalLM.build(config).geometry.vocabulary == 259


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pretrained": "some/model", "shape": {}}, "shape is for random weights"),
        ({"pretrained": "some/model", "tokenizer": "bytes"}, "'bytes' is for random weights"),
        ({"shape": {"vocabulary": 100}}, "the tokenizer 'bytes' needs 259"),
        ({"shape": {"width": 30}}, "a multiple of 8"),
        ({"shape": {"heads": 4, "kv_heads": 3}}, "shared evenly"),
        ({"shape": {"layers": 3}}, "Extra inputs"),
    ],
)
def test_wrong_configuration(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CausalConfig.model_validate(given)


def test_tiny_leaves_the_generator_alone() -> None:
    state = torch.get_rng_state()
    a, b = CausalLM.tiny(), CausalLM.tiny()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert isinstance(a, LanguageModel)


# tensors


@torch.no_grad()
def test_logits_are_those_of_transformers(folder: str, zoo: Any) -> None:
    llm, model = build(folder), reference(folder)
    for row in zoo.prompts():
        ids_BT = torch.tensor([row])
        wanted_BTV = model(input_ids=ids_BT).logits
        logits_BTV = llm.logits(llm(llm.embed(ids_BT)))
        torch.testing.assert_close(logits_BTV, wanted_BTV, atol=1e-5, rtol=1e-5)
        # any shape of positions
        torch.testing.assert_close(llm.logits(llm(llm.embed(ids_BT))[0, 2]), wanted_BTV[0, 2], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(folder: str, side: str, zoo: Any) -> None:
    llm = build(folder)
    ids_BT, mask_BT = zoo.padded(side)
    embeds_BTE = llm.embed(ids_BT)
    embeds_BTE[~mask_BT] = 7.0  # what stands at padding must not matter
    hidden_BTE = llm(embeds_BTE, mask_BT)
    counted_BTE = llm(embeds_BTE, mask_BT, (mask_BT.long().cumsum(-1) - 1).clamp(min=0))
    assert hidden_BTE.isfinite().all()
    for i, row in enumerate(zoo.prompts()):
        alone_1TE = llm(llm.embed(torch.tensor([row])))
        torch.testing.assert_close(hidden_BTE[i][mask_BT[i]], alone_1TE[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(counted_BTE[i][mask_BT[i]], alone_1TE[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_positions_are_taken_as_given(zoo: Any) -> None:
    """Positions that start again say nothing about documents: every position still sees those before it."""
    llm = build(zoo.checkpoint("gpt2"))
    ids_BT = torch.tensor([[*b"abcabc"]])
    positions_BT = torch.tensor([[0, 1, 2, 0, 1, 2]])
    hidden_BTE = llm(llm.embed(ids_BT), positions_BT=positions_BT)
    assert not torch.allclose(hidden_BTE[0, 3], hidden_BTE[0, 0], atol=1e-3)


def test_gradient_flows_to_the_embeddings_of_a_frozen_model(folder: str, zoo: Any) -> None:
    llm = build(folder).requires_grad_(False)
    ids_BT, mask_BT = zoo.padded("left")
    embeds_BTE = llm.embed(ids_BT).requires_grad_()
    llm.logits(llm(embeds_BTE, mask_BT)[:, -1]).logsumexp(-1).sum().backward()
    assert embeds_BTE.grad is not None
    assert embeds_BTE.grad.isfinite().all()
    assert embeds_BTE.grad[mask_BT].abs().sum(-1).gt(0).any()
    assert embeds_BTE.grad[~mask_BT].eq(0).all()


@torch.no_grad()
def test_dtype_follows_the_weights() -> None:
    llm = CausalLM.tiny().to(torch.bfloat16)
    embeds_BTE = llm.embed(torch.tensor([[1, 2, 3]]))
    assert embeds_BTE.dtype == torch.bfloat16
    hidden_BTE = llm(embeds_BTE, torch.tensor([[False, True, True]]))
    assert hidden_BTE.dtype == llm.logits(hidden_BTE).dtype == torch.bfloat16


# text


def test_bytes_come_back() -> None:
    llm = CausalLM.tiny()
    text = "  Hé, 世界 🙂\n\ttwo  spaces "
    assert llm.tokenize(text) == list(text.encode())
    assert llm.detokenize(llm.tokenize(text)) == text
    assert llm.tokenize("") == []
    assert llm.tokenize("a</s>b") == [97, 257, 98]
    assert llm.detokenize([256, 97, 257]) == "a"
    assert (llm.bos_id, llm.eos_id, llm.special_ids) == (256, 257, {256, 257, 258})


def test_chat_is_the_template_of_the_tokenizer(zoo: Any) -> None:
    folder = zoo.checkpoint("llama")
    llm, tokenizer = build(folder), AutoTokenizer.from_pretrained(folder)
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    for generate in (False, True):
        wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        assert llm.render_chat(messages, generate=generate) == wanted
    assert wanted == "<s>system\nBe brief.</s>\n<s>user\nWhy?</s>\n<s>assistant\n"
    assert llm.geometry.chat_template


def test_generation_keeps_from_attention_that_is_made_ready_for_each_length(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, seen = CausalLM.tiny(), []
    generate = llm.model.generate

    def spied(*args: Any, **kwargs: Any) -> Any:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return generate(*args, **kwargs)

    monkeypatch.setattr(llm.model, "generate", spied)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        llm.generate(llm.embed(torch.tensor([[1, 2, 3]])), torch.ones(1, 3, dtype=torch.bool), max_new_tokens=2)
        assert seen == [False]
        assert torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
