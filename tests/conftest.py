"""A toy model of every kind, so that the core is tested without a plugin."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from chiasm.adapter import Adapter
from chiasm.encoder import Encoder, EncoderConfig, EncoderSpec
from chiasm.features import Features, FeatureSpec, SequenceSpec, TokenSequence
from chiasm.fusion import Fusion
from chiasm.image import ImageSpec
from chiasm.llm import LanguageModel, LanguageModelConfig, LanguageModelSpec
from chiasm.vlm import VLM

BOS, EOS, TURN, END = 256, 257, 258, 259

if "PYTEST_XDIST_WORKER" in os.environ:
    # the processes share the cores, and models as small as these only wait for each other's threads
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of what a test starts


@pytest.fixture(autouse=True, scope="session")
def _own_feature_cache(tmp_path_factory):
    """No test reads or leaves features in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHIASM_CACHE", str(tmp_path_factory.mktemp("features")))
        yield


class ToyEncoder(Encoder):
    """Mean colour of each quarter of an 8 x 8 image, times a weight: tokens [B, 1, 4, 3]."""

    @classmethod
    def spec(cls, config):
        return EncoderSpec(ImageSpec(height=8, width=8), FeatureSpec(1, (2, 2), 3), depth=1, parameters=3, flops=1)

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.ones(3))

    @classmethod
    def build(cls, config):
        return cls(config)

    @classmethod
    def tiny(cls):
        return cls(EncoderConfig())

    def forward(self, pixels_B3HW: Tensor) -> Features:
        tokens_BND = nn.functional.adaptive_avg_pool2d(pixels_B3HW, 2).flatten(2).transpose(1, 2) * self.weight
        return Features(tokens_BND.unsqueeze(1), (2, 2))


class ToyFusion(Fusion):
    """The encoders' tokens one behind the other."""

    @classmethod
    def spec(cls, config, features, llm_width):
        return SequenceSpec(sum(spec.tokens for spec in features), features[0].width)

    @classmethod
    def tiny(cls):
        raise NotImplementedError

    def forward(self, features: Sequence[Features]) -> TokenSequence:
        return TokenSequence(torch.cat([item.tokens[:, 0] for item in features], dim=1))


class ToyAdapter(Adapter):
    """One matrix."""

    def __init__(self, config, sequence, llm_width) -> None:
        super().__init__(config, sequence, llm_width)
        self.matrix = nn.Linear(sequence.width, llm_width)

    @classmethod
    def spec(cls, config, sequence, llm_width):
        return SequenceSpec(sequence.tokens, llm_width, sequence.grid)

    @classmethod
    def tiny(cls):
        raise NotImplementedError

    def forward(self, sequence: TokenSequence) -> TokenSequence:
        return TokenSequence(self.matrix(sequence.tokens), sequence.grid)


class ToyLM(LanguageModel):
    """Bytes, and a running mean over the real positions so far: causal, and blind to padding."""

    context = 64

    @classmethod
    def spec(cls, config):
        return LanguageModelSpec(16, 260, cls.context, depth=1, parameters=2 * 260 * 16, chat_template=True)

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(260, 16)
        self.head = nn.Linear(16, 260, bias=False)

    @classmethod
    def build(cls, config):
        return cls(config)

    @classmethod
    def tiny(cls):
        return cls(LanguageModelConfig())

    def tokenize(self, text):
        specials = {"<turn>": TURN, "<end>": END}
        ids: list[int] = []
        while text:
            for name, token in specials.items():
                if text.startswith(name):
                    ids.append(token)
                    text = text[len(name) :]
                    break
            else:
                ids += text[0].encode()
                text = text[1:]
        return ids

    def detokenize(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    bos_id = BOS
    eos_id = EOS
    special_ids = frozenset({BOS, EOS, TURN, END})

    def render_chat(self, messages, *, generate):
        text = "".join(f"<turn>{m['role']}\n{m['content']}<end>\n" for m in messages)
        return text + ("<turn>assistant\n" if generate else "")

    def embed(self, ids):
        return self.embedding(ids)

    def forward(self, embeds_BTE, mask_BT=None, positions_BT=None):
        mask_BT1 = torch.ones(embeds_BTE.shape[:2]) if mask_BT is None else mask_BT.float()
        mask_BT1 = mask_BT1.unsqueeze(-1)
        return (embeds_BTE * mask_BT1).cumsum(1) / mask_BT1.cumsum(1).clamp(min=1)

    def logits(self, hidden):
        return self.head(hidden)

    def generate(self, embeds_BTE, mask_BT, *, max_new_tokens):
        rows: list[list[int]] = [[] for _ in embeds_BTE]
        for _ in range(max_new_tokens):
            ids = self.logits(self(embeds_BTE, mask_BT)[:, -1]).argmax(-1)
            for row, token in zip(rows, ids.tolist(), strict=True):
                row.append(token)
            embeds_BTE = torch.cat([embeds_BTE, self.embed(ids).unsqueeze(1)], dim=1)
            mask_BT = torch.cat([mask_BT, torch.ones_like(mask_BT[:, :1])], dim=1)
        return [row[: row.index(EOS)] if EOS in row else row for row in rows]


@pytest.fixture
def llm() -> ToyLM:
    torch.manual_seed(0)
    return ToyLM.tiny()


@pytest.fixture
def make_vlm():
    """Makes a toy VLM of any number of encoders."""

    def make(encoders: int = 1) -> VLM:
        torch.manual_seed(0)
        llm = ToyLM.tiny()
        parts = [ToyEncoder.tiny() for _ in range(encoders)]
        fusion = ToyFusion(ToyFusion.Config(), [part.geometry.features for part in parts], 16)
        adapter = ToyAdapter(ToyAdapter.Config(), fusion.out, 16)
        return VLM(parts, fusion, adapter, llm)

    return make
