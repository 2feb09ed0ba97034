"""The contract kit: correct toy components pass every check, and each deliberate fault is caught by its check.

A faulty component is the correct one with one method changed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from pydantic import ConfigDict
from torch import nn
from torch.nn import functional as F

import chiasm.cli
from chiasm.adapter import Adapter
from chiasm.component import Component, Kind
from chiasm.encoder import Encoder, EncoderConfig, EncoderSpec, select_layers
from chiasm.errors import CombinationError, PluginError
from chiasm.features import Features, FeatureSpec, SequenceSpec, TokenSequence
from chiasm.fusion import Fusion
from chiasm.image import ImageSpec
from chiasm.llm import LanguageModel, LanguageModelConfig, LanguageModelSpec
from chiasm.registry import Registered, registry
from chiasm.testing import (
    AdapterContract,
    ContractError,
    EncoderContract,
    FusionContract,
    LanguageModelContract,
    checks_of,
    common,
    plugin_checks,
    run_check,
    run_checks,
)

EDGE, PATCH, WIDTH = 16, 4, 12
GRID = (EDGE // PATCH, EDGE // PATCH)


class RandomConfig(EncoderConfig):
    pretrained: None = None


class GoodEncoder(Encoder):
    """Patches through a convolution, attention with a CLS token, and two blocks."""

    Config = RandomConfig

    @classmethod
    def spec(cls, config):
        chosen = select_layers(config.layers, 2)
        block = WIDTH * WIDTH + WIDTH + 2 * WIDTH
        parameters = PATCH * PATCH * 3 * WIDTH + WIDTH + WIDTH + max(chosen) * block
        image = ImageSpec(height=EDGE, width=EDGE)
        return EncoderSpec(image, FeatureSpec(len(chosen), GRID, WIDTH), depth=2, parameters=parameters, flops=1)

    def __init__(self, config) -> None:
        super().__init__(config)
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.cls_D = nn.Parameter(torch.randn(WIDTH))
        self.layers = select_layers(config.layers, 2)
        self.blocks = nn.ModuleList(Block() for _ in range(max(self.layers)))

    @classmethod
    def build(cls, config):
        return cls(config)

    @classmethod
    def tiny(cls):
        return cls.build(cls.Config())

    def tokens(self, pixels_B3HW):
        tokens_BND = self.patches(pixels_B3HW).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_D.expand(len(tokens_BND), 1, -1), tokens_BND], dim=1)

    def hidden(self, pixels_B3HW):
        states, tokens_BTD = {}, self.tokens(pixels_B3HW)
        for index, block in enumerate(self.blocks, start=1):
            states[index] = tokens_BTD = block(tokens_BTD)
        return torch.stack([states[index] for index in self.layers], dim=1)

    def forward(self, pixels_B3HW):
        return Features(self.hidden(pixels_B3HW)[:, :, 1:], GRID)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x_BTD):
        # the mean over tokens stands for attention
        return x_BTD + self.linear(self.norm(x_BTD)) + 0.1 * x_BTD.mean(dim=1, keepdim=True)


class KeepsCls(GoodEncoder):
    """All prefix and patch tokens, on a grid that holds them."""

    def forward(self, pixels_B3HW):
        return Features(self.hidden(pixels_B3HW), (1, GRID[0] * GRID[1] + 1))


class KeepsClsOnTheGrid(GoodEncoder):
    """CLS beside the patches on the declared grid: `Features` refuses it."""

    def forward(self, pixels_B3HW):
        return Features(self.hidden(pixels_B3HW), GRID)


class DropsTheWrongToken(GoodEncoder):
    """CLS stays, the last patch goes: the count is right."""

    def forward(self, pixels_B3HW):
        return Features(self.hidden(pixels_B3HW)[:, :, :-1], GRID)


class Transposes(GoodEncoder):
    """Tokens column by column."""

    def tokens(self, pixels_B3HW):
        return super().tokens(pixels_B3HW.transpose(2, 3))


class MixesTheBatch(GoodEncoder):
    """Centres over images as well."""

    def hidden(self, pixels_B3HW):
        return super().hidden(pixels_B3HW) - super().hidden(pixels_B3HW).mean(dim=(0, 2), keepdim=True)


class DropoutInEval(GoodEncoder):
    """Functional dropout that does not ask for the mode."""

    def hidden(self, pixels_B3HW):
        return F.dropout(super().hidden(pixels_B3HW), 0.1)


class WrongWidth(GoodEncoder):
    """States twice its width."""

    @classmethod
    def spec(cls, config):
        right = super().spec(config)
        features = FeatureSpec(right.features.layers, GRID, 2 * WIDTH)
        return EncoderSpec(right.image, features, right.depth, right.parameters, right.flops)


class WrongPixels(GoodEncoder):
    """Its own preprocessing keeps the aspect."""

    def preprocess(self, images, resize="native"):
        return super().preprocess([image.resize((EDGE, EDGE)) for image in images], resize)[:, :, : EDGE // 2]


class LoadsBytes(GoodEncoder):
    """Pixels in double precision."""

    def preprocess(self, images, resize="native"):
        return super().preprocess(images, resize).double()


class IgnoresPadding(GoodEncoder):
    """Knows three of the four resize policies."""

    def preprocess(self, images, resize="native"):
        return super().preprocess(images, {"native": "native", "crop": "crop", "squash": "squash"}[resize])


class UnusedBlock(GoodEncoder):
    """Holds all blocks whatever layer is asked."""

    @classmethod
    def spec(cls, config):
        right = super().spec(config)
        everything = super().spec(RandomConfig())
        return EncoderSpec(right.image, right.features, right.depth, everything.parameters, right.flops)

    def __init__(self, config) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    @classmethod
    def tiny(cls):
        return cls.build(RandomConfig(layers=-2))


class MiscountsParameters(GoodEncoder):
    """Does not count its biases."""

    @classmethod
    def spec(cls, config):
        right = super().spec(config)
        return EncoderSpec(right.image, right.features, right.depth, right.parameters - WIDTH, right.flops)


class ForgetsToLearn(GoodEncoder):
    """Runs without a graph although it is trained."""

    @torch.no_grad()
    def forward(self, pixels_B3HW):
        return super().forward(pixels_B3HW)


class HiddenParameter(GoodEncoder):
    """A learned vector in a plain list: not saved, not moved, not frozen."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.extra = [torch.randn(WIDTH, requires_grad=True)]

    def forward(self, pixels_B3HW):
        return Features(super().forward(pixels_B3HW).tokens + self.extra[0], GRID)


