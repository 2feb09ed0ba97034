"""LoRA: its formula, what learns, how many, and that it leaves the interface as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

from chiasm.errors import ConfigError
from chiasm.testing import checks_of, run_check
from chiasm_llms.causal import CausalLM
from chiasm_llms.lora import add_lora
from chiasm_llms.settings import CausalConfig, Lora

SHAPE = {"width": 32, "depth": 2, "heads": 4, "kv_heads": 2, "mlp_width": 64, "context_length": 128}
LLAMA_LAYERS = {  # rows out and columns in of the linear layers of a block of SHAPE
    "q_proj": (32, 32),
    "k_proj": (16, 32),
    "v_proj": (16, 32),
    "o_proj": (32, 32),
    "gate_proj": (64, 32),
    "up_proj": (64, 32),
    "down_proj": (32, 64),
}


def build(lora: dict[str, Any] | None, **fields: Any) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM.build(CausalConfig.model_validate({"shape": SHAPE, "lora": lora} | fields))


@torch.no_grad()
def randomise(llm: CausalLM) -> None:
    """B is no longer zero."""
    for parameter in llm.trainable().values():
        parameter.normal_(std=0.2)


def matrices(llm: CausalLM, layer: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W, A and B of a layer in float64."""
    state = {name: value.double() for name, value in llm.model.state_dict().items()}
    return (
        state[f"{layer}.base_layer.weight"],
        state[f"{layer}.lora_A.default.weight"],
        state[f"{layer}.lora_B.default.weight"],
    )


