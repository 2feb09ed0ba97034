"""The model that composes the parts, on toy parts whose results are known in closed form."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from chiasm.batch import collate, in_one_piece, row_length
from chiasm.config import PARTS, TokensConfig
from chiasm.features import Features
from chiasm.prompt import IGNORE, Position, PromptBuilder
from chiasm.sample import Sample, Turn
from chiasm.vlm import VLM


class FakeImage:
    key = "fake"

    def load(self):
        raise AssertionError


def prompts(vlm: VLM, *samples: Sample, ask: bool = False):
    builder = PromptBuilder(vlm.llm, TokensConfig(), vlm.visual_tokens, "s")
    return [builder.ask(sample, 4) if ask else builder.train(sample) for sample in samples]


IMAGE = Sample("image", (Turn("q", "abc"),), (FakeImage(),))
TWO = Sample("two", (Turn("<image>a<image>", "x"), Turn("more", "yz")), (FakeImage(), FakeImage()))
TEXT = Sample("text", (Turn("hello", "you"),))


def test_embeddings_are_put_in_order_row_by_row(make_vlm):
    vlm = make_vlm(2)
    pixels = [torch.randn(3, 3, 8, 8), torch.randn(3, 3, 8, 8)]
    batch = collate(prompts(vlm, IMAGE, TEXT, TWO), pixels)
    visual = vlm.see(pixels)
    images = iter(visual)
    wanted = torch.zeros(*batch.ids_BT.shape, 16)
    for b in range(3):
        rows = []
        position = 0
        while position < batch.ids_BT.shape[1]:
            kind, token = int(batch.kinds_BT[b, position]), int(batch.ids_BT[b, position])
            if kind == Position.VISUAL:
                rows += list(next(images))
                position += vlm.visual_tokens
                continue
            if kind == Position.TEXT:
                rows.append(vlm.llm.embedding.weight[token])
            elif kind == Position.LEARNED:
                rows.append(vlm.tokens.vectors[token])
            else:
                rows.append(torch.zeros(16))
            position += 1
        wanted[b] = torch.stack(rows)
    torch.testing.assert_close(vlm.embed(batch), wanted, rtol=0, atol=0)


def test_the_loss_is_the_sum_over_supervised_tokens(make_vlm):
    vlm = make_vlm()
    batch = collate(prompts(vlm, IMAGE, TEXT), [torch.randn(1, 3, 8, 8)])
    loss, count = vlm(batch)
    logits = vlm.logits(batch).double()
    wanted = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.labels_BT[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
    )
    assert int(count) == len("abc") + 1 + len("you") + 1
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("pad", ["left", "right"])
def test_padding_and_neighbours_change_nothing(make_vlm, pad):
    vlm = make_vlm()
    pixels = torch.randn(3, 3, 8, 8)
    together = collate(prompts(vlm, IMAGE, TEXT, TWO), [pixels], pad=pad)
    logits = vlm.logits(together)
    for b, (sample, images) in enumerate([(IMAGE, pixels[:1]), (TEXT, None), (TWO, pixels[1:])]):
        alone = collate(prompts(vlm, sample), [] if images is None else [images])
        torch.testing.assert_close(logits[b][together.mask_BT[b]], vlm.logits(alone)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("pad", ["left", "right"])
def test_longer_rows_change_nothing_and_shorter_ones_are_refused(make_vlm, pad):
    vlm = make_vlm()
    given, pixels = prompts(vlm, IMAGE, TEXT, TWO), torch.randn(3, 3, 8, 8)
    least = collate(given, [pixels], pad=pad)
    longest = least.ids_BT.shape[1]
    longer = collate(given, [pixels], pad=pad, length=longest + 5)
    assert longer.ids_BT.shape == (3, longest + 5)
    for mine, other in zip(vlm(least), vlm(longer), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(vlm.logits(longer)[longer.mask_BT], vlm.logits(least)[least.mask_BT], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=f"{longest} positions does not fit into a row of {longest - 1}"):
        collate(given, [pixels], pad=pad, length=longest - 1)


@pytest.mark.parametrize(
    ("longest", "context", "length"),
    [(1, 2048, 64), (64, 2048, 64), (65, 2048, 128), (1000, 1010, 1010), (1010, 1010, 1010), (640, 2048, 640)],
)
def test_rows_for_a_gpu_have_few_lengths(longest, context, length):
    assert row_length(longest, context) == length


def test_each_encoder_sees_its_own_pixels_and_stands_in_its_own_place(make_vlm):
    vlm = make_vlm(2)
    with torch.no_grad():
        vlm.encoders[1].weight.fill_(-2.0)
    pixels = [torch.randn(3, 3, 8, 8), torch.randn(3, 3, 8, 8)]
    wanted = torch.empty(3, 8, 3)
    for i, (k, weight) in itertools.product(range(3), enumerate([1.0, -2.0])):
        for row, column in itertools.product(range(2), repeat=2):
            quarter = pixels[k][i, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            wanted[i, 4 * k + 2 * row + column] = weight * quarter.mean(dim=(1, 2))
    matrix = vlm.adapter.matrix
    wanted = wanted @ matrix.weight.T + matrix.bias
    torch.testing.assert_close(vlm.see(pixels), wanted, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="images for 1 encoders, the model has 2"):
        vlm.see(pixels[:1])


def test_features_may_stand_for_pixels(make_vlm):
    vlm = make_vlm(2)
    pixels = [torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8)]
    known = [vlm.encode(0, pixels[0]), pixels[1]]
    (prompt,) = prompts(vlm, IMAGE)
    torch.testing.assert_close(
        vlm.logits(collate([prompt], known)), vlm.logits(collate([prompt], pixels)), rtol=0, atol=0
    )


@pytest.mark.parametrize("trained", [{"adapter", "tokens"}, {"llm"}, {"encoders", "adapter"}, set(PARTS)])
def test_exactly_the_trained_parts_learn(make_vlm, trained):
    vlm = make_vlm()
    vlm.set_trained(trained)
    vlm.train()
    loss, _ = vlm(collate(prompts(vlm, IMAGE), [torch.randn(1, 3, 8, 8)]))
    loss.backward()
    for part in PARTS:
        module = vlm.part(part)
        assert module.training == (part in trained), part
        gradients = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in module.parameters()]
        assert all(gradients) if part in trained else not any(gradients), part
    counts = {count.part: count for count in vlm.counts()}
    assert counts["tokens"].trained == (64 if "tokens" in trained else 0)
    assert counts["tokens"].trained + counts["tokens"].frozen == 64


def test_a_text_only_batch_trains(make_vlm):
    vlm = make_vlm()
    vlm.set_trained(("tokens",))
    loss, count = vlm(collate(prompts(vlm, TEXT)))
    loss.backward()
    assert int(count) == 4
    assert vlm.tokens.vectors.grad is not None


def test_wrong_numbers_of_images_and_encoders_are_told(make_vlm):
    vlm = make_vlm()
    (prompt,) = prompts(vlm, IMAGE)
    with pytest.raises(ValueError, match="4 places for visual tokens, its 2 views of images have 8"):
        vlm.embed(collate([prompt], [torch.randn(2, 3, 8, 8)]))
    with pytest.raises(ValueError, match="4 places for visual tokens and no image"):
        vlm.embed(collate([prompt]))
    with pytest.raises(ValueError, match="images for 2 encoders, the model has 1"):
        vlm.embed(collate([prompt], [torch.randn(1, 3, 8, 8)] * 2))


def test_parts_that_do_not_fit_are_refused(make_vlm):
    one, two = make_vlm(1), make_vlm(2)
    with pytest.raises(ValueError, match="the fusion was built for"):
        VLM(one.encoders, two.fusion, two.adapter, one.llm)
    with pytest.raises(ValueError, match="the adapter was built for"):
        VLM(one.encoders, one.fusion, two.adapter, one.llm)


def test_answers_in_a_batch_equal_answers_alone(make_vlm):
    vlm = make_vlm()
    pixels = torch.randn(1, 3, 8, 8)
    ask = [Sample("a", (Turn("q"),), (FakeImage(),)), Sample("b", (Turn("a longer question"),))]
    both = prompts(vlm, *ask, ask=True)
    together = vlm.generate(collate(both, [pixels], pad="left"), max_new_tokens=5)
    alone = [
        vlm.generate(collate(both[:1], [pixels], pad="left"), max_new_tokens=5)[0],
        vlm.generate(collate(both[1:], pad="left"), max_new_tokens=5)[0],
    ]
    assert together == alone


def test_features_must_fit_their_grid():
    with pytest.raises(ValueError, match=r"features of shape \(1, 1, 5, 3\) do not fit the grid \(2, 2\)"):
        Features(torch.zeros(1, 1, 5, 3), (2, 2))


def test_what_a_gpu_is_sent_in_one_piece_is_what_a_batch_holds(make_vlm):
    vlm = make_vlm()
    batch = collate(prompts(vlm, IMAGE, TEXT, TWO), [torch.randn(3, 3, 8, 8)], pad="packed")
    tensors = [batch.ids_BT, batch.documents.bounds_P, batch.supervised_S]
    whole = in_one_piece(tensors, pin=False)
    assert whole.dtype == torch.int64
    assert whole.tolist() == [value for tensor in tensors for value in tensor.flatten().tolist()]


def test_a_batch_is_made_without_torchs_threads(make_vlm):
    """They wait for each other where other processes keep cores busy, for what one core does in a moment."""
    vlm = make_vlm()
    rows = [prompt.row() for prompt in prompts(vlm, IMAGE, TEXT, TWO)]
    with Operations() as ran:
        collate(rows, [torch.randn(3, 3, 8, 8)])
        collate(rows, [torch.randn(3, 3, 8, 8)], pad="packed")
    assert ran.names <= {"randn", "unbind", "detach", "alias", "unsqueeze", "_to_copy", "lift_fresh"}
    with Operations() as ran:
        torch.zeros(2) + 1
    assert ran.names == {"zeros", "add"}


class Operations(TorchDispatchMode):
    """The names of the operations that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})