class HiddenState(GoodEncoder):
    """A random constant that is in no state dict."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.register_buffer("extra", torch.randn(WIDTH), persistent=False)

    def forward(self, pixels_B3HW):
        return Features(super().forward(pixels_B3HW).tokens + self.extra, GRID)


class Unmovable(GoodEncoder):
    """A matrix that is no parameter does not follow a change of format."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.matrix = torch.eye(WIDTH)

    def hidden(self, pixels_B3HW):
        return super().hidden(pixels_B3HW) @ self.matrix


class Overflows(GoodEncoder):
    """Subtracts numbers that bfloat16 cannot tell apart."""

    def tokens(self, pixels_B3HW):
        return super().tokens(pixels_B3HW) + 4096 - 4096


class SeedsItself(GoodEncoder):
    """Every seed of a study would be one."""

    @classmethod
    def build(cls, config):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return cls(config)


class ReseedsEverybody(GoodEncoder):
    """Leaves the global generator seeded."""

    @classmethod
    def build(cls, config):
        made = cls(config)
        torch.default_generator.manual_seed(0)
        return made


class OwnGenerator(GoodEncoder):
    """Weights from the clock."""

    def __init__(self, config) -> None:
        super().__init__(config)
        generator = torch.Generator()
        generator.seed()
        with torch.no_grad():
            self.cls_D.copy_(torch.randn(WIDTH, generator=generator))


class Blind(GoodEncoder):
    """Looks at nothing."""

    def forward(self, pixels_B3HW):
        return super().forward(torch.zeros_like(pixels_B3HW))


class IgnoresLayers(GoodEncoder):
    """Always gives the last block."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.layers = (2,) * len(self.layers)
        self.blocks = nn.ModuleList(Block() for _ in range(2))


class SortsLayers(GoodEncoder):
    """Gives layers in the order of the blocks."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.layers = tuple(sorted(self.layers))


class AcceptsAnyLayer(GoodEncoder):
    """Takes a layer that does not exist for the last."""

    @classmethod
    def spec(cls, config):
        return super().spec(RandomConfig())

    def __init__(self, config) -> None:
        super().__init__(RandomConfig())


class HalfPrecision(GoodEncoder):
    """Weights in bfloat16 from the start."""

    @classmethod
    def build(cls, config):
        return cls(config).to(torch.bfloat16)


