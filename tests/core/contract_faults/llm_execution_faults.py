"""Language models with one fault each: how they are executed, what they state of it, and batches of unequal rows."""

from __future__ import annotations

import torch
from torch import nn

from chiasm.llm import LanguageModelSpec
from contract_faults.llms import CONTEXT, VOCABULARY, E, GoodLM, Letters, PackingLM, RunningMean
from fault_record import Recorder

fault = Recorder("llm")


class Block(nn.Module):
    """Mixes by a running mean."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Linear(E, E, bias=False)

    def forward(self, x_BTE, real_BT1):
        mean_BTE = (x_BTE * real_BT1).cumsum(1) / real_BT1.cumsum(1).clamp(min=1)
        return x_BTE + self.matrix(mean_BTE)


@fault.correct
class Blocks(RunningMean):
    """Two blocks that are named, one of them at work twice, and all that a plan reckons with stated."""

    order = (0, 1, 0)
    count = 2 * VOCABULARY * E + 2 * E * E
    matrices, head_numbers = 3 * E * E, VOCABULARY * E

    @classmethod
    def spec(cls, config):
        return LanguageModelSpec(
            E,
            VOCABULARY,
            CONTEXT,
            len(cls.order),
            cls.count,
            chat_template=True,
            matrix_parameters=cls.matrices,
            head_parameters=cls.head_numbers,
        )

    @classmethod
    def activation_bytes(cls, config, positions, *, trained):
        return 8 * E * positions * (1 + trained)

    def __init__(self, config) -> None:
        Letters.__init__(self, config)
        self.embedding = nn.Embedding(VOCABULARY, E)
        self.parts = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(E, VOCABULARY, bias=False)

    def block_modules(self):
        return [self.parts[i] for i in self.order]

    def forward(self, embeds_BTE, mask_BT=None, positions_BT=None):
        real_BT1 = self.real(embeds_BTE, mask_BT).unsqueeze(-1).to(embeds_BTE.dtype)
        for i in self.order:
            embeds_BTE = self.run(self.parts[i], embeds_BTE, real_BT1)
        return embeds_BTE

    def run(self, block, x_BTE, real_BT1):
        return block(x_BTE, real_BT1)


@fault("blocks", "forward calls of them none: .* must be called as one")
class GoesAroundCalls(Blocks):
    """Runs its blocks without calling them."""

    def run(self, block, x_BTE, real_BT1):
        return block.forward(x_BTE, real_BT1)


@fault("blocks", "names 1 modules, spec states depth = 3")
class NamesOneBlock(Blocks):
    """Leaves blocks out."""

    def block_modules(self):
        return super().block_modules()[:1]


@fault("checkpointing", "gives parts.* another gradient|no gradient")
class ForgetsWhenComputedAgain(Blocks):
    """Computed again, a block passes no gradient to its matrix."""

    again = False

    def checkpoint_activations(self, on):
        self.again = on

    def run(self, block, x_BTE, real_BT1):
        y_BTE = block(x_BTE, real_BT1)
        return x_BTE + (y_BTE - x_BTE).detach() if self.again else y_BTE


@fault("activations", "what is kept grows with them")
class KeepsTheSameBytes(Blocks):
    """States one number of bytes for every length."""

    @classmethod
    def activation_bytes(cls, config, positions, *, trained):
        return 1000


@fault("operations", "spec states matrix_parameters = .*, forward multiplies each position by 768 numbers")
class CountsTheHead(Blocks):
    """Counts the head among the matrices of every position."""

    matrices = Blocks.matrices + Blocks.head_numbers


@fault("operations", "spec states head_parameters = 0, logits uses 1,584 at each position")
class TiedSoNothing(Blocks):
    """Takes the head for free."""

    head_numbers = 0


@fault("packing", "no gradient reaches the embeddings of a packed row")
class PacksWithoutAGradient(PackingLM):
    """Packed rows are read under no_grad."""

    @torch.no_grad()
    def forward_packed(self, embeds_1TE, documents):
        return super().forward_packed(embeds_1TE, documents)


@fault.correct
class MatrixAtPlaces(RunningMean):
    """The mean over all positions, and what comes behind it at the asked ones alone."""

    def forward_at(self, embeds_BTE, places_S, mask_BT=None, documents=None):
        real_BT1 = self.real(embeds_BTE, mask_BT).unsqueeze(-1).to(embeds_BTE.dtype)
        mean_BTE = (embeds_BTE * real_BT1).cumsum(1) / real_BT1.cumsum(1).clamp(min=1)
        mean_SE = self.matrix(mean_BTE.flatten(0, 1)[places_S])
        return embeds_BTE.flatten(0, 1)[places_S] + mean_SE


def asked(embeds_BTE, places_S):
    """True at the places."""
    asked_BT = torch.zeros(embeds_BTE.shape[:2], dtype=torch.bool)
    asked_BT.view(-1)[places_S] = True
    return asked_BT


@fault("asked_positions", "forward_at of 5 positions of whole sequences gives other states than forward has there")
class ReadsAskedPositionsAlone(GoodLM):
    """Positions that are not asked for are not attended to."""

    def forward_at(self, embeds_BTE, places_S, mask_BT=None, documents=None):
        positions_BT = self.positions(self.real(embeds_BTE, mask_BT))
        return self.attend(embeds_BTE, asked(embeds_BTE, places_S), positions_BT)[0].flatten(0, 1)[places_S]


@fault("asked_positions", "5 positions of a batch of which one sequence is padded on the left gives other states")
class AskedWithoutAMask(GoodLM):
    """Padding is seen where positions are asked for."""

    def forward_at(self, embeds_BTE, places_S, mask_BT=None, documents=None):
        return super().forward_at(embeds_BTE, places_S, None, documents)


@fault("asked_positions", "5 positions of a packed row gives other states")
class AskedAcrossDocuments(PackingLM):
    """Documents are one where positions are asked for."""

    def forward_at(self, embeds_BTE, places_S, mask_BT=None, documents=None):
        return super().forward_at(embeds_BTE, places_S, mask_BT)


@fault("asked_positions", "gives the embeddings another gradient than forward")
class LearnsFromAskedEmbeddings(RunningMean):
    """What other positions give to an asked one is detached."""

    def forward_at(self, embeds_BTE, places_S, mask_BT=None, documents=None):
        kept_BTE = torch.where(asked(embeds_BTE, places_S).unsqueeze(-1), embeds_BTE, embeds_BTE.detach())
        return super().forward_at(kept_BTE, places_S, mask_BT, documents)


@fault("asked_positions", "forward_at of 0 positions .* raised RuntimeError")
class WantsSomethingAsked(GoodLM):
    """Cannot take a batch that supervises nothing."""

    def forward_at(self, embeds_BTE, places_S, mask_BT=None, documents=None):
        hidden_SE = super().forward_at(embeds_BTE, places_S, mask_BT, documents)
        return torch.stack(list(hidden_SE))


@fault("padding", "each row has a mask and positions of its own")
class OneMaskForAll(GoodLM):
    """The first row's mask serves all rows."""

    def forward(self, embeds_BTE, mask_BT=None, positions_BT=None):
        mask_BT = None if mask_BT is None else mask_BT[:1].expand_as(mask_BT)
        return super().forward(embeds_BTE, mask_BT, positions_BT)


