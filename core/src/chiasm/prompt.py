"""From a sample to one sequence of text, learned and visual positions, with its labels.

    BOS  system  SOI  visual tokens  EOI  (USER question  BOT answer  EOS)*         tokens.turns: [USER, BOT]
    the chat template, with SOI  visual tokens  EOI  at the images' place           tokens.turns: template

Answers and the token that ends them are supervised, nothing else. Each piece of text is tokenised on its own, so the
boundary between a prompt and its answer is the same in training and in generation: tokenised in one go, a tokenizer may
merge the template's last character with the answer's first, which no prompt that waits for its answer can hold. What
the pieces say together is checked to be what the template writes of the dialogue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from chiasm.config import TokensConfig
from chiasm.errors import ConfigError, DataError
from chiasm.llm import LanguageModel, Message
from chiasm.sample import IMAGE_MARKER, Sample, Turn, count_markers

IGNORE = -100
"""The label of positions that are not supervised; torch's own `ignore_index`."""

LEARNED = ("SOI", "EOI", "USER", "BOT", "SEP")
"""The learned vectors in the order of their rows; the last only where views are separated."""


def learned_vectors(tokens: TokensConfig) -> int:
    """How many of the learned vectors a model has: OmniFusion's four, and one between views where they have one."""
    return len(LEARNED) - (not tokens.views)


Views = Sequence[Sequence[int]]
"""For each image of a sample the visual tokens of each of its views."""


class Position(IntEnum):
    """What stands at a position of a sequence."""

    PAD = 0
    TEXT = 1
    LEARNED = 2
    VISUAL = 3


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """A finished prompt as one tensor, which is cheap to send between processes and to put into a batch.

    Args:
        sample_id: for messages.
        views: for each image the visual tokens of each of its views.
        values_3T: int32; ids, kinds and labels, as in `Prompt`.
        supervised: how many positions have a label.
        cut: positions that the context's length cost.
    """

    sample_id: str
    views: Views
    values_3T: Tensor
    supervised: int
    cut: int = 0

    def __len__(self) -> int:
        return self.values_3T.shape[1]

    def __reduce__(self) -> tuple[Any, ...]:
        # as an array: between processes a tensor takes a piece of shared memory of its own, and ten times as long
        return _row, (self.sample_id, self.views, self.values_3T.numpy(), self.supervised, self.cut)


def _row(sample_id: str, views: Views, values_3T: Any, supervised: int, cut: int) -> Row:
    return Row(sample_id, views, torch.from_numpy(values_3T), supervised, cut)