class Stateful(GoodEncoder):
    """Updates a running mean in eval mode too."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, pixels_B3HW):
        self.mean.lerp_(pixels_B3HW.mean().float(), 0.5)
        return super().forward(pixels_B3HW)


class MakesWeightsToPlan(GoodEncoder):
    """Counts parameters by making them."""

    @classmethod
    def spec(cls, config):
        nn.Linear(2, 2)
        return super().spec(config)


class LooseConfig(EncoderConfig):
    model_config = ConfigDict(frozen=False, extra="ignore")
    pretrained: None = None


class TakesAnyOption(GoodEncoder):
    """A misspelt option is ignored."""

    Config = LooseConfig


class IgnoresPretrained(GoodEncoder):
    """Random weights whatever checkpoint is asked."""

    Config = EncoderConfig


class Crashes(GoodEncoder):
    """An ordinary mistake."""

    def forward(self, pixels_B3HW):
        return self.no_such_part(pixels_B3HW)


class GoodFusion(Fusion):
    """Projects each encoder and sums; grids must be equal."""

    def __init__(self, config, features, llm_width) -> None:
        super().__init__(config, features, llm_width)
        self.projections = nn.ModuleList(nn.Linear(f.layers * f.width, llm_width) for f in features)

    @classmethod
    def spec(cls, config, features, llm_width):
        if not features or len({f.grid for f in features}) > 1:
            raise CombinationError(f"wanted equal grids of one encoder or more, given {[f.grid for f in features]}")
        return SequenceSpec(features[0].tokens, llm_width, features[0].grid)

    @classmethod
    def tiny(cls):
        return cls(cls.Config(), [FeatureSpec(1, (2, 3), 4), FeatureSpec(2, (2, 3), 5)], 6)

    def check(self, features):
        given = tuple(item.spec for item in features)
        if given != self.features or len({len(item.tokens) for item in features}) > 1:
            raise ValueError(f"built for {self.features}, given {given}")

    def forward(self, features):
        self.check(features)
        pairs = zip(self.projections, features, strict=True)
        return TokenSequence(sum(p(f.tokens.transpose(1, 2).flatten(2)) for p, f in pairs), self.out.grid)


class UsesTheFirst(GoodFusion):
    """The second encoder changes nothing."""

    def forward(self, features):
        self.check(features)
        return super().forward([features[0], *(Features(f.tokens.detach(), f.grid) for f in features[1:])])


class AssumesEqualGrids(GoodFusion):
    """Does not look at the grids before they are added."""

    @classmethod
    def spec(cls, config, features, llm_width):
        if not features:
            raise CombinationError("no encoder")
        return SequenceSpec(features[0].tokens, llm_width, features[0].grid)


class AssertsGrids(GoodFusion):
    """An assertion is no message for a user."""

    @classmethod
    def spec(cls, config, features, llm_width):
        assert len({f.grid for f in features}) == 1
        return super().spec(config, features, llm_width)


class FusionTakesAnything(GoodFusion):
    """Never looks at what it is given."""

    def check(self, features):
        pass


class GoodAdapter(Adapter):
    """Attention within an image and a matrix, with dropout."""

    def __init__(self, config, sequence, llm_width) -> None:
        super().__init__(config, sequence, llm_width)
        self.dropout = nn.Dropout(0.1)
        self.matrix = nn.Linear(sequence.width, llm_width)

    @classmethod
    def spec(cls, config, sequence, llm_width):
        return SequenceSpec(sequence.tokens, llm_width, sequence.grid)

    @classmethod
    def tiny(cls):
        return cls(cls.Config(), SequenceSpec(6, 5, (2, 3)), 7)

    def forward(self, sequence):
        if sequence.spec != self.sequence:
            raise ValueError(f"built for {self.sequence}, given {sequence.spec}")
        return TokenSequence(self.mix(sequence.tokens), sequence.grid)

    def mix(self, x_BND):
        return self.matrix(self.dropout(x_BND - x_BND.mean(dim=1, keepdim=True)))


class ViewMixes(GoodAdapter):
    """Reshapes with -1 over the batch, as released code does: a divisible count of tokens gives more images."""

    def forward(self, sequence):
        tokens = sequence.tokens.reshape(-1, self.sequence.tokens, self.sequence.width)
        return TokenSequence(self.mix(tokens), self.out.grid)


class BatchNorms(GoodAdapter):
    """Mixes images in training mode only."""

    def __init__(self, config, sequence, llm_width) -> None:
        super().__init__(config, sequence, llm_width)
        self.norm = nn.BatchNorm1d(sequence.width)

    def mix(self, x_BND):
        return super().mix(self.norm(x_BND.transpose(1, 2)).transpose(1, 2))


class PoolsAway(GoodAdapter):
    """States more tokens than it gives where their number is odd."""

    @classmethod
    def spec(cls, config, sequence, llm_width):
        return SequenceSpec((sequence.tokens + 1) // 2, llm_width)

    def forward(self, sequence):
        super().forward(sequence)
        pairs = sequence.tokens[:, : sequence.tokens.shape[1] // 2 * 2].unflatten(1, (-1, 2)).mean(dim=2)
        return TokenSequence(self.mix(pairs))


class Detaches(GoodAdapter):
    """What comes before it could not be trained."""

    def mix(self, x_BND):
        return super().mix(x_BND.detach())


class UnusedMatrix(GoodAdapter):
    """Holds a matrix that nothing uses."""

    def __init__(self, config, sequence, llm_width) -> None:
        super().__init__(config, sequence, llm_width)
        self.unused = nn.Linear(2, 2)


class NamesADevice(GoodAdapter):
    """Cannot be counted without being made."""

    def __init__(self, config, sequence, llm_width) -> None:
        super().__init__(config, sequence, llm_width)
        self.matrix = nn.Linear(sequence.width, llm_width, device="cpu")


class FixesTheWidth(GoodAdapter):
    """Gives its own width whatever the language model has."""

    @classmethod
    def spec(cls, config, sequence, llm_width):
        return SequenceSpec(sequence.tokens, 7, sequence.grid)


class Float64(GoodAdapter):
    """Computes and returns in double precision."""

    def mix(self, x_BND):
        return super().mix(x_BND).double()


EOS, START, END = 96, 97, 98
VOCABULARY, E = 99, 16


class RandomLMConfig(LanguageModelConfig):
    pretrained: None = None


class GoodLM(LanguageModel):
    """ASCII letters, learned positions, and one causal attention layer with a key-value cache."""

    Config = RandomLMConfig
    eos_id = EOS
    bos_id = None
    special_ids = frozenset({EOS, START, END})

    @classmethod
    def spec(cls, config):
        parameters = 2 * VOCABULARY * E + 64 * E + 3 * E * E
        return LanguageModelSpec(E, VOCABULARY, 64, depth=1, parameters=parameters, chat_template=True)

    def __init__(self, config) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(VOCABULARY, E)
        self.position = nn.Embedding(64, E)
        self.qkv = nn.Linear(E, 3 * E, bias=False)
        self.head = nn.Linear(E, VOCABULARY, bias=False)

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

    def allowed(self, mask_BT, length):
        """Which of T keys the last `length` positions see, `[B, length, T]`."""
        causal_TT = torch.ones(mask_BT.shape[1], mask_BT.shape[1], dtype=torch.bool).tril()
        return (causal_TT & mask_BT[:, None, :])[:, -length:]

    def count(self, mask_BT):
        return (mask_BT.long().cumsum(1) - 1).clamp(min=0)

    def attend(self, embeds_BTE, mask_BT, positions_BT, cache=None):
        x_BTE = embeds_BTE + self.position(positions_BT)
        q, k, v = self.qkv(x_BTE).chunk(3, dim=-1)
        if cache is not None:
            k, v = torch.cat([cache[0], k], dim=1), torch.cat([cache[1], v], dim=1)
        scores = (q @ k.transpose(1, 2) * E**-0.5).masked_fill(~self.allowed(mask_BT, q.shape[1]), -1e9)
        return x_BTE + scores.softmax(-1) @ v, (k, v)

    def forward(self, embeds_BTE, mask_BT=None, positions_BT=None):
        mask_BT = torch.ones(embeds_BTE.shape[:2], dtype=torch.bool) if mask_BT is None else mask_BT
        return self.attend(embeds_BTE, mask_BT, self.count(mask_BT) if positions_BT is None else positions_BT)[0]

    def pick(self, logits_BV):
        return logits_BV.argmax(-1)

    def generate(self, embeds_BTE, mask_BT, *, max_new_tokens):
        hidden, cache = self.attend(embeds_BTE, mask_BT, self.count(mask_BT))
        rows = []
        for _ in range(max_new_tokens):
            ids_B = self.pick(self.logits(hidden[:, -1]))
            rows.append(ids_B)
            mask_BT = F.pad(mask_BT, (0, 1), value=True)
            positions = self.count(mask_BT)[:, -1:]
            hidden, cache = self.attend(self.embed(ids_B)[:, None], mask_BT, positions, cache)
        return [self.cut(row) for row in torch.stack(rows, dim=1).tolist()]

    def cut(self, row):
        return row[: row.index(EOS)] if EOS in row else row


class NotCausal(GoodLM):
    """Every position sees every other."""

    def allowed(self, mask_BT, length):
        return mask_BT[:, None, :].expand(-1, length, -1)


class SeesPadding(GoodLM):
    """Attends to padding."""

    def allowed(self, mask_BT, length):
        return super().allowed(torch.ones_like(mask_BT), length)


class CountsPadding(GoodLM):
    """Positions count padding on the left."""

    def count(self, mask_BT):
        return torch.arange(mask_BT.shape[1]).expand_as(mask_BT)


class ReturnsThePrompt(GoodLM):
    """Gives ids for the prompt's positions too."""

    def generate(self, embeds_BTE, mask_BT, *, max_new_tokens):
        new = super().generate(embeds_BTE, mask_BT, max_new_tokens=max_new_tokens)
        return [[0] * int(mask.sum()) + row for mask, row in zip(mask_BT, new, strict=True)]


