"""Language models with one fault each: how they generate."""

from __future__ import annotations

import torch

from contract_faults.llms import EOS, GoodLM
from fault_record import Recorder

fault = Recorder("llm")


@fault("generation_equals_recomputation", "is the prompt returned too")
class ReturnsThePrompt(GoodLM):
    """Gives ids for the prompt's positions too."""

    def generate(self, embeds_BTE, mask_BT, *, max_new_tokens):
        new = super().generate(embeds_BTE, mask_BT, max_new_tokens=max_new_tokens)
        return [[0] * int(mask.sum()) + row for mask, row in zip(mask_BT, new, strict=True)]


@fault("generation_equals_recomputation", "what is cut from the front")
class CutsTheFirstToken(GoodLM):
    """Slices a prompt off that is not there."""

    def generate(self, embeds_BTE, mask_BT, *, max_new_tokens):
        return [row[1:] for row in super().generate(embeds_BTE, mask_BT, max_new_tokens=max_new_tokens)]


@fault("generation_stops", "end each row before the first EOS")
class IgnoresEos(GoodLM):
    """Goes on behind EOS."""

    def cut(self, row):
        return row


@fault("generation_stops", "EOS .* is among them; end each row before the first EOS")
class ReturnsEos(GoodLM):
    """Stops at EOS and hands it out."""

    def cut(self, row):
        return row[: row.index(EOS) + 1] if EOS in row else row


@fault("generation_stops", "does not stop at EOS")
class DropsEosAlone(GoodLM):
    """Leaves EOS out and keeps what was generated after it."""

    def cut(self, row):
        return [token for token in row if token != EOS]


@fault("generation_in_batches", "prompt 0 of a batch padded on the left.*it ends early")
class StopsTogether(GoodLM):
    """The first row that ends ends all."""

    def generate(self, embeds_BTE, mask_BT, *, max_new_tokens):
        rows = super().generate(embeds_BTE, mask_BT, max_new_tokens=max_new_tokens)
        shortest = min(map(len, rows))
        return [row[:shortest] for row in rows]


@fault("generation_equals_recomputation", "more than max_new_tokens=6")
class OneTokenMore(GoodLM):
    """Counts the first token apart."""

    def generate(self, embeds_BTE, mask_BT, *, max_new_tokens):
        return super().generate(embeds_BTE, mask_BT, max_new_tokens=max_new_tokens + 1)


@fault("generation_equals_recomputation", "it ends early; only EOS .* and max_new_tokens=6")
class OneTokenLess(GoodLM):
    """Takes max_new_tokens for a length that the first token is in."""

    def generate(self, embeds_BTE, mask_BT, *, max_new_tokens):
        return super().generate(embeds_BTE, mask_BT, max_new_tokens=max(1, max_new_tokens - 1))


@fault("generation_equals_recomputation", "at sampling")
class Samples(GoodLM):
    """Draws the next token."""

    def pick(self, logits_BV):
        return logits_BV.softmax(-1).multinomial(1)[:, 0]


@fault("generation_stops", "at penalties of the generation settings")
class PenalisesRepeats(GoodLM):
    """A checkpoint's generation settings leak in: a token that was just given is not given again."""

    last: torch.Tensor | None = None

    def pick(self, logits_BV):
        if self.last is not None and len(self.last) == len(logits_BV):
            logits_BV = logits_BV.scatter(1, self.last[:, None], -1e9)
        self.last = super().pick(logits_BV)
        return self.last


@fault("generation_equals_recomputation", "positions, mask and cache")
class StaleKeys(GoodLM):
    """The cache forgets the keys of the prompt."""

    def attend(self, embeds_BTE, mask_BT, positions_BT, cache=None):
        if cache is not None:
            cache = (cache[0] * 0, cache[1])
        return super().attend(embeds_BTE, mask_BT, positions_BT, cache)


@fault("generation_equals_recomputation", "positions, mask and cache")
class OnePositionLate(GoodLM):
    """Decoding counts its own position twice."""

    def next(self, mask_BT):
        return super().next(mask_BT) + 1


@fault("generation_equals_recomputation", "positions, mask and cache")
class StandsStill(GoodLM):
    """Decoding stays at the position of the prompt's last token."""

    def next(self, mask_BT):
        return (super().next(mask_BT) - 1).clamp(min=0)


@fault("generation_in_batches", "positions, mask and cache of a padded prompt")
class CountsPaddingWhenDecoding(GoodLM):
    """The new tokens' positions count the padding before the prompt."""

    def next(self, mask_BT):
        return torch.full_like(mask_BT[:, :1], mask_BT.shape[1] - 1, dtype=torch.int64)


@fault("generation_leaves_no_trace", "generate keeps a cache of them|a cache is kept")
class KeepsItsCache(GoodLM):
    """The next prompt sees the last one's first keys."""

    old: torch.Tensor | None = None

    def generate(self, embeds_BTE, mask_BT, *, max_new_tokens):
        before, self.old = self.old, embeds_BTE[:1, :1]
        if before is not None and not torch.equal(before, self.old):
            embeds_BTE = embeds_BTE + 3 * before
        return super().generate(embeds_BTE, mask_BT, max_new_tokens=max_new_tokens)


@fault("generation_leaves_no_trace", "leaves the model in another mode than it found it, training=True")
class StaysInEval(GoodLM):
    """Generation in the middle of training turns training off."""

    def generate(self, embeds_BTE, mask_BT, *, max_new_tokens):
        self.eval()
        return super().generate(embeds_BTE, mask_BT, max_new_tokens=max_new_tokens)


@fault("generation_equals_recomputation", "generate changes the embeddings or the mask that it is given in place")
class ScalesThePrompt(GoodLM):
    """Writes into the caller's embeddings."""

    def generate(self, embeds_BTE, mask_BT, *, max_new_tokens):
        embeds_BTE.masked_fill_(~mask_BT.unsqueeze(-1), 0).mul_(1.01)
        return super().generate(embeds_BTE, mask_BT, max_new_tokens=max_new_tokens)
