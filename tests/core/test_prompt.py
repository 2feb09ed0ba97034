"""What a sample becomes: the order of a sequence, and exactly which positions are supervised."""

from __future__ import annotations

import pytest

from chiasm.config import TokensConfig
from chiasm.errors import ConfigError, DataError
from chiasm.prompt import IGNORE, LEARNED, Position, PromptBuilder
from chiasm.sample import Sample, Turn

SOI, EOI, USER, BOT = range(4)
BOS, EOS, TURN, END = 256, 257, 258, 259


class FakeImage:
    key = "fake"

    def load(self):
        raise AssertionError("a prompt needs no pixels")


def ids(text: str) -> list[int]:
    return list(text.encode())


def show(prompt) -> list:
    """The prompt as a readable list: bytes as ints, learned vectors by name, images as V."""
    kinds = {
        Position.TEXT: lambda i: i,
        Position.LEARNED: lambda i: LEARNED[i],
        Position.VISUAL: lambda i: "V",
    }
    return [kinds[kind](i) for i, kind in zip(prompt.ids, prompt.kinds, strict=True)]


def supervised(prompt) -> list[int]:
    return [label for label in prompt.labels if label != IGNORE]


def builder(llm, *, turns=("USER", "BOT"), image=("SOI", "EOI"), visual_tokens=2, system="s"):
    return PromptBuilder(llm, TokensConfig(turns=turns, image=image), visual_tokens, system)


def test_the_order_is_omnifusions_with_bos_and_eos(llm):
    sample = Sample("a", (Turn("q", "x"), Turn("r", "yz")), (FakeImage(),))
    prompt = builder(llm).train(sample)
    wanted = [BOS, *ids("s"), "SOI", "V", "V", "EOI", "USER", *ids("q"), "BOT", *ids("x"), EOS]
    wanted += ["USER", *ids("r"), "BOT", *ids("yz"), EOS]
    assert show(prompt) == wanted
    assert supervised(prompt) == [*ids("x"), EOS, *ids("yz"), EOS]
    for token, kind, label in zip(prompt.ids, prompt.kinds, prompt.labels, strict=True):
        assert label in (IGNORE, token)
        assert label == IGNORE or kind == Position.TEXT


def test_asking_stops_where_training_begins_the_answer(llm):
    sample = Sample("a", (Turn("q", "x"), Turn("r", "yz")), (FakeImage(),))
    trained = builder(llm).train(sample)
    asked = builder(llm).ask(Sample("a", (Turn("q", "x"), Turn("r")), (FakeImage(),)), reserve=4)
    assert show(asked) == show(trained)[: -len("yz") - 1]
    assert show(asked)[-1] == "BOT"


def test_markers_place_images_and_several_are_allowed(llm):
    sample = Sample("a", (Turn("a<image>b<image>", "x"),), (FakeImage(), FakeImage()))
    prompt = builder(llm, visual_tokens=1).train(sample)
    image = ["SOI", "V", "EOI"]
    assert show(prompt)[2:-2] == ["USER", *ids("a"), *image, *ids("b"), *image, "BOT"]
    assert ids("<") not in [[i] for i in prompt.ids]


def test_without_image_tokens_and_without_images(llm):
    bare = builder(llm, image=()).train(Sample("a", (Turn("q", "x"),), (FakeImage(),)))
    assert show(bare) == [BOS, *ids("s"), "V", "V", "USER", *ids("q"), "BOT", *ids("x"), EOS]
    text = builder(llm).train(Sample("a", (Turn("q", "x"),)))
    assert "V" not in show(text)
    assert "SOI" not in show(text)


def test_the_chat_template_is_split_at_its_own_structure(llm):
    sample = Sample("a", (Turn("q", "x"), Turn("r", "yz")), (FakeImage(),))
    prompt = builder(llm, turns="template").train(sample)
    head = [BOS, TURN, *ids("system\ns"), END, *ids("\n"), TURN, *ids("user\n"), "SOI", "V", "V", "EOI", *ids("q"), END]
    assert show(prompt)[: len(head)] == head
    assert supervised(prompt) == [*ids("x"), END, *ids("yz"), END]
    whole = llm.tokenize(
        llm.render_chat(
            [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "x"},
                {"role": "user", "content": "r"},
                {"role": "assistant", "content": "yz"},
            ],
            generate=False,
        )
    )
    assert [i for i in show(prompt) if isinstance(i, int)] == [BOS, *whole]


def test_the_template_asks_for_an_answer_without_supervising(llm):
    prompt = builder(llm, turns="template", system="").ask(Sample("a", (Turn("q"),)), reserve=4)
    assert show(prompt) == [BOS, TURN, *ids("user\nq"), END, *ids("\n"), TURN, *ids("assistant\n")]
    assert supervised(prompt) == []


@pytest.mark.parametrize(
    ("render", "says"),
    [
        (lambda messages: "".join(m["content"] + "\n" for m in messages), "could not learn to stop"),
        (lambda messages: "".join(m["content"] * 2 for m in messages), "2 times"),
        (lambda messages: "hello", "0 times"),
    ],
)
def test_templates_that_hide_the_answer_are_refused(llm, monkeypatch, render, says):
    monkeypatch.setattr(type(llm), "render_chat", lambda self, messages, *, generate: render(messages))
    with pytest.raises(ConfigError, match=says):
        builder(llm, turns="template").train(Sample("a", (Turn("q", "x"),)))


def test_samples_that_cannot_teach_are_named(llm):
    with pytest.raises(DataError, match="'long' is longer than the context of 64 positions before its first answer"):
        builder(llm).train(Sample("long", (Turn("q" * 80, "x"),)))
    with pytest.raises(DataError, match="'big' is longer than the context of 64 positions before its last image"):
        builder(llm, visual_tokens=70).train(Sample("big", (Turn("q", "x"),), (FakeImage(),)))
    with pytest.raises(DataError, match="'open': the last turn has no answer"):
        builder(llm).train(Sample("open", (Turn("q"),)))
    with pytest.raises(DataError, match="question 'ask' takes 54 positions and its answer up to 20"):
        builder(llm).ask(Sample("ask", (Turn("q" * 50),)), reserve=20)


def test_a_long_answer_is_cut_and_the_loss_is_reported(llm):
    prompt = builder(llm).train(Sample("a", (Turn("q", "x" * 100),)))
    assert len(prompt) == 64
    assert prompt.cut == 5 + 100 + 1 - 64
    assert prompt.supervised == 64 - 5


@pytest.mark.parametrize(
    ("turns", "images", "says"),
    [
        ((), 0, "has no turn"),
        ((Turn("q"), Turn("r")), 0, "turn 0 has no answer"),
        ((Turn("<image>q", "x"),), 2, "1 <image> markers and 2 images"),
        ((Turn("<image>q", "x"),), 0, "1 <image> markers and 0 images"),
    ],
)
def test_malformed_samples_are_refused(turns, images, says):
    with pytest.raises(DataError, match=says):
        Sample("bad", turns, tuple(FakeImage() for _ in range(images)))