class CutsTheFirstToken(GoodLM):
    """Slices a prompt off that is not there."""

    def generate(self, embeds_BTE, mask_BT, *, max_new_tokens):
        return [row[1:] for row in super().generate(embeds_BTE, mask_BT, max_new_tokens=max_new_tokens)]


class IgnoresEos(GoodLM):
    """Goes on behind EOS."""

    def cut(self, row):
        return row


class DropsEosAlone(GoodLM):
    """Leaves EOS out and keeps what was generated after it."""

    def cut(self, row):
        return [token for token in row if token != EOS]


class StopsTogether(GoodLM):
    """The first row that ends ends all."""

    def generate(self, embeds_BTE, mask_BT, *, max_new_tokens):
        rows = super().generate(embeds_BTE, mask_BT, max_new_tokens=max_new_tokens)
        shortest = min(map(len, rows))
        return [row[:shortest] for row in rows]


class Samples(GoodLM):
    """Draws the next token."""

    def pick(self, logits_BV):
        return logits_BV.softmax(-1).multinomial(1)[:, 0]


class StalePositions(GoodLM):
    """The cache forgets the keys of the prompt."""

    def attend(self, embeds_BTE, mask_BT, positions_BT, cache=None):
        if cache is not None:
            cache = (cache[0] * 0, cache[1])
        return super().attend(embeds_BTE, mask_BT, positions_BT, cache)


