import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers, processors
from transformers import AutoTokenizer

from chiasm.config import TokensConfig
from chiasm.errors import CheckpointError, ConfigError
from chiasm.prompt import IGNORE, PromptBuilder
from chiasm.sample import Sample, Turn
from chiasm_llms.byte_tokenizer import byte_tokenizer
from chiasm_llms.causal import CausalLM
from chiasm_llms.mistral import MistralLM
from chiasm_llms.settings import CausalConfig, MistralConfig


def build(folder: str | Path, **options: Any) -> CausalLM:
    return CausalLM.build(CausalConfig(pretrained=str(folder), **options))


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere' does not exist"):
        CausalLM.spec(CausalConfig(pretrained=str(tmp_path / "nowhere")))


def test_folder_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"no config\.json.*holds notes\.txt"):
        CausalLM.spec(CausalConfig(pretrained=str(tmp_path)))


def test_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for step in (CausalLM.spec, CausalLM.build):
        with pytest.raises(CheckpointError, match=r"'nobody/no-model'.*name its folder, or set HF_HOME"):
            step(CausalConfig(pretrained="nobody/no-model"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{not json", "configuration"),
        ('{"model_type": "no-such-type"}', "no-such-type"),
        ('{"model_type": "vit"}', "cannot make a causal language model of 'vit'|no context length"),
        ('{"model_type": "bloom"}', "'bloom' is not supported"),
        # executing a checkpoint's code is never asked for, nor waited for
        ('{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}', "configuration"),
    ],
)
def test_unsupported_architecture(tmp_path: Path, config: str, message: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=message):
        CausalLM.spec(CausalConfig(pretrained=str(tmp_path)))


def test_mistral_refuses_another_type(zoo: Any) -> None:
    for step in (MistralLM.spec, MistralLM.build):
        with pytest.raises(CheckpointError, match=r"type 'llama', wanted 'mistral'.*`causal`"):
            step(MistralConfig(pretrained=zoo.checkpoint("llama")))
    assert MistralLM.build(MistralConfig(pretrained=zoo.checkpoint("mistral"))).model.config.sliding_window == 5


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("cohere", {"logit_scale": 0.06}),
        ("gemma2", {"final_logit_softcapping": 1.0}),
        ("gemma3_text", {"final_logit_softcapping": 1.0}),
    ],
)
def test_postprocessed_logits_are_refused(tmp_path: Path, family: str, settings: dict[str, Any], zoo: Any) -> None:
    folder = zoo.save(tmp_path / family, zoo.random_model(family, **settings))
    # Gemma 2 caps attention too: some versions of transformers refuse it for that
    with pytest.raises(CheckpointError, match="post-processes the logits|scaled_dot_product_attention"):
        build(folder)


