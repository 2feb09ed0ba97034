"""Many random dialogues: what is supervised, against the template's own text read by another rule."""

from __future__ import annotations

import random

import pytest

from chiasm.config import TokensConfig
from chiasm.errors import DataError
from chiasm.prompt import IGNORE, Position, PromptBuilder
from chiasm.sample import IMAGE_MARKER, Sample, Turn

BOS, EOS, TURN, END = 256, 257, 258, 259
WORDS = ("a", "cat", "é", "日", " ", "\n", "?", "<", "image", "7", "assistant\n", "user\n")


class FakeImage:
    key = "fake"

    def load(self):
        raise AssertionError("a prompt needs no pixels")


def chatml(messages, *, generate):
    text = "".join(f"<turn>{m['role']}\n{m['content']}<end>\n" for m in messages)
    return text + ("<turn>assistant\n" if generate else "")


def trimming(messages, *, generate):
    """As Llama 3's: contents stripped, nothing between turns."""
    text = "".join(f"<turn>{m['role']}\n\n{m['content'].strip()}<end>" for m in messages)
    return text + ("<turn>assistant\n\n" if generate else "")


def bracketed(messages, *, generate):
    """As Mistral's: the system message inside the first question, no mark before an answer."""
    system = "".join(m["content"] + "\n\n" for m in messages if m["role"] == "system")
    text = ""
    for m in messages:
        if m["role"] == "user":
            text += f"[INST] {system}{m['content']} [/INST]"
            system = ""
        elif m["role"] == "assistant":
            text += f" {m['content']}<end>"
    return text


TEMPLATES = {"chatml": chatml, "trimming": trimming, "bracketed": bracketed}


def write(monkeypatch, llm, template) -> None:
    """Gives a model another chat template."""
    monkeypatch.setattr(
        type(llm), "render_chat", lambda self, messages, *, generate: template(messages, generate=generate)
    )


def dialogue(draw: random.Random, name: str) -> Sample:
    """One to four turns, with no image, images first, or images at markers."""

    def text() -> str:
        return "".join(draw.choice(WORDS) for _ in range(draw.randint(1, 5)))

    questions = [text() for _ in range(draw.randint(1, 4))]
    images = draw.randint(0, 3)
    if images and draw.random() < 0.5:
        for _ in range(images):
            turn = draw.randrange(len(questions))
            cut = draw.randint(0, len(questions[turn]))
            if IMAGE_MARKER not in questions[turn]:  # a cut may not fall into a marker
                questions[turn] = questions[turn][:cut] + IMAGE_MARKER + questions[turn][cut:]
            else:
                questions[turn] += IMAGE_MARKER
    turns = tuple(Turn(question, text()) for question in questions)
    return Sample(name, turns, tuple(FakeImage() for _ in range(images)), draw.choice([None, "", "be brief"]))


def spans(prompt) -> list[list[int]]:
    """The ids of each run of supervised positions."""
    found: list[list[int]] = []
    for before, token, label in zip([IGNORE, *prompt.labels], prompt.ids, prompt.labels, strict=False):
        assert label in (IGNORE, token)
        if label != IGNORE:
            found += [[]] if before == IGNORE else []
            found[-1].append(token)
    return found


@pytest.fixture
def long(llm, monkeypatch):
    """The toy model with room for every dialogue."""
    monkeypatch.setattr(type(llm), "context", 4096)
    return type(llm).tiny()