class AddsBos(GoodLM):
    """Its tokenizer starts every piece of text."""

    bos_id = START

    def tokenize(self, text):
        return [START, *super().tokenize(text)]


class LosesText(GoodLM):
    """Lower case alone."""

    def tokenize(self, text):
        return super().tokenize(text.lower())


class FreezesItsInput(GoodLM):
    """Detaches the embeddings when frozen."""

    def forward(self, embeds_BTE, mask_BT=None, positions_BT=None):
        trained = next(self.parameters()).requires_grad
        return super().forward(embeds_BTE if trained else embeds_BTE.detach(), mask_BT, positions_BT)


class ClaimsATemplate(GoodLM):
    """States a chat template and has none."""

    def render_chat(self, messages, *, generate):
        return LanguageModel.render_chat(self, messages, generate=generate)


class HidesATemplate(GoodLM):
    """Has a chat template and denies it."""

    @classmethod
    def spec(cls, config):
        right = super().spec(config)
        return LanguageModelSpec(E, VOCABULARY, 64, 1, right.parameters, chat_template=False)


class AsksOtherwise(GoodLM):
    """Asks with other words than it is trained with."""

    def render_chat(self, messages, *, generate):
        return super().render_chat(messages, generate=False) + ("<start>model\n" if generate else "")


class WrongVocabulary(GoodLM):
    """Its head is padded, its spec is not."""

    def logits(self, hidden):
        return F.pad(super().logits(hidden), (0, 5))


GOOD = [
    ("encoder", GoodEncoder),
    ("fusion", GoodFusion),
    ("adapter", GoodAdapter),
    ("llm", GoodLM),
]

