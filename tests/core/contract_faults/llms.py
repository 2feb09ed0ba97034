"""Correct language models: a minimal one, on which the faults are built, and unusual ones that must not be rejected."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from chiasm.llm import LanguageModel, LanguageModelConfig, LanguageModelSpec
from fault_record import Recorder

EOS, START, END = 96, 97, 98
VOCABULARY, E, CONTEXT = 99, 16, 64

fault = Recorder("llm")


class RandomLMConfig(LanguageModelConfig):
    pretrained: None = None


class Letters(LanguageModel):
    """ASCII letters, a chat template, and greedy decoding; a subclass says how embeddings become hidden states."""

    Config = RandomLMConfig
    eos_id = EOS
    bos_id: int | None = None
    special_ids = frozenset({EOS, START, END})
    count = 0
    template = True

    @classmethod
    def spec(cls, config):
        return LanguageModelSpec(E, VOCABULARY, CONTEXT, depth=1, parameters=cls.count, chat_template=cls.template)

    @classmethod
    def build(cls, config):
        return cls(config)

    @classmethod
    def tiny(cls):
        return cls.build(cls.Config())

    def tokenize(self, text):
        pieces = text.replace("<start>", "\x01").replace("<end>", "\x02")
        return [{"\x01": START, "\x02": END, "\n": 95}.get(c, min(max(ord(c) - 32, 0), 94)) for c in pieces]

    def detokenize(self, ids):
        return "".join("\n" if i == 95 else chr(i + 32) for i in ids if i < 96)

    def render_chat(self, messages, *, generate):
        text = "".join(f"<start>{m['role']}\n{m['content']}<end>\n" for m in messages)
        return text + ("<start>assistant\n" if generate else "")

    def embed(self, ids):
        return self.embedding(ids)

    def logits(self, hidden):
        return self.head(hidden)

    def positions(self, mask_BT):
        return (mask_BT.long().cumsum(1) - 1).clamp(min=0)

    def pick(self, logits_BV):
        return logits_BV.argmax(-1)

    def cut(self, row):
        return row[: row.index(EOS)] if EOS in row else row

    def real(self, embeds_BTE, mask_BT):
        whole = torch.ones(embeds_BTE.shape[:2], dtype=torch.bool, device=embeds_BTE.device)
        return whole if mask_BT is None else mask_BT


@fault.correct
class GoodLM(Letters):
    """Learned positions, and one causal attention layer with a key-value cache."""

    count = 2 * VOCABULARY * E + CONTEXT * E + 3 * E * E

    def __init__(self, config) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(VOCABULARY, E)
        self.position = nn.Embedding(CONTEXT, E)
        self.qkv = nn.Linear(E, 3 * E, bias=False)
        self.head = nn.Linear(E, VOCABULARY, bias=False)

    def allowed(self, mask_BT, length):
        """Which of T keys the last `length` positions see, `[B, length, T]`."""
        size = mask_BT.shape[1]
        causal_TT = torch.ones(size, size, dtype=torch.bool, device=mask_BT.device).tril()
        return (causal_TT & mask_BT[:, None, :])[:, -length:]

    def attend(self, embeds_BTE, mask_BT, positions_BT, cache=None):
        x_BTE = embeds_BTE + self.position(positions_BT)
        q, k, v = self.qkv(x_BTE).chunk(3, dim=-1)
        if cache is not None:
            k, v = torch.cat([cache[0], k], dim=1), torch.cat([cache[1], v], dim=1)
        scores = (q @ k.transpose(1, 2) * E**-0.5).masked_fill(~self.allowed(mask_BT, q.shape[1]), -1e9)
        return x_BTE + scores.softmax(-1) @ v, (k, v)

    def forward(self, embeds_BTE, mask_BT=None, positions_BT=None):
        mask_BT = self.real(embeds_BTE, mask_BT)
        return self.attend(embeds_BTE, mask_BT, self.positions(mask_BT) if positions_BT is None else positions_BT)[0]

    @torch.no_grad()
    def generate(self, embeds_BTE, mask_BT, *, max_new_tokens):
        hidden, cache = self.attend(embeds_BTE, mask_BT, self.positions(mask_BT))
        rows = []
        for _ in range(max_new_tokens):
            ids_B = self.pick(self.logits(hidden[:, -1]))
            rows.append(ids_B)
            mask_BT = F.pad(mask_BT, (0, 1), value=True)
            hidden, cache = self.attend(self.embed(ids_B)[:, None], mask_BT, self.next(mask_BT), cache)
        return [self.cut(row) for row in torch.stack(rows, dim=1).tolist()]

    def next(self, mask_BT):
        return self.positions(mask_BT)[:, -1:]


@fault.correct
class TiedLM(GoodLM):
    """One table for the embedding and the head."""

    count = VOCABULARY * E + CONTEXT * E + 3 * E * E

    def __init__(self, config) -> None:
        super().__init__(config)
        self.head.weight = self.embedding.weight


@fault.correct
class NoTemplate(GoodLM):
    """A base model without a chat template, with a BOS that the prompt's builder writes."""

    template = False
    bos_id = START

    def render_chat(self, messages, *, generate):
        return LanguageModel.render_chat(self, messages, generate=generate)


@fault.correct
class RunningMean(Letters):
    """No position and no cache: a mean of what was so far, decoded by whole passes; logits always in float32."""

    count = 2 * VOCABULARY * E + E * E

    def __init__(self, config) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(VOCABULARY, E)
        self.matrix = nn.Linear(E, E, bias=False)
        self.head = nn.Linear(E, VOCABULARY, bias=False)

    def forward(self, embeds_BTE, mask_BT=None, positions_BT=None):
        real_BT1 = self.real(embeds_BTE, mask_BT).unsqueeze(-1).to(embeds_BTE.dtype)
        mean_BTE = (embeds_BTE * real_BT1).cumsum(1) / real_BT1.cumsum(1).clamp(min=1)
        return embeds_BTE + self.matrix(mean_BTE)

    def logits(self, hidden):
        return self.head(hidden).float()

    @torch.no_grad()
    def generate(self, embeds_BTE, mask_BT, *, max_new_tokens):
        rows = []
        for _ in range(max_new_tokens):
            ids_B = self.pick(self.logits(self(embeds_BTE, mask_BT)[:, -1]))
            rows.append(ids_B)
            embeds_BTE = torch.cat([embeds_BTE, self.embed(ids_B)[:, None]], dim=1)
            mask_BT = F.pad(mask_BT, (0, 1), value=True)
        return [self.cut(row) for row in torch.stack(rows, dim=1).tolist()]


@fault.correct
class DropoutLM(GoodLM):
    """Dropout of hidden states while it learns."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(0.1)

    def attend(self, embeds_BTE, mask_BT, positions_BT, cache=None):
        return super().attend(self.dropout(embeds_BTE), mask_BT, positions_BT, cache)

    @torch.no_grad()
    def generate(self, embeds_BTE, mask_BT, *, max_new_tokens):
        modes = [(part, part.training) for part in self.modules()]
        self.eval()
        try:
            return super().generate(embeds_BTE, mask_BT, max_new_tokens=max_new_tokens)
        finally:
            for part, mode in modes:
                part.training = mode


@fault.correct
class PackingLM(GoodLM):
    """Documents of a row one by one."""

    packs = True

    def forward_packed(self, embeds_1TE, documents):
        parts = torch.split(embeds_1TE, list(documents.lengths), dim=1)
        return torch.cat([self(part) for part in parts], dim=1)