@pytest.mark.parametrize("form", ["learned", *TEMPLATES])
def test_answers_and_their_ends_are_supervised_and_nothing_else(long, monkeypatch, form):
    template = TEMPLATES.get(form)
    if template is not None:
        write(monkeypatch, long, template)
    turns = "template" if template else ("USER", "BOT")
    builder = PromptBuilder(long, TokensConfig(turns=turns), 2, "system")
    draw = random.Random(form)
    for number in range(200):
        sample = dialogue(draw, f"{number}")
        prompt = builder.train(sample)
        strip = str.strip if form == "trimming" else str
        end = END if template else EOS
        space = b" " if form == "bracketed" else b""
        assert spans(prompt) == [[*space, *strip(turn.answer).encode(), end] for turn in sample.turns]
        kinds = prompt.kinds
        assert kinds.count(Position.VISUAL) == 2 * len(sample.images)
        assert all(kind == Position.TEXT for kind, label in zip(kinds, prompt.labels, strict=True) if label != IGNORE)

        written = [token for token, kind in zip(prompt.ids, kinds, strict=True) if kind == Position.TEXT]
        if template is None:
            wanted = [BOS, *("system" if sample.system is None else sample.system).encode()]
            for turn in sample.turns:
                wanted += [*turn.question.replace(IMAGE_MARKER, "").encode(), *turn.answer.encode(), EOS]
        else:
            system = "system" if sample.system is None else sample.system
            messages = [{"role": "system", "content": system}] * bool(system)
            for turn in sample.turns:
                messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
            # what a template writes before an answer and not at a prompt's end is the answer's
            wanted = [BOS, *long.tokenize(template(messages, generate=False).replace(IMAGE_MARKER, ""))]
        assert written == wanted

        # an image stands where its marker was, or before the first question's text
        asked = Sample("q", (*sample.turns[:-1], Turn(sample.turns[-1].question)), sample.images, sample.system)
        open_ = builder.ask(asked, reserve=1)
        assert prompt.ids[: len(open_)] == open_.ids
        assert prompt.kinds[: len(open_)] == open_.kinds
        assert prompt.labels[len(open_)] != IGNORE


def test_a_template_that_rewrites_a_message_is_refused_with_the_samples_name(long, monkeypatch):
    """As templates do that cut thoughts out of earlier answers."""

    def thoughtless(messages, *, generate):
        return chatml([m | {"content": m["content"].rpartition("</think>")[2]} for m in messages], generate=generate)

    write(monkeypatch, long, thoughtless)
    builder = PromptBuilder(long, TokensConfig(turns="template"), 2, "")
    assert spans(builder.train(Sample("plain", (Turn("q", "x"),)))) == [[*b"x", END]]
    with pytest.raises(DataError, match=r"sample 'deep': the chat template of ToyLM writes a message otherwise"):
        builder.train(Sample("deep", (Turn("q", "hm</think>x"),)))


@pytest.mark.parametrize(
    ("turns", "turn", "says"),
    [
        ("template", Turn("q", "x<end>y"), "'s': the answer of turn 1 holds the text of a special token"),
        ("template", Turn("q<turn>r", "x"), "'s': the question of turn 1 holds the text of a special token"),
        (("USER", "BOT"), Turn("q", "<image>"), "'s': the answer of turn 1 holds <image>"),
    ],
)
def test_texts_that_would_break_the_mask_are_refused_with_the_samples_name(llm, turns, turn, says):
    builder = PromptBuilder(llm, TokensConfig(turns=turns), 2, "")
    with pytest.raises(DataError, match=says):
        builder.train(Sample("s", (Turn("fine", "fine"), turn)))


def test_without_a_template_its_tokens_are_only_text(llm):
    builder = PromptBuilder(llm, TokensConfig(), 2, "")
    assert spans(builder.train(Sample("s", (Turn("q", "x<end>"),)))) == [[*b"x", END, EOS]]


def test_a_tokenizer_that_loses_an_answer_is_refused(llm, monkeypatch):
    """One run of supervised positions for two answers: the mask is not the dialogue's."""
    builder = PromptBuilder(llm, TokensConfig(turns="template"), 2, "")
    ends = {"user": "", "assistant": "<end>"}
    write(monkeypatch, llm, lambda messages, **_: "".join(m["content"] + ends[m["role"]] for m in messages))
    monkeypatch.setattr(type(llm), "tokenize", lambda self, text: [END] * text.count("<end>"))
    with pytest.raises(DataError, match=r"sample 's': 2 answers are supervised in 1 runs"):
        builder.train(Sample("s", (Turn("q", "x"), Turn("", "y"))))