@dataclass(slots=True)
class Prompt:
    """One sequence: for each of T positions an id, what stands there, and a label.

    `ids` holds the token id at TEXT, the row of the vector at LEARNED, 0 elsewhere. `labels` holds the id to be
    predicted **at** that position (the shift is the loss's business) or `IGNORE`.
    """

    sample_id: str
    views: Views = ()
    """For each image the visual tokens of each of its views."""
    ids: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    images: int = 0
    """How many have their place already."""
    cut: int = 0
    """Positions that the context's length cost."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def supervised(self) -> int:
        """How many positions have a label."""
        return sum(label != IGNORE for label in self.labels)

    def row(self) -> Row:
        """The finished sequence as tensors."""
        values_3T = torch.tensor([self.ids, list(map(int, self.kinds)), self.labels], dtype=torch.int32)
        return Row(self.sample_id, self.views, values_3T, self.supervised, self.cut)

    def text(self, ids: Sequence[int], *, supervised: bool = False) -> None:
        """Appends text."""
        self._extend(ids, Position.TEXT, ids if supervised else None)

    def learned(self, *names: str) -> None:
        """Appends learned vectors by name."""
        self._extend([LEARNED.index(name) for name in names], Position.LEARNED)

    def image(self, tokens: TokensConfig) -> None:
        """Appends the place of the next image."""
        self.learned(*tokens.image[:1])
        for i, visual_tokens in enumerate(self.views[self.images]):
            if i:
                self.learned(*tokens.views)
            self._extend([0] * visual_tokens, Position.VISUAL)
        self.learned(*tokens.image[1:])
        self.images += 1

    def _extend(self, ids: Sequence[int], kind: Position, labels: Sequence[int] | None = None) -> None:
        self.ids += ids
        self.kinds += [kind] * len(ids)
        self.labels += labels if labels is not None else [IGNORE] * len(ids)


class PromptBuilder:
    """Writes samples as sequences for one model.

    Args:
        llm: the language model whose tokenizer and template are used; no weight of it is touched.
        tokens: which learned vectors stand where.
        visual_tokens: of an image with one view.
        system: text before the first turn.
    """

    def __init__(self, llm: LanguageModel, tokens: TokensConfig, visual_tokens: int, system: str) -> None:
        self.llm = llm
        self.tokens = tokens
        self.visual_tokens = visual_tokens
        self.system = system
        self._marks: set[int] | None = None

    def train(self, sample: Sample, views: Views | None = None) -> Prompt:
        """The whole dialogue with its labels, cut at the end where it exceeds the context.

        Args:
            sample: what is trained on.
            views: for each image the visual tokens of each of its views; None: one view each.

        Raises:
            DataError: a turn has no answer, nothing is supervised within the context, the template writes the dialogue
                otherwise, or a text holds what marks a turn's end; the message names the sample.
        """
        if sample.turns[-1].answer is None:
            raise DataError(f"sample {sample.id!r}: the last turn has no answer; training needs one")
        self._check_answers(sample)
        prompt = self._write(sample, views)
        _check_mask(prompt, sample)
        limit = self.llm.geometry.context_length
        cut_image = Position.VISUAL in prompt.kinds[limit:]
        prompt.cut = max(0, len(prompt) - limit)
        prompt.ids, prompt.kinds, prompt.labels = prompt.ids[:limit], prompt.kinds[:limit], prompt.labels[:limit]
        if prompt.supervised == 0 or cut_image:
            raise DataError(
                f"sample {sample.id!r} is longer than the context of {limit} positions before its "
                f"{'last image' if cut_image else 'first answer'} ends ({sample_size(sample)}); shorten it, or choose "
                "a longer context or fewer visual tokens"
            )
        return prompt

    def ask(self, sample: Sample, reserve: int, views: Views | None = None) -> Prompt:
        """The dialogue up to the place where the model answers its last turn.

        Args:
            sample: what is asked.
            reserve: positions to leave for the answer.
            views: as for `train`.

        Raises:
            DataError: the last turn has an answer, or the prompt and the answer exceed the context.
        """
        if sample.turns[-1].answer is not None:
            raise DataError(f"sample {sample.id!r}: the last turn has an answer already; leave it out to ask for one")
        prompt = self._write(sample, views)
        limit = self.llm.geometry.context_length
        if len(prompt) + reserve > limit:
            raise DataError(
                f"question {sample.id!r} takes {len(prompt)} positions and its answer up to {reserve}, "
                f"more than the context of {limit} ({sample_size(sample)})"
            )
        return prompt

    def _write(self, sample: Sample, views: Views | None) -> Prompt:
        prompt = Prompt(sample.id, [(self.visual_tokens,)] * len(sample.images) if views is None else views)
        assert len(prompt.views) == len(sample.images)
        bos = self.llm.bos_id
        if self.tokens.turns == "template":
            self._write_template(prompt, sample)
        else:
            if bos is not None:
                prompt.text([bos])
            self._write_learned(prompt, sample)
        assert prompt.images == len(sample.images)
        return prompt

    def _write_learned(self, prompt: Prompt, sample: Sample) -> None:
        system = self.system if sample.system is None else sample.system
        prompt.text(self._ids(system))
        if not count_markers(sample.turns):
            self._images(prompt, len(sample.images))
        for turn in sample.turns:
            prompt.learned("USER")
            self._content(prompt, turn.question)
            prompt.learned("BOT")
            if turn.answer is not None:
                prompt.text([*self._ids(turn.answer), self.llm.eos_id], supervised=True)

    def _write_template(self, prompt: Prompt, sample: Sample) -> None:
        pieces = self._template_pieces(sample)
        contents = self._rendered(sample, pieces)
        self._give_spaces(sample, pieces, contents)
        first_question = next(i for i, (role, _) in enumerate(contents) if role == "user")
        # a template may write BOS itself; one that does not leaves it to the tokenizer
        head = self._ids(pieces[0])
        if self.llm.bos_id is not None and head[:1] != [self.llm.bos_id]:
            head = [self.llm.bos_id, *head]
        prompt.text(head)
        for i, (role, content) in enumerate(contents):
            after = self._ids(pieces[i + 1])
            if role != "assistant":
                if i == first_question and not count_markers(sample.turns):
                    self._images(prompt, len(sample.images))
                self._content(prompt, content)
                prompt.text(after)
                continue
            end = next((k for k, token in enumerate(after) if token in self.llm.special_ids), None)
            if end is None:
                raise ConfigError(
                    f"the chat template of {type(self.llm).__name__} ends an answer with {pieces[i + 1]!r}, which "
                    "holds no special token, so the model could not learn to stop; set tokens.turns to [USER, BOT]"
                )
            prompt.text([*self._ids(content), *after[: end + 1]], supervised=True)
            prompt.text(after[end + 1 :])

    def _contents(self, sample: Sample) -> list[tuple[str, str]]:
        system = self.system if sample.system is None else sample.system
        contents = [("system", system.strip())] if system.strip() else []
        for turn in sample.turns:
            contents.append(("user", turn.question))
            if turn.answer is not None:
                contents.append(("assistant", turn.answer))
        return contents

    def _template_pieces(self, sample: Sample) -> list[str]:
        """What the template writes before, between and after the contents."""
        contents = self._contents(sample)
        # private-use characters: no template trims or escapes them, no tokenizer is asked to read them
        marks = [f"\ue000{i}\ue001" for i in range(len(contents))]
        messages = [Message(role=role, content=mark) for (role, _), mark in zip(contents, marks, strict=True)]  # type: ignore[typeddict-item]
        try:
            rest = self.llm.render_chat(messages, generate=sample.turns[-1].answer is None)
        except ValueError as error:
            raise ConfigError(f"sample {sample.id!r}: {error}; {_remedy(contents[0][0])}") from error
        pieces = []
        for mark, (role, _) in zip(marks, contents, strict=True):
            if rest.count(mark) != 1:
                raise ConfigError(
                    f"sample {sample.id!r}: the chat template of {type(self.llm).__name__} writes the {role} message "
                    f"{rest.count(mark)} times where it was to stand, so answers cannot be found; {_remedy(role)}"
                )
            before, rest = rest.split(mark)
            pieces.append(before)
        return [*pieces, rest]

    def _rendered(self, sample: Sample, pieces: Sequence[str]) -> list[tuple[str, str]]:
        """The contents as the template writes them, some of which strip white space.

        Raises:
            DataError: it writes them in yet another way, so the answers in its text are not the sample's.
        """
        contents = self._contents(sample)
        messages = [Message(role=role, content=text) for role, text in contents]  # type: ignore[typeddict-item]
        rendered = self.llm.render_chat(messages, generate=sample.turns[-1].answer is None)
        stripped = [(role, text.strip()) for role, text in contents]
        for written in (contents, stripped):
            text = pieces[0] + "".join(content + after for (_, content), after in zip(written, pieces[1:], strict=True))
            if text == rendered:
                return written
        place = next((i for i, (a, b) in enumerate(zip(text, rendered, strict=False)) if a != b), len(rendered))
        near = slice(max(0, place - 20), place + 40)
        raise DataError(
            f"sample {sample.id!r}: the chat template of {type(self.llm).__name__} writes a message otherwise than it "
            f"is: {rendered[near]!r} where {text[near]!r} was to be; change the sample, or set tokens.turns to [USER, "
            "BOT]"
        )

    def _give_spaces(self, sample: Sample, pieces: list[str], contents: list[tuple[str, str]]) -> None:
        """Moves white space that the template writes before an answer, and a prompt without its answer lacks, into it.

        Mistral's template does so: the model has to write that space itself.
        """
        for i, (role, content) in enumerate(contents):
            space = pieces[i][len(pieces[i].rstrip()) :]
            if role != "assistant" or not space:
                continue
            asked = [Message(role=role, content=f"\ue000{k}") for k, (role, _) in enumerate(contents[:i])]  # type: ignore[typeddict-item]
            prompt = self.llm.render_chat(asked, generate=True).rpartition("\ue000")[2].removeprefix(str(i - 1))
            if len(prompt) < len(pieces[i]) and pieces[i].startswith(prompt) and not pieces[i][len(prompt) :].strip():
                pieces[i], contents[i] = prompt, (role, pieces[i][len(prompt) :] + content)

    def _check_answers(self, sample: Sample) -> None:
        """Looks for text that would be read as the start of a sequence, the end of a turn, or an image.

        Raises:
            DataError: the sample's name and the turn.
        """
        template = self.tokens.turns == "template"
        ends = {self.llm.bos_id, self.llm.eos_id} | (self._turn_marks(sample) if template else set())
        for i, turn in enumerate(sample.turns):
            for what, text in (("question", turn.question), ("answer", turn.answer or "")):
                if not ends.isdisjoint(self._ids(text)):
                    raise DataError(
                        f"sample {sample.id!r}: the {what} of turn {i} holds the text of a special token, which would "
                        f"be read as the end of a turn: {text[:80]!r}; rewrite or leave out the sample"
                    )
            if IMAGE_MARKER in (turn.answer or ""):
                raise DataError(
                    f"sample {sample.id!r}: the answer of turn {i} holds {IMAGE_MARKER}, where no image can stand; "
                    "put the marker into a question"
                )

    def _turn_marks(self, sample: Sample) -> set[int]:
        """The special tokens that the chat template writes around messages."""
        if self._marks is None:
            probe = Sample(sample.id, (Turn("?", "!"),))
            ids = [token for piece in self._template_pieces(probe) for token in self._ids(piece)]
            self._marks = set(ids) & self.llm.special_ids
        return self._marks

    def _content(self, prompt: Prompt, text: str) -> None:
        """A question: its text, and an image at each marker."""
        pieces = text.split(IMAGE_MARKER)
        for i, piece in enumerate(pieces):
            prompt.text(self._ids(piece))
            if i < len(pieces) - 1:
                self._images(prompt, 1)

    def _images(self, prompt: Prompt, count: int) -> None:
        for _ in range(count):
            prompt.image(self.tokens)

    def _ids(self, text: str) -> list[int]:
        return self.llm.tokenize(text) if text else []


def _remedy(role: str) -> str:
    """What to do about a message of a role that a chat template does not take."""
    return ("set `system` to '', or " if role == "system" else "") + "set tokens.turns to [USER, BOT]"


def _check_mask(prompt: Prompt, sample: Sample) -> None:
    """Checks that each answer is one supervised run of text that is not empty, and that nothing else is supervised.

    Raises:
        DataError: the tokenizer or the template made it otherwise; the message names the sample.
    """
    known = [label != IGNORE for label in prompt.labels]
    runs = sum(now and not before for before, now in zip([False, *known], known, strict=False))
    text = all(kind == Position.TEXT for kind, on in zip(prompt.kinds, known, strict=True) if on)
    if runs != len(sample.turns) or not text:
        raise DataError(
            f"sample {sample.id!r}: {len(sample.turns)} answers are supervised in {runs} runs of positions; the "
            "language model's tokenizer and chat template disagree on where they stand"
        )


def sample_size(sample: Sample) -> str:
    """A sample's size in words, for messages."""
    characters = sum(len(turn.question) + len(turn.answer or "") for turn in sample.turns)
    return f"{len(sample.images)} images, {len(sample.turns)} turns, {characters} characters"
