"""Quantised loading: refusals everywhere; the models themselves on the CPU, where bitsandbytes is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from chiasm.build import build_vlm, load_component
from chiasm.config import ComponentRef, RunConfig
from chiasm.errors import ConfigError
from chiasm.plan import plan_run
from chiasm_experiments.training.files import load_parts, save_parts
from chiasm_experiments.training.precision import place
from chiasm_llms import quantization
from chiasm_llms.byte_tokenizer import byte_tokenizer
from chiasm_llms.causal import CausalLM
from chiasm_llms.settings import CausalConfig

CLIP = {"image_size": 28, "patch_size": 14, "width": 16, "depth": 2, "heads": 2, "mlp_width": 16}


def settings(folder: str, quantize: str, lora: dict[str, Any] | None = None) -> CausalConfig:
    return CausalConfig.model_validate({"pretrained": folder, "quantize": quantize, "lora": lora})


def run_of(config: CausalConfig, *train: str) -> RunConfig:
    stage = {"name": "s", "data": "world", "train": train, "lr": 1e-3, "batch_size": 1}
    llm = {"name": "causal", **config.model_dump(mode="json", exclude_unset=True)}
    vision = {"encoders": [{"name": "clip", "shape": CLIP}], "adapter": "mlp"}
    return RunConfig.model_validate({"vision": vision, "llm": llm, "stages": [stage], "precision": "bfloat16"})


@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_what_is_missing_is_told_before_anything_is_read(quantize: str, tmp_path: Path, monkeypatch: Any) -> None:
    config = settings(str(tmp_path / "absent"), quantize)
    monkeypatch.setattr(quantization, "_installed", lambda: False)
    with pytest.raises(ConfigError, match=rf"'{quantize}' needs bitsandbytes.*chiasm-llms\[quantize\].*null"):
        CausalLM.build(config)
    monkeypatch.setattr(quantization, "_installed", lambda: True)
    monkeypatch.setattr(quantization, "_gpu", lambda: False)
    with pytest.raises(ConfigError, match=f"'{quantize}' needs a GPU"):
        CausalLM.build(config)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"quantize": "4bit"}, "weights of a checkpoint"),
        ({"pretrained": "a/b", "quantize": "2bit"}, "'8bit' or '4bit'"),
    ],
)
def test_wrong_settings(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CausalConfig.model_validate(given)


@pytest.mark.parametrize(("quantize", "bits"), [("8bit", 8), ("4bit", 4)])
def test_it_is_planned_without_a_gpu(quantize: str, bits: int, zoo: Any) -> None:
    folder = zoo.checkpoint("llama")
    plain = CausalLM.spec(CausalConfig(pretrained=folder))
    spec = CausalLM.spec(settings(folder, quantize))
    assert (plain.matrix_bits, spec.matrix_bits) == (None, bits)
    assert (spec.parameters, spec.trainable) == (plain.parameters, 0)
    in_full = plan_run(run_of(settings(folder, quantize), "adapter", "llm"))
    assert any("llm: a stage trains the language model, whose quantised weights cannot" in p for p in in_full.problems)
    assert plan_run(run_of(settings(folder, quantize), "adapter")).problems == []
    low = plan_run(run_of(settings(folder, quantize, {"rank": 2}), "adapter", "llm"))
    assert low.problems == []
    assert low.trained["llm"] == CausalLM.spec(settings(folder, quantize, {"rank": 2})).trainable > 0


def test_fixed_weights_are_not_trained_and_integers_not_cast(zoo: Any) -> None:
    """Stands in for a quantised model: one layer's weights are integers, as bitsandbytes holds them."""
    config = settings(zoo.checkpoint("llama"), "8bit")

    class Integers(nn.Module):
        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.scale = weight.abs().amax(1, keepdim=True) / 127
            self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.weight * self.scale).to(x.dtype).T

    def load(kind: str, ref: ComponentRef, stream: str) -> Any:
        if kind != "llm":
            return load_component(kind, ref, stream)
        model = zoo.random_model("llama")
        mlp = model.get_decoder().layers[0].mlp
        mlp.up_proj = Integers(mlp.up_proj.weight.detach())
        return CausalLM(config, model, byte_tokenizer(), frozenset())

    run = run_of(config, "adapter")
    vlm = build_vlm(run, load)
    with pytest.raises(ConfigError, match=r"quantised weights cannot learn; set llm\.lora"):
        vlm.set_trained(("adapter", "llm"))
    vlm.set_trained(run.trained)
    (count,) = (count for count in vlm.counts() if count.part == "llm")
    assert (count.trained, count.frozen) == (0, vlm.llm.geometry.parameters)
    place(vlm, run, torch.device("cpu"))
    dtypes = {name: p.dtype for name, p in vlm.llm.named_parameters()}
    assert dtypes.pop("model.model.layers.0.mlp.up_proj.weight") == torch.int8
    assert set(dtypes.values()) == {torch.bfloat16}


