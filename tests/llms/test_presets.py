"""Published models by name: their sizes, planned and refused without a network, and Vicuna's template."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from tokenizers import pre_tokenizers

from chiasm.config import RunConfig, TokensConfig
from chiasm.errors import CheckpointError, ConfigError
from chiasm.plan import plan_run
from chiasm.prompt import PromptBuilder
from chiasm.registry import registry
from chiasm.sample import Sample, Turn
from chiasm_llms.byte_tokenizer import byte_tokenizer
from chiasm_llms.causal import CausalLM
from chiasm_llms.mistral import MistralLM
from chiasm_llms.presets import BY_SOURCE, PRESETS, Preset
from chiasm_llms.published import PublishedLM, published
from chiasm_llms.settings import CausalConfig, MistralConfig

PUBLISHED = {
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-instruct-v0.1": 7_241_732_096,
    "mistral-7b-v0.2": 7_241_732_096,
    "mistral-7b-instruct-v0.2": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-7b-instruct-v0.3": 7_248_023_552,
    "llama-2-7b": 6_738_415_616,
    "llama-2-7b-chat": 6_738_415_616,
    "vicuna-7b-v1.5": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3-8b-instruct": 8_030_261_248,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-0.5b-instruct": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-1.5b-instruct": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-7b-instruct": 7_615_616_512,
    "smollm2-135m-base": 134_515_008,
    "smollm2-135m-instruct": 134_515_008,
    "smollm2-360m-base": 361_821_120,
    "smollm2-360m-instruct": 361_821_120,
    "smollm2-1.7b-base": 1_711_376_384,
    "smollm2-1.7b-instruct": 1_711_376_384,
}
"""Parameters as the model cards and files state them."""


def by_name(name: str) -> type[PublishedLM]:
    cls = registry().load("llm", name)
    assert issubclass(cls, PublishedLM)
    return cls


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_every_preset_is_known_here() -> None:
    assert {preset.name for preset in PRESETS} == set(PUBLISHED)
    assert len(BY_SOURCE) == len(PRESETS)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_parameters_are_the_published_ones(preset: Preset, offline: None) -> None:
    cls = by_name(preset.name)
    config = cls.Config()
    assert config.pretrained == preset.source
    state = torch.get_rng_state()
    spec = cls.spec(config)
    assert torch.equal(state, torch.get_rng_state())
    assert spec.parameters == PUBLISHED[preset.name]
    assert (spec.width, spec.vocabulary, spec.depth) == (preset.width, preset.vocabulary, preset.depth)
    assert spec.context_length == preset.context
    assert spec.chat_template == (preset.chat or preset.name.startswith("vicuna"))
    assert spec.head_parameters == spec.width * spec.vocabulary
    # rotary heads, grouped keys and values, and a gated MLP, as the papers have them
    head = preset.width // preset.heads
    block = preset.width * (2 * preset.width + 2 * preset.kv_heads * head + 3 * preset.mlp_width)
    assert spec.matrix_parameters == preset.depth * block
    # a control has the geometry of what it stands beside
    control = cls.spec(cls.Config.model_validate({"pretrained": None}))
    assert dataclasses.replace(control, chat_template=spec.chat_template) == spec


@pytest.mark.parametrize(
    ("name", "version", "window", "base", "vocabulary"),
    [
        ("mistral-7b-v0.1", "base", 4096, 1e4, 32000),
        ("mistral-7b-instruct-v0.1", "instruct", 4096, 1e4, 32000),
        ("mistral-7b-v0.2", "base", None, 1e6, 32000),
        ("mistral-7b-instruct-v0.2", "instruct", None, 1e6, 32000),
        ("mistral-7b-v0.3", "base", None, 1e6, 32768),
        ("mistral-7b-instruct-v0.3", "instruct", None, 1e6, 32768),
    ],
)
def test_versions_of_mistral(name: str, version: str, window: int | None, base: float, vocabulary: int) -> None:
    config = by_name(name).preset.config()
    assert (config.sliding_window, config.vocab_size) == (window, vocabulary)
    assert config.rope_parameters["rope_theta"] == base
    assert by_name(name).preset.chat == (version == "instruct")


def test_a_published_id_is_planned_by_any_of_the_components(offline: None) -> None:
    wanted = by_name("mistral-7b-v0.3").spec(by_name("mistral-7b-v0.3").Config())
    source = "mistralai/Mistral-7B-v0.3"
    assert CausalLM.spec(CausalConfig(pretrained=source)) == wanted
    assert MistralLM.spec(MistralConfig(pretrained=source)) == wanted
    with pytest.raises(CheckpointError, match="type 'qwen2', wanted 'mistral'"):
        MistralLM.spec(MistralConfig(pretrained="Qwen/Qwen2.5-0.5B"))
    run = {
        "vision": {"encoders": [{"name": "clip", "shape": {}}], "adapter": "mlp"},
        "llm": "vicuna-7b-v1.5",
        "tokens": {"turns": "template"},
        "stages": [{"name": "s", "data": "world", "train": ["adapter", "llm"], "lr": 1e-3, "batch_size": 1}],
    }
    plan = plan_run(RunConfig.model_validate(run))
    assert plan.problems == []
    assert plan.trained["llm"] == 6_738_415_616
    base = plan_run(RunConfig.model_validate(run | {"llm": "llama-2-7b"}))
    assert ["no chat template" in problem for problem in base.problems] == [True]


@pytest.mark.parametrize("name", ["mistral-7b-v0.1", "qwen2.5-0.5b-instruct"])
def test_without_the_checkpoint_its_id_and_the_remedy_are_told(name: str, offline: None, tmp_path: Path) -> None:
    cls = by_name(name)
    with pytest.raises(CheckpointError, match=rf"'{cls.preset.source}'.*name its folder, or set HF_HOME"):
        cls.build(cls.Config())
    with pytest.raises(CheckpointError, match="gone' does not exist"):
        cls.build(cls.Config.model_validate({"pretrained": str(tmp_path / "gone")}))


# a preset of the size of the zoo's checkpoints

SMALL = Preset(
    name="small",
    source="nobody/small",
    family="llama",
    vocabulary=259,
    width=32,
    depth=2,
    heads=4,
    kv_heads=2,
    mlp_width=64,
    context=128,
    base=1e4,
    epsilon=1e-6,
    chat=True,
)


@torch.no_grad()
def test_a_folder_of_the_model_is_loaded(zoo: Any) -> None:
    folder = zoo.checkpoint("llama")
    llm = published(SMALL).build(published(SMALL).Config.model_validate({"pretrained": folder}))
    plain = CausalLM.build(CausalConfig(pretrained=folder))
    ids_BT = torch.tensor(zoo.prompts()[:1])
    assert torch.equal(llm.logits(llm(llm.embed(ids_BT))), plain.logits(plain(plain.embed(ids_BT))))
    assert llm.geometry == plain.geometry


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "mistral"}, "model_type is 'llama', wanted 'mistral'"),
        ({"vocabulary": 300}, "vocab_size is 259, wanted 300"),
        ({"depth": 3}, "num_hidden_layers is 2, wanted 3"),
        ({"kv_heads": 4}, "num_key_value_heads is 2, wanted 4"),
        ({"tied": True}, "tie_word_embeddings is False, wanted True"),
    ],
)
def test_a_folder_of_another_model_is_refused(change: dict[str, Any], message: str, zoo: Any) -> None:
    cls = published(dataclasses.replace(SMALL, **change))
    for step in (cls.spec, cls.build):
        with pytest.raises(CheckpointError, match=f"is no small: {message}; .*`causal`"):
            step(cls.Config.model_validate({"pretrained": zoo.checkpoint("llama")}))


def test_random_weights_have_the_architecture(zoo: Any) -> None:
    for family, extra in (("mistral", {"sliding_window": 7}), ("qwen2", {"tie_word_embeddings": True})):
        preset = dataclasses.replace(SMALL, family=family, window=7 if family == "mistral" else None)
        cls = published(dataclasses.replace(preset, tied=family == "qwen2"))
        llm = cls.build(cls.Config.model_validate({"pretrained": None}))
        like = zoo.random_model(family, vocab_size=259, **extra)
        shapes = {name: value.shape for name, value in llm.model.state_dict().items()}
        assert shapes == {name: value.shape for name, value in like.state_dict().items()}
        assert getattr(llm.model.config, "sliding_window", None) == getattr(like.config, "sliding_window", None)
        assert llm.geometry.parameters == sum(p.numel() for p in llm.parameters())
    cls = published(dataclasses.replace(SMALL, vocabulary=100))
    with pytest.raises(ConfigError, match="259 tokens, small has room for 100"):
        cls.spec(cls.Config.model_validate({"pretrained": None}))


# Vicuna

QUESTIONS = (Turn("What is it?", "A cat."), Turn("Why so?", "It has whiskers."))
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@pytest.fixture
def vicuna(tmp_path: Path, zoo: Any) -> CausalLM:
    """Vicuna's template on a tokenizer of SentencePiece's kind, which writes a space before every piece of text."""
    model = zoo.random_model("llama", max_position_embeddings=512)
    folder = zoo.save(tmp_path / "vicuna", model, tokenizer=False)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.save_pretrained(folder)
    template = by_name("vicuna-7b-v1.5").preset.template
    cls = published(dataclasses.replace(SMALL, chat=False, context=512, template=template))
    return cls.build(cls.Config.model_validate({"pretrained": folder}))


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_vicuna_is_prompted_as_it_was_trained(vicuna: CausalLM, system: str) -> None:
    """The ids equal those of FastChat's text, tokenised whole; the answers with their ends are supervised."""
    assert vicuna.geometry.chat_template
    builder = PromptBuilder(vicuna, TokensConfig(turns="template"), 1, system)
    whole = f"{system or SYSTEM} USER: What is it? ASSISTANT: A cat.</s>USER: Why so? ASSISTANT:"
    asked = builder.ask(Sample("s", (QUESTIONS[0], Turn("Why so?"))), reserve=1)
    assert asked.ids == vicuna.tokenizer(whole).input_ids
    trained = builder.train(Sample("s", QUESTIONS))
    wanted = vicuna.tokenizer(f"{whole} It has whiskers.</s>").input_ids
    assert trained.ids == wanted
    answers = [[*vicuna.tokenize(turn.answer or ""), vicuna.eos_id] for turn in QUESTIONS]
    assert [token for token in trained.labels if token >= 0] == answers[0] + answers[1]


def test_the_table_is_light() -> None:
    code = "import sys, chiasm_llms.presets; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