FAULTS = [
    ("encoder", KeepsCls, "features", r"forward returned \(1, 1, 17, 12\), declared \(B, L, N, D\) = \(1, 1, 16, 12\)"),
    (
        "encoder",
        KeepsClsOnTheGrid,
        "features",
        r"do not fit the grid \(4, 4\).*patch tokens only \(at .*test_testing_kit\.py:\d+, in forward\)",
    ),
    ("encoder", DropsTheWrongToken, "places", "1 places late, behind a prefix token"),
    ("encoder", Transposes, "places", "column by column, wanted row by row"),
    ("encoder", MixesTheBatch, "batch_independence", "image 0 of a batch of 3 differs from the same image alone"),
    ("encoder", DropoutInEval, "deterministic", "is dropout or other noise active"),
    ("encoder", WrongWidth, "features", r"forward returned \(1, 1, 16, 12\), declared .* = \(1, 1, 16, 24\)"),
    ("encoder", WrongPixels, "preprocess", r"returned \(6, 3, 8, 16\), declared \(B, 3, H, W\) = \(6, 3, 16, 16\)"),
    ("encoder", LoadsBytes, "preprocess", "returned torch.float64, wanted torch.float32"),
    ("encoder", IgnoresPadding, "preprocess", "resize='pad' raised KeyError"),
    ("encoder", UnusedBlock, "gradients", r"no gradient reaches blocks\.1\..*behind the last selected layer"),
    ("encoder", MiscountsParameters, "parameters", r"tiny\(\) holds \d+ parameters, its spec states"),
    ("encoder", ForgetsToLearn, "gradients", "does forward run under torch.no_grad"),
    ("encoder", HiddenParameter, "frozen", "some tensor is no registered parameter"),
    ("encoder", HiddenParameter, "state", "neither a parameter nor a persistent buffer"),
    ("encoder", HiddenState, "state", "neither a parameter nor a persistent buffer"),
    (
        "encoder",
        Unmovable,
        "bfloat16",
        r"forward of torch.bfloat16 pixels .* raised RuntimeError: .*test_testing_kit\.py:\d+, in hidden",
    ),
    ("encoder", Overflows, "bfloat16", "is off by .* of the float32 output's norm, allowed 0.1"),
    ("encoder", SeedsItself, "seeded", "from different seeds hold the same .*do not seed within build"),
    ("encoder", ReseedsEverybody, "seeded", "building seeds torch's global generator"),
    ("encoder", OwnGenerator, "seeded", "two builds from the same seed differ in cls_D"),
    ("encoder", Blind, "sees_the_image", "forward does not use its pixels"),
    ("encoder", IgnoresLayers, "layers", "layers: all gives the same features for blocks 1 and the next"),
    ("encoder", SortsLayers, "layers", r"layers: \(2, 1\) does not give what `all` gives at blocks \[2, 1\]"),
    ("encoder", AcceptsAnyLayer, "layers", "layers: 3 is accepted although spec states 2 blocks"),
    ("encoder", HalfPrecision, "tiny", "is torch.bfloat16, wanted torch.float32"),
    ("encoder", Stateful, "frozen", "a forward pass in eval mode changed mean"),
    ("encoder", MakesWeightsToPlan, "spec", "seems to make weights"),
    ("encoder", TakesAnyOption, "config", "can be changed after it was made"),
    ("encoder", IgnoresPretrained, "missing_checkpoint", "a run would train on random weights"),
    ("encoder", Crashes, "features", r"AttributeError: .*no_such_part.*test_testing_kit\.py:\d+, in forward"),
    ("fusion", UsesTheFirst, "uses_every_encoder", "no gradient reaches encoder 1"),
    ("fusion", AssumesEqualGrids, "any_geometry", "spec accepts unequal grids.* forward of 2 images raised"),
    ("fusion", AssertsGrids, "any_geometry", "raised AssertionError.*; wanted a ValueError"),
    ("fusion", FusionTakesAnything, "refuses_other_features", "wanted a ValueError"),
    ("adapter", ViewMixes, "refuses_other_sequences", "images could be mixed"),
    ("adapter", BatchNorms, "batch_independence", "in training mode image 0 depends on the others"),
    ("adapter", PoolsAway, "any_geometry", r"one token.*returned \(2, 0, 7\), declared .* \(2, 1, 7\)"),
    ("adapter", Detaches, "input_gradient", "no gradient reaches the sequence"),
    ("adapter", UnusedMatrix, "gradients", r"no gradient reaches unused\.weight, unused\.bias"),
    ("adapter", NamesADevice, "meta", r"matrix\.weight holds data"),
    ("adapter", FixesTheWidth, "any_geometry", "states the width 7, the language model has"),
    ("adapter", Float64, "spec", "returned torch.float64, wanted torch.float32"),
    ("llm", NotCausal, "causal", "attention is not causal"),
    ("llm", SeesPadding, "padding", "positions of padding on the left change the hidden states"),
    ("llm", CountsPadding, "padding", "count positions over real places only"),
    ("llm", ReturnsThePrompt, "generation_equals_recomputation", "is the prompt returned too"),
    ("llm", CutsTheFirstToken, "generation_equals_recomputation", "what is cut from the front"),
    ("llm", IgnoresEos, "generation_stops", "end each row before the first EOS"),
    ("llm", DropsEosAlone, "generation_stops", "does not stop at EOS"),
    ("llm", StopsTogether, "generation_in_batches", "prompt 0 of a batch padded on the left"),
    ("llm", SeesPadding, "generation_in_batches", "prompt .* of a batch padded on the left"),
    ("llm", Samples, "generation_equals_recomputation", "at sampling"),
    ("llm", StalePositions, "generation_equals_recomputation", "positions, mask and cache"),
    ("llm", AddsBos, "text", r"adds the special ids \[97\]"),
    ("llm", LosesText, "text", "'Yes' is 'yes' after tokenize and detokenize"),
    ("llm", FreezesItsInput, "input_gradient", "no gradient reaches the embeddings"),
    ("llm", ClaimsATemplate, "chat", "render_chat raised ValueError"),
    ("llm", HidesATemplate, "chat", "wanted it to raise ValueError"),
    ("llm", AsksOtherwise, "chat", "the template leads to an answer with"),
    ("llm", WrongVocabulary, "shapes", r"returned \(3, 7, 104\), declared \(..., V\) = \(3, 7, 99\)"),
]


