"""Tiny checkpoints of several families, for the tests of this folder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from chiasm_llms.byte_tokenizer import byte_tokenizer

SMALL = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # weights this large give logits apart from each other, so that greedy answers are no accident of rounding
    "initializer_range": 0.2,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    # transformers reads every tokenizer of a qwen2 as a Qwen2Tokenizer, which adds a token
    "qwen2": {"tie_word_embeddings": True, "vocab_size": 260},
    "gpt_neox": {},
    "gpt2": {},
    "opt": {"word_embed_proj_dim": 16, "ffn_dim": 64, "pad_token_id": 258},
}


class Zoo:
    """Makes and keeps tiny checkpoints."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def random_model(self, family: str, **settings: Any) -> PreTrainedModel:
        config = AutoConfig.for_model(family, **(SMALL | FAMILIES.get(family, {}) | settings))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(config).eval()

    def save(self, folder: Path, model: PreTrainedModel, *, tokenizer: bool = True) -> str:
        model.save_pretrained(folder)
        if tokenizer:
            byte_tokenizer().save_pretrained(folder)
        return str(folder)

    def checkpoint(self, family: str) -> str:
        """The folder of a family's checkpoint with a tokenizer beside it, saved once."""
        folder = self.root / family
        return str(folder) if folder.exists() else self.save(folder, self.random_model(family))

    def prompts(self) -> list[list[int]]:
        return [[256, *b"a long question"], [256, *b"short"], [256, *b"of length between"[:10]]]

    def padded(self, side: str) -> tuple[Tensor, Tensor]:
        """The prompts as one batch of ids and its mask."""
        rows = self.prompts()
        longest = max(map(len, rows))
        ids_BT = torch.zeros(len(rows), longest, dtype=torch.long)
        mask_BT = torch.zeros(len(rows), longest, dtype=torch.bool)
        for i, row in enumerate(rows):
            place = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
            ids_BT[i, place] = torch.tensor(row)
            mask_BT[i, place] = True
        return ids_BT, mask_BT


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, zoo: Zoo) -> str:
    """The folder of each family's checkpoint in turn."""
    return zoo.checkpoint(request.param)
