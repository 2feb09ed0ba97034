"""Language models with one fault each: what they state, read and compute."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from chiasm.llm import LanguageModel
from contract_faults.llms import EOS, START, E, GoodLM, PackingLM, TiedLM
from fault_record import Recorder

fault = Recorder("llm")


@fault("causal", "attention is not causal")
class NotCausal(GoodLM):
    """Every position sees every other."""

    def allowed(self, mask_BT, length):
        return mask_BT[:, None, :].expand(-1, length, -1)


@fault("causal", "forward ignores embeds_BTE")
class IgnoresItsInput(GoodLM):
    """Looks at positions alone."""

    def attend(self, embeds_BTE, mask_BT, positions_BT, cache=None):
        return super().attend(embeds_BTE * 0, mask_BT, positions_BT, cache)


@fault("padding", "positions of padding on the left change the hidden states")
@fault("generation_in_batches", "prompt .* of a batch padded on the left")
class SeesPadding(GoodLM):
    """Attends to padding."""

    def allowed(self, mask_BT, length):
        return super().allowed(torch.ones_like(mask_BT), length)


@fault("padding", "count positions over real places only")
class CountsPadding(GoodLM):
    """Positions count padding on the left."""

    def positions(self, mask_BT):
        return torch.arange(mask_BT.shape[1], device=mask_BT.device).expand_as(mask_BT)


@fault("padding", "a mask that is True everywhere gives other states than no mask")
class MasksTheLastPosition(GoodLM):
    """An off-by-one where there is a mask."""

    def forward(self, embeds_BTE, mask_BT=None, positions_BT=None):
        if mask_BT is None:
            return super().forward(embeds_BTE, mask_BT, positions_BT)
        return super().forward(embeds_BTE, F.pad(mask_BT[:, 1:], (1, 0)), positions_BT)


@fault("padding_gradient", "a sequence padded on the left gives NaN or infinity")
class MasksWithInfinity(GoodLM):
    """A position of padding that sees nothing is a softmax over nothing."""

    def attend(self, embeds_BTE, mask_BT, positions_BT, cache=None):
        x_BTE = embeds_BTE + self.position(positions_BT)
        q, k, v = self.qkv(x_BTE).chunk(3, dim=-1)
        if cache is not None:
            k, v = torch.cat([cache[0], k], dim=1), torch.cat([cache[1], v], dim=1)
        hidden = ~self.allowed(mask_BT, q.shape[1])
        scores = (q @ k.transpose(1, 2) * E**-0.5).masked_fill(hidden, float("-inf"))
        return x_BTE + scores.softmax(-1) @ v, (k, v)


@fault("text", r"adds the special ids \[97\]")
class AddsBos(GoodLM):
    """Its tokenizer starts every piece of text."""

    bos_id = START

    def tokenize(self, text):
        return [START, *super().tokenize(text)]


@fault("text", r"tokenize adds the id 97 before every text")
class AddsAnUndeclaredBos(GoodLM):
    """The same with an id that it does not call special."""

    special_ids = frozenset({EOS})

    def tokenize(self, text):
        return [START, *super().tokenize(text)]


@fault("text", r"special_ids \[97, 98\] lack eos_id 96")
class ForgetsEos(GoodLM):
    """EOS is no special id."""

    special_ids = frozenset({START, 98})


@fault("text", "'Yes' is 'yes' after tokenize and detokenize")
class LosesText(GoodLM):
    """Lower case alone."""

    def tokenize(self, text):
        return super().tokenize(text.lower())


@fault("text", "detokenize writes EOS into")
class WritesEos(GoodLM):
    """The end of an answer is part of its text."""

    def detokenize(self, ids):
        return super().detokenize(ids) + "</s>" * list(ids).count(EOS)


@fault("input_gradient", "no gradient reaches the embeddings")
class FreezesItsInput(GoodLM):
    """Detaches the embeddings when frozen."""

    def forward(self, embeds_BTE, mask_BT=None, positions_BT=None):
        trained = next(self.parameters()).requires_grad
        return super().forward(embeds_BTE if trained else embeds_BTE.detach(), mask_BT, positions_BT)


@fault("chat", "render_chat raised ValueError")
class ClaimsATemplate(GoodLM):
    """States a chat template and has none."""

    def render_chat(self, messages, *, generate):
        return LanguageModel.render_chat(self, messages, generate=generate)


@fault("chat", "wanted it to raise ValueError")
class HidesATemplate(GoodLM):
    """Has a chat template and denies it."""

    template = False


@fault("chat", "the template leads to an answer with")
class AsksOtherwise(GoodLM):
    """Asks with other words than it is trained with."""

    def render_chat(self, messages, *, generate):
        return super().render_chat(messages, generate=False) + ("<start>model\n" if generate else "")


@fault("shapes", r"returned \(3, 7, 104\), declared \(..., V\) = \(3, 7, 99\)")
class WrongVocabulary(GoodLM):
    """Its head is padded, its spec is not."""

    def logits(self, hidden):
        return F.pad(super().logits(hidden), (0, 5))


@fault("shapes", r"logits of \(3, 7, 16\) returned \(3, 99\), declared")
class LastLogitsAlone(GoodLM):
    """Logits of the last position, whatever is asked."""

    def logits(self, hidden):
        return super().logits(hidden[:, -1] if hidden.ndim == 3 else hidden)


@fault("shapes", r"forward returned \(1, 7, 99\), declared \(B, T, E\) = \(1, 7, 16\)")
class GivesLogits(GoodLM):
    """Forward gives logits instead of hidden states."""

    def forward(self, embeds_BTE, mask_BT=None, positions_BT=None):
        return self.head(super().forward(embeds_BTE, mask_BT, positions_BT))


@fault("parameters", r"tiny\(\) holds \d+ parameters, its spec states parameters = \d+")
class CountsTiedTwice(TiedLM):
    """The shared table is counted for the embedding and for the head."""

    count = GoodLM.count


@fault("context", "forward of 128 positions, the context_length that spec states, raised IndexError")
class StatesALongerContext(GoodLM):
    """Has positions for half of the context that it states."""

    @classmethod
    def spec(cls, config):
        return replace(super().spec(config), context_length=128)


@fault("state", "gives another output")
class TiesByCopying(GoodLM):
    """The head is a copy of the embedding that no state dict holds."""

    count = TiedLM.count

    def __init__(self, config) -> None:
        super().__init__(config)
        del self.head
        self.register_buffer("table", self.embedding.weight.detach().clone(), persistent=False)

    def logits(self, hidden):
        return F.linear(hidden, self.table)


@fault("batch_independence", "sequences are mixed")
class NormalisesOverTheBatch(GoodLM):
    """A mean over the wrong axis."""

    def forward(self, embeds_BTE, mask_BT=None, positions_BT=None):
        hidden = super().forward(embeds_BTE, mask_BT, positions_BT)
        return hidden - 0.1 * hidden.mean(dim=0, keepdim=True)


@fault("device", "that is on the CPU")
class MaskOnTheCpu(GoodLM):
    """The causal mask is made on the CPU."""

    def allowed(self, mask_BT, length):
        size = mask_BT.shape[1]
        return (torch.ones(size, size, dtype=torch.bool).tril() & mask_BT[:, None, :])[:, -length:]


@fault("frozen", "its output still requires a gradient")
class LearnedInSecret(GoodLM):
    """A tensor that learns and is no parameter."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.secret = {"shift": torch.zeros(E, requires_grad=True)}

    def logits(self, hidden):
        return super().logits(hidden + self.secret["shift"])