@pytest.mark.parametrize(("kind", "cls"), GOOD, ids=lambda value: getattr(value, "__name__", value))
def test_a_correct_component_passes_every_check(kind, cls):
    results = run_checks(kind, cls)
    assert {result.name: result.message for result in results if not result.passed} == {}
    assert len({result.name for result in results}) == len(results)


@pytest.mark.parametrize(
    ("kind", "cls", "name", "message"), FAULTS, ids=[f"{cls.__name__}-{name}" for _, cls, name, _ in FAULTS]
)
def test_a_fault_is_caught_and_named(kind, cls, name, message):
    check = next(check for check in checks_of(kind) if check.__name__ == name)
    result = run_check(check, cls)
    assert not result.passed
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        raise AssertionError(result.message)
    assert run_check(check, dict(GOOD)[kind]).passed


def test_a_heavy_plugin_module_is_caught(tmp_path, monkeypatch):
    (tmp_path / "timm.py").write_text("")
    (tmp_path / "heavy_plugin_of_a_test.py").write_text("import timm\n")
    (tmp_path / "broken_plugin_of_a_test.py").write_text("import no_such_module_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    for module, message in [
        ("heavy_plugin_of_a_test", "importing the plugin module heavy_plugin_of_a_test imports timm"),
        ("broken_plugin_of_a_test", "ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
    ]:
        monkeypatch.setattr(plugin_checks, "_plugin_modules", lambda cls, module=module: [module])
        result = run_check(plugin_checks.light, GoodAdapter)
        assert message in result.message


def test_a_class_is_traced_to_the_plugin_module_that_offers_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "fake_components", SimpleNamespace(Mine=GoodAdapter))
    offered = [
        Registered(Component("adapter", "mine", "fake_components:Mine"), "pytest"),
        Registered(Component("adapter", "other", "fake_components:Other"), "pluggy"),
    ]
    points = [
        EntryPoint("a", f"{owner}_plugin", "chiasm")._for(SimpleNamespace(name=owner)) for owner in ("pytest", "pluggy")
    ]
    monkeypatch.setattr(plugin_checks, "registry", lambda: SimpleNamespace(all=lambda: offered))
    monkeypatch.setattr(plugin_checks, "entry_points", lambda group: points)
    assert plugin_checks._plugin_modules(GoodAdapter) == ["pytest_plugin"]
    assert plugin_checks._plugin_modules(GoodEncoder) == []


def test_running_checks_leaves_random_numbers_alone():
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    run_checks("adapter", GoodAdapter)
    assert torch.equal(torch.rand(3), wanted)


def test_one_failure_stops_no_other_check():
    results = {result.name: result for result in run_checks("encoder", Crashes)}
    assert [check.__name__ for check in checks_of("encoder")] == list(results)
    assert results["parameters"].passed
    assert not results["features"].passed
    assert all(result.seconds >= 0 for result in results.values())
    assert all(bool(result.message) is not result.passed for result in results.values())