@fault("shapes", "embed of an id depends on its place or on the ids beside it")
class EmbedsPlaces(RunningMean):
    """Adds something of its place to each embedding."""

    def embed(self, ids):
        embeds = super().embed(ids)
        return embeds + 0.1 * torch.arange(embeds.shape[-2]).unsqueeze(-1) if ids.ndim else embeds


@fault("shapes", "forward raised AssertionError")
class WantsTwoPositions(RunningMean):
    """Cannot read a single position."""

    def forward(self, embeds_BTE, mask_BT=None, positions_BT=None):
        assert embeds_BTE.shape[1] != 1
        return super().forward(embeds_BTE, mask_BT, positions_BT)


@fault("chat", "leaves out what the system says")
class IgnoresTheSystem(RunningMean):
    """Its template writes questions and answers alone."""

    def render_chat(self, messages, *, generate):
        return super().render_chat([m for m in messages if m["role"] != "system"], generate=generate)


@fault("text", r"tokenize\(''\) gives \[0\], wanted no id")
class NothingIsASpace(RunningMean):
    """Nothing becomes a token."""

    def tokenize(self, text):
        return super().tokenize(text or " ")


@fault("generation_leaves_no_trace", "generate draws or seeds torch's generator")
class ThrowsDice(GoodLM):
    """Draws a number for every token, and is greedy all the same."""

    def pick(self, logits_BV):
        torch.rand(())
        return super().pick(logits_BV)


@fault.correct
class NothingLearns(GoodLM):
    """Its weights cannot be trained, as quantised ones cannot."""

    @classmethod
    def spec(cls, config):
        return LanguageModelSpec(E, VOCABULARY, CONTEXT, 1, cls.count, chat_template=True, trainable=0)

    def trainable(self):
        return {}