# with bitsandbytes

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 values of arXiv 2305.14314, appendix E."""


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(quantization, "_gpu", lambda: True)
    # for some processors it repacks the integers after the first pass, which no GPU does
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: False)
    return bnb


@pytest.fixture
def wide(zoo: Any) -> str:
    """Rows of 64, the block of NF4."""
    folder = zoo.root / "llama-64"
    if not folder.exists():
        zoo.save(folder, zoo.random_model("llama", hidden_size=64, intermediate_size=128, initializer_range=0.1))
    return str(folder)


@torch.no_grad()
def test_weights_are_those_of_the_formulas(on_the_cpu: Any, wide: str) -> None:
    plain = CausalLM.build(CausalConfig(pretrained=wide))
    name = "model.layers.1.self_attn.q_proj"
    W = plain.model.get_submodule(name).weight.bfloat16().double()
    eight = CausalLM.build(settings(wide, "8bit")).model.get_submodule(name).weight
    wanted = (127 * W / W.abs().amax(1, keepdim=True)).round()
    assert eight.dtype == torch.int8
    assert (eight.double() - wanted).abs().max() <= 1  # a half may be rounded either way
    assert (eight.double() == wanted).double().mean() > 0.99
    four = CausalLM.build(settings(wide, "4bit")).model.get_submodule(name).weight
    assert four.dtype == torch.uint8
    blocks = W.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(NF4, dtype=torch.float64)
    nearest = levels[((blocks / scale).unsqueeze(-1) - levels).abs().argmin(-1)] * scale
    found = on_the_cpu.functional.dequantize_4bit(four.data, four.quant_state).double()
    torch.testing.assert_close(found, nearest.view_as(W), rtol=0, atol=2**-8 * float(scale.max()))


@pytest.mark.filterwarnings("ignore:bitsandbytes.*autograd kernel was not registered")
@pytest.mark.parametrize(("quantize", "off"), [("8bit", 0.05), ("4bit", 0.35)])
def test_a_quantised_model_learns_by_lora(
    on_the_cpu: Any, wide: str, tmp_path: Path, quantize: str, off: float
) -> None:
    config = settings(wide, quantize, {"rank": 2})
    run = run_of(config, "adapter", "llm")
    vlm = build_vlm(run)
    place(vlm, run, torch.device("cpu"))
    vlm.set_trained(run.trained)
    learned = vlm.llm.trainable()
    integers = {name: p.clone() for name, p in vlm.llm.named_parameters() if not p.is_floating_point()}
    assert len(integers) == 14
    assert {p.dtype for p in learned.values()} == {torch.float32}
    assert sum(p.numel() for p in learned.values()) == vlm.llm.geometry.trainable

    plain = CausalLM.build(CausalConfig(pretrained=wide))
    ids_BT = torch.tensor([[256, *b"a question"]])
    wanted = plain.logits(plain(plain.embed(ids_BT)))
    found = vlm.llm.logits(vlm.llm(vlm.llm.embed(ids_BT))).float()
    assert (found - wanted).norm() < off * wanted.norm()

    optimizer = torch.optim.SGD(learned.values(), lr=0.1)
    for _ in range(2):  # B is zero at first, and A has no gradient
        embeds_BTE = vlm.llm.embed(ids_BT).detach().requires_grad_()
        vlm.llm.logits(vlm.llm(embeds_BTE)).float().square().mean().backward()
        optimizer.step()
    assert embeds_BTE.grad is not None
    assert embeds_BTE.grad.abs().sum() > 0
    assert all(p.any() for p in learned.values())
    assert {name for name, p in vlm.llm.named_parameters() if p.grad is not None} == set(learned)
    assert all(torch.equal(vlm.llm.get_parameter(name), value) for name, value in integers.items())

    save_parts(vlm, tmp_path, ["llm"])
    again = build_vlm(run)
    load_parts(again, tmp_path)
    place(again, run, torch.device("cpu"))
    prompt = (vlm.llm.embed(ids_BT), torch.ones_like(ids_BT, dtype=torch.bool))
    vlm.eval()
    again.eval()
    assert torch.equal(again.llm(prompt[0]), vlm.llm(prompt[0]))
    answers = [llm.generate(*prompt, max_new_tokens=3) for llm in (vlm.llm, again.llm)]
    assert answers[0] == answers[1]