@pytest.mark.parametrize(("cls", "code"), [(GoodAdapter, 0), (UnusedMatrix, 1)])
def test_the_command_line_runs_the_same_checks(monkeypatch, cls, code):
    monkeypatch.setattr(chiasm.cli, "registry", lambda: SimpleNamespace(load=lambda kind, name: cls))
    done = CliRunner().invoke(chiasm.cli.cli, ["check", "adapter", "mine", "--json"])
    assert done.exit_code == code
    rows = {row["check"]: row for row in json.loads(done.stdout)["checks"]}
    assert list(rows) == [check.__name__ for check in checks_of("adapter")]
    assert [name for name, row in rows.items() if not row["passed"]] == ["gradients"] * code
    printed = CliRunner().invoke(chiasm.cli.cli, ["check", "adapter", "mine"])
    assert printed.exit_code == code
    assert ("FAIL gradients\n     no gradient reaches unused.weight" in printed.stdout) == bool(code)


def test_an_interrupt_is_no_failed_check():
    def interrupted(cls):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_check(interrupted, GoodAdapter)


def test_a_slow_tiny_is_told(monkeypatch):
    monkeypatch.setattr(common, "SLOW", 0.0)
    result = run_check(checks_of("adapter")[[c.__name__ for c in checks_of("adapter")].index("tiny")], GoodAdapter)
    assert "tiny() took over 0 s, wanted well under one second" in result.message


def test_a_class_without_tiny_says_so():
    class NotTiny(GoodAdapter):
        @classmethod
        def tiny(cls):
            raise NotImplementedError("later")

    messages = {result.message for result in run_checks("adapter", NotTiny) if not result.passed}
    assert all(message.startswith("NotTiny.tiny() raised NotImplementedError: later (at ") for message in messages)


def test_kinds_without_checks_are_told(monkeypatch):
    monkeypatch.setitem(registry().kinds, "bare", Kind("bare", "chiasm.adapter:Adapter"))
    monkeypatch.setitem(registry().kinds, "lost", Kind("lost", "chiasm.adapter:Adapter", checks="chiasm.adapter:NONE"))
    with pytest.raises(PluginError, match=r"the kind 'bare' has no checks; .* Kind\(checks="):
        checks_of("bare")
    with pytest.raises(PluginError, match=r"cannot be imported from 'chiasm.adapter:NONE'"):
        checks_of("lost")
    with pytest.raises(PluginError, match=r"no kind of component named 'encodr'. Kinds: encoder, fusion"):
        checks_of("encodr")


@pytest.mark.parametrize(("kind", "cls"), GOOD, ids=lambda value: getattr(value, "__name__", value))
def test_every_check_says_what_it_promises(kind, cls):
    for check in checks_of(kind):
        assert check.__doc__, check.__name__


class TestEncoder(EncoderContract):
    component_class = GoodEncoder


class TestFusion(FusionContract):
    component_class = GoodFusion


class TestAdapter(AdapterContract):
    component_class = GoodAdapter


class TestLanguageModel(LanguageModelContract):
    component_class = GoodLM


class TestKnownFault(AdapterContract):
    component_class = UnusedMatrix
    xfails = {"gradients": "a matrix is kept for later"}


def test_a_suite_has_a_test_for_each_check():
    tests = [name for name in vars(TestEncoder) if name.startswith("test_")]
    assert tests == [f"test_{check.__name__}" for check in checks_of("encoder")]
    assert not [name for name in vars(EncoderContract) if name.startswith("test_")]


def test_suites_are_strict():
    class Suite(AdapterContract):
        component_class = UnusedMatrix
        xfails = {"gradients": "known", "config": "wrong", "gradient": "misspelt"}

    suite = Suite()
    with pytest.raises(pytest.xfail.Exception, match="known: no gradient reaches"):
        suite.test_gradients()
    with pytest.raises(pytest.fail.Exception, match=r"config passes and is listed in xfails \(wrong\)"):
        suite.test_config()
    with pytest.raises(AssertionError, match=r"no check named 'gradient'. Did you mean 'gradients'"):
        suite.test_xfails_name_checks()
    Suite.xfails = {}
    with pytest.raises(ContractError, match=r"no gradient reaches unused\.weight"):
        suite.test_gradients()


def test_the_kit_is_light_to_import_and_needs_no_pytest():
    code = """
import sys
sys.modules["pytest"] = None
import chiasm.testing
assert "torch" not in sys.modules
import chiasm.testing.suites
assert chiasm.testing.checks_of("encoder") == chiasm.testing.EncoderContract.checks
"""
    subprocess.run([sys.executable, "-c", code], check=True)