def test_missing_and_unknown_weights(tmp_path: Path, zoo: Any) -> None:
    folder = zoo.save(tmp_path / "model", zoo.random_model("llama"))
    weights = load_file(tmp_path / "model" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(
        {key: value for key, value in weights.items() if key != name},
        tmp_path / "model" / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(CheckpointError, match=f"LlamaForCausalLM: it lacks weights {name}"):
        build(folder)
    save_file(weights | {"extra": torch.zeros(1)}, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="unknown weights extra"):
        build(folder)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match="cannot read the weights"):
        build(folder)


def test_pickled_weights_are_not_read(tmp_path: Path, zoo: Any) -> None:
    folder = zoo.save(tmp_path / "model", zoo.random_model("llama"))
    weights = load_file(tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safetensors"):
        build(folder)


def test_missing_tokenizer(tmp_path: Path, zoo: Any) -> None:
    folder = zoo.save(tmp_path / "model", zoo.random_model("llama"), tokenizer=False)
    assert not CausalLM.spec(CausalConfig(pretrained=folder)).chat_template
    with pytest.raises(CheckpointError, match=r"holds no tokenizer.*`tokenizer: FOLDER"):
        build(folder)
    assert build(folder, tokenizer=zoo.checkpoint("gpt2")).geometry.chat_template


def test_tokenizer_without_an_end(tmp_path: Path, zoo: Any) -> None:
    folder = zoo.save(tmp_path / "model", zoo.random_model("llama"), tokenizer=False)
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="no end-of-sequence token"):
        build(folder)


def test_tokenizer_of_another_model(tmp_path: Path, zoo: Any) -> None:
    folder = zoo.save(tmp_path / "model", zoo.random_model("llama", vocab_size=258))
    # the padding token alone may lie outside
    assert build(folder).geometry.vocabulary == 258
    small = zoo.save(tmp_path / "small", zoo.random_model("llama", vocab_size=200))
    with pytest.raises(CheckpointError, match="ids up to 257, the model has 200"):
        build(small)
    shape = {"vocabulary": 200, "width": 32}
    with pytest.raises(ConfigError, match="needs 259"):
        CausalLM.spec(CausalConfig.model_validate({"shape": shape, "tokenizer": folder}))


def test_no_chat_template(tmp_path: Path, zoo: Any) -> None:
    folder = zoo.save(tmp_path / "model", zoo.random_model("llama"), tokenizer=False)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    llm = build(folder)
    assert not llm.geometry.chat_template
    with pytest.raises(ValueError, match="no chat template"):
        llm.render_chat([{"role": "user", "content": "?"}], generate=True)


@pytest.mark.parametrize("where", ["file", "inside", "named", "named otherwise"])
def test_chat_template_wherever_it_is_kept(tmp_path: Path, where: str, zoo: Any) -> None:
    folder = tmp_path / "model"
    zoo.save(folder, zoo.random_model("llama"))
    template = (folder / "chat_template.jinja").read_text()
    if where != "file":
        (folder / "chat_template.jinja").unlink()
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        name = "default" if where == "named" else "tools"
        settings["chat_template"] = template if where == "inside" else [{"name": name, "template": template}]
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    known = CausalLM.spec(CausalConfig(pretrained=str(folder))).chat_template
    assert known == (where != "named otherwise")
    llm = build(folder)
    if known:
        assert llm.render_chat([{"role": "user", "content": "?"}], generate=True) == "<s>user\n?</s>\n<s>assistant\n"


def test_template_that_refuses_a_role(tmp_path: Path, zoo: Any) -> None:
    folder = zoo.save(tmp_path / "model", zoo.random_model("llama"))
    refusing = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}{{ messages[0].content }}"
    )
    (tmp_path / "model" / "chat_template.jinja").write_text(refusing)
    with pytest.raises(ValueError, match=r"refuses messages of roles \['system'\]: user first"):
        build(folder).render_chat([{"role": "system", "content": "x"}], generate=True)
    builder = PromptBuilder(build(folder), TokensConfig(turns="template"), 1, "Be kind.")
    with pytest.raises(ConfigError, match=r"'one'.*user first; set `system` to '', or set tokens\.turns"):
        builder.ask(Sample("one", (Turn("?"),)), 1)


def test_template_that_writes_the_system_message_into_the_last_question(tmp_path: Path, zoo: Any) -> None:
    """As that of Mistral-7B-Instruct-v0.3 does, which drops it where an answer is last."""
    folder = zoo.save(tmp_path / "model", zoo.random_model("llama"))
    merging = (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content %}"
        "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}{% for message in rest %}"
        "{% if message.role == 'user' %}[INST]{% if loop.last and first is defined %}{{ first }}\n\n{% endif %}"
        "{{ message.content }}[/INST]{% else %}{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    (tmp_path / "model" / "chat_template.jinja").write_text(merging)
    llm = build(folder)
    tokens, dialogue = TokensConfig(turns="template"), (Turn("?", "a"), Turn("!", "b"))
    with pytest.raises(ConfigError, match=r"'one'.*the system message 0 times.*set `system` to ''"):
        PromptBuilder(llm, tokens, 1, "Be kind.").train(Sample("one", dialogue))
    prompt = PromptBuilder(llm, tokens, 1, "").train(Sample("one", dialogue))
    assert bytes(prompt.ids[1:10]) == b"[INST]?[/"
    assert [label for label in prompt.labels if label != IGNORE] == [ord("a"), llm.eos_id, ord("b"), llm.eos_id]


def test_bos_that_the_tokenizer_only_names(tmp_path: Path, zoo: Any) -> None:
    folder = zoo.save(tmp_path / "model", zoo.random_model("llama"), tokenizer=False)
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).bos_token_id == 256
    assert build(folder).bos_id is None


def test_metaspace_tokenizers_keep_their_leading_space(tmp_path: Path, zoo: Any) -> None:
    """SentencePiece writes a space before every piece, so each piece of a prompt starts as after a space."""
    folder = zoo.save(tmp_path / "model", zoo.random_model("llama"), tokenizer=False)
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.save_pretrained(folder)
    assert build(folder).tokenize("hi") == list("▁hi".encode())