@fault("gradients", r"no gradient reaches adapter\.weight")
class UnusedAdapter(GoodLM):
    """A low-rank part that is made and never added."""

    count = GoodLM.count + 4 * E

    def __init__(self, config) -> None:
        super().__init__(config)
        self.adapter = nn.Linear(E, 4, bias=False)


@fault("trainable", r"trainable of tiny\(\) gives 768 parameters, its spec states trainable = \d+")
class TrainsLessThanItStates(GoodLM):
    """One matrix alone would learn."""

    def trainable(self):
        return {"qkv.weight": self.qkv.weight}


@fault("trainable", "trainable of .* names embedding, position, qkv, head, which")
class TrainsUnderAnotherName(GoodLM):
    """The names are those of modules."""

    def trainable(self):
        return {name.removesuffix(".weight"): parameter for name, parameter in self.named_parameters()}


@fault("packing", "gives a document other hidden states than forward gives it alone")
class PacksWithoutDocuments(PackingLM):
    """Positions start again, attention does not."""

    def forward_packed(self, embeds_1TE, documents):
        return self(embeds_1TE, None, documents.positions_1T)


@fault("packing", "count positions from 0 in each")
class PacksWithoutPositions(PackingLM):
    """Attention stays within a document, whose positions go on from those before it."""

    def forward_packed(self, embeds_1TE, documents):
        places = torch.arange(embeds_1TE.shape[1]).unsqueeze(0)
        lengths = list(documents.lengths)
        parts = zip(torch.split(embeds_1TE, lengths, dim=1), torch.split(places, lengths, dim=1), strict=True)
        return torch.cat([self(part, None, places) for part, places in parts], dim=1)


@fault("packing", "lets a changed document change another's hidden states")
class LeaksALittle(PackingLM):
    """The mean of the row is taken off and put back."""

    def forward_packed(self, embeds_1TE, documents):
        mean = 1e-6 * embeds_1TE.mean(1, keepdim=True)
        return super().forward_packed(embeds_1TE, documents) + mean


@fault("packing", r"forward_packed returned \(10, 16\), declared \(1, T, E\)")
class DropsTheRow(PackingLM):
    """Without the first axis."""

    def forward_packed(self, embeds_1TE, documents):
        return super().forward_packed(embeds_1TE, documents)[0]