@pytest.mark.parametrize(("rank", "alpha"), [(3, 7.0), (16, 32.0)])
def test_a_layer_equals_its_formula(rank: int, alpha: float) -> None:
    llm = build({"rank": rank, "alpha": alpha})
    randomise(llm)
    for layer, (rows, columns) in (("self_attn.k_proj", (16, 32)), ("mlp.down_proj", (32, 64))):
        name = f"model.layers.1.{layer}"
        W, A, B = matrices(llm, name)
        assert (tuple(A.shape), tuple(B.shape)) == ((rank, columns), (rows, rank))
        x = torch.randn(2, 5, columns)
        wanted = x.double() @ W.T + alpha / rank * (x.double() @ A.T @ B.T)
        torch.testing.assert_close(llm.model.get_submodule(name)(x).double(), wanted, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_the_model_is_one_whose_matrices_are_w_plus_ba(family: str, zoo: Any) -> None:
    """Logits, padding and generation of the adapted model against a plain one that holds the sums."""
    folder = zoo.checkpoint(family)
    plain = CausalLM.build(CausalConfig(pretrained=folder))
    llm = CausalLM.build(CausalConfig.model_validate({"pretrained": folder, "lora": {"rank": 4, "alpha": 8}}))
    ids_BT, mask_BT = zoo.padded("left")
    embeds_BTE = plain.embed(ids_BT)
    start = llm.logits(llm(embeds_BTE, mask_BT))
    assert torch.equal(start, plain.logits(plain(embeds_BTE, mask_BT)))
    randomise(llm)
    merged = plain.model.state_dict()
    adapted = [
        name.removesuffix(".base_layer.weight") for name in llm.model.state_dict() if "base_layer.weight" in name
    ]
    for layer in adapted:
        W, A, B = matrices(llm, layer)
        delta = 2 * B @ A
        merged[f"{layer}.weight"].copy_(W + (delta.T if family == "gpt2" else delta))
    wanted = plain.logits(plain(embeds_BTE, mask_BT))
    assert not torch.allclose(wanted, start, atol=0.1)
    torch.testing.assert_close(llm.logits(llm(embeds_BTE, mask_BT)), wanted, rtol=0, atol=2e-5)
    answers = [model.generate(embeds_BTE, mask_BT, max_new_tokens=5) for model in (llm, plain)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("lora", "layers"),
    [
        ({"rank": 5}, list(LLAMA_LAYERS)),
        ({"rank": 2, "targets": ["q_proj", "v_proj"]}, ["q_proj", "v_proj"]),
        ({"rank": 64, "targets": ["down_proj"]}, ["down_proj"]),
    ],
)
def test_counts_by_formula(lora: dict[str, Any], layers: list[str]) -> None:
    llm, plain = build(lora), build(None)
    added = 2 * sum(lora["rank"] * sum(LLAMA_LAYERS[layer]) for layer in layers)
    assert llm.geometry.trainable == added == sum(p.numel() for p in llm.trainable().values())
    assert llm.geometry.parameters == plain.geometry.parameters + added == sum(p.numel() for p in llm.parameters())
    assert llm.geometry.matrix_parameters == plain.geometry.matrix_parameters + added
    assert plain.geometry.trainable == plain.geometry.parameters
    assert plain.geometry.matrix_parameters == 2 * sum(a * b for a, b in LLAMA_LAYERS.values())


def test_the_base_is_the_one_without_lora() -> None:
    """Drawn from the same stream before A, so that a cell with LoRA starts from the weights of one without."""
    plain = build(None).state_dict()
    adapted = {name.replace(".base_layer", ""): value for name, value in build({}).state_dict().items()}
    assert all(torch.equal(adapted[name], value) for name, value in plain.items())
    again, other = build({}), CausalLM.build(CausalConfig.model_validate({"shape": SHAPE, "lora": {}}))
    for name, value in build({}).trainable().items():
        assert torch.equal(again.trainable()[name], value)
        assert value.any() == ("lora_A" in name)
        assert torch.equal(other.trainable()[name], value) == ("lora_B" in name)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_stays(training: bool, zoo: Any) -> None:
    model = zoo.random_model("llama").train(training)
    learned = add_lora(model, Lora(dropout=0.5))
    assert {module.training for module in model.modules()} == {training}
    assert learned == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_dropout_acts_on_the_input_of_a_in_training_alone() -> None:
    llm = build({"rank": 4, "alpha": 4, "dropout": 0.5})
    assert not any(module.training for module in llm.modules())
    randomise(llm)
    name = "model.layers.0.mlp.up_proj"
    W, A, B = matrices(llm, name)
    layer: nn.Module = llm.model.get_submodule(name)
    x = torch.randn(3, 32)
    torch.testing.assert_close(layer(x).double(), x.double() @ (W + B @ A).T, rtol=0, atol=1e-5)
    layer.train()
    torch.manual_seed(5)
    found = layer(x)
    torch.manual_seed(5)
    kept = F.dropout(x, 0.5).double()
    torch.testing.assert_close(found.double(), x.double() @ W.T + kept @ A.T @ B.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 0}, "greater than 0"),
        ({"alpha": 0}, "greater than 0"),
        ({"dropout": 1.0}, "less than 1"),
        ({"targets": []}, "targets is empty"),
        ({"targets": "some"}, "all-linear"),
        ({"r": 8}, "Extra inputs"),
    ],
)
def test_wrong_settings(lora: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CausalConfig.model_validate({"lora": lora})


@pytest.mark.parametrize("targets", [["q_proj", "query"], ["lm_head"], ["embed_tokens"]])
def test_unknown_targets_are_told_before_weights_are_made(targets: list[str]) -> None:
    config = CausalConfig.model_validate({"shape": SHAPE, "lora": {"targets": targets}})
    for step in (CausalLM.spec, CausalLM.build):
        with pytest.raises(ConfigError, match=rf"{targets[-1]}: no such linear layer in a LlamaForCausalLM.*q_proj"):
            step(config)


class Adapted(CausalLM):
    """A language model with LoRA, for the contract."""

    @classmethod
    def tiny(cls) -> Adapted:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return cls.build(CausalConfig.model_validate({"shape": SHAPE, "lora": {"rank": 2, "dropout": 0.1}}))


def test_the_contract_holds_with_lora() -> None:
    # the light check asks about the plugin module of an installed class
    results = [run_check(check, Adapted) for check in checks_of("llm") if check.__name__ != "light"]
    assert [result.message for result in results if not result.passed] == []
