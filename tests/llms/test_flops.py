"""The operations that `spec` states are those that torch counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from chiasm.llm import LanguageModelSpec
from chiasm_llms.causal import CausalLM
from chiasm_llms.settings import CausalConfig

ROTARY = {"llama": 8, "mistral": 8, "qwen2": 8, "qwen3": 16, "mixtral": 8, "gpt_neox": 8}
"""Width of what is rotated: some versions of transformers take the product of positions and frequencies as one of
matrices, which torch counts and `spec` leaves out."""

SETTINGS: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_neox": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}},
}


@torch.no_grad()
@pytest.mark.parametrize("lora", [None, {"rank": 3}], ids=["plain", "lora"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "mixtral", "gpt_neox", "gpt2", "opt"])
def test_operations_are_those_that_torch_counts(family: str, lora: Any, zoo: Any) -> None:
    folder = zoo.root / f"flops-{family}"
    if not folder.exists():
        zoo.save(folder, zoo.random_model(family, **SETTINGS.get(family, {})))
    llm = CausalLM.build(CausalConfig.model_validate({"pretrained": str(folder), "lora": lora}))
    # kernels of attention are counted differently by version and device, plain products are not
    llm.model.set_attn_implementation("eager")
    if family == "mixtral":
        llm.model.set_experts_implementation("eager")
    spec = llm.geometry
    T = 12
    embeds_BTE = llm.embed(torch.arange(T).unsqueeze(0))
    with FlopCounterMode(display=False) as counter:
        hidden_BTE = llm(embeds_BTE)
    counted = counter.get_total_flops()
    # of the square that is computed, the part above the diagonal is no work of causal attention
    hidden_half = 4 * (T * (T - 1) // 2) * spec.attention_width * spec.depth
    assert counted - hidden_half - spec.flops(T) in (0, T * ROTARY.get(family, 0))
    with FlopCounterMode(display=False) as counter:
        llm.logits(hidden_BTE[:, -5:])
    assert spec.flops(T, logits=5) - spec.flops(T) == counter.get_total_flops()


def test_a_spec_that_leaves_sizes_out_is_a_tied_model() -> None:
    spec = LanguageModelSpec(8, 10, 64, depth=2, parameters=1000, chat_template=False)
    assert (spec.matrix_parameters, spec.head_parameters, spec.attention_width, spec.trainable) == (920, 80, 8, 1000)
    assert spec.matrix_bits is None
    # 3 positions see 1 + 2 + 3 positions
    assert spec.flops(3) == 2 * 920 * 3 + 4 * 6 * 8 * 2
    assert spec.flops(3, logits=2) == spec.flops(3) + 2 * 80 * 2
    assert spec.flops(0) == 0
    assert LanguageModelSpec(8, 10, 64, 2, 1000, False, trainable=0, matrix_parameters=0).matrix_parameters == 0


def test_a_7b_model_takes_two_operations_for_each_parameter() -> None:
    """At 636 positions, OmniFusion's first stage, attention is a small part and the embedding no part."""
    spec = CausalLM.spec(CausalConfig(pretrained="mistralai/Mistral-7B-v0.1"))
    assert spec.matrix_parameters + spec.head_parameters == spec.parameters - 32000 * 4096 - 65 * 4096
    assert spec.flops(636, logits=636) == pytest.approx(2 * 7.11e9 * 636, rel=0.02)
