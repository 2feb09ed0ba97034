"""What every language model promises of text: its tokenizer and its chat template."""

from __future__ import annotations

from chiasm.config import TokensConfig
from chiasm.errors import ChiasmError
from chiasm.llm import LanguageModel, Message
from chiasm.prompt import IGNORE, PromptBuilder
from chiasm.sample import Sample, Turn
from chiasm.testing.check import Check
from chiasm.testing.common import calling, make_tiny, require
from chiasm.testing.errors import ContractError

TEXTS = ("Yes", "a red square", "What colour is it?", "There are 12 of them, or 7.", "(B)", "no , it is not !")


def text(cls: type[LanguageModel]) -> None:
    """Text survives `tokenize` and `detokenize`; special ids are none of its tokens, and are left out of it."""
    llm = make_tiny(cls)
    vocabulary, special = llm.geometry.vocabulary, llm.special_ids
    require(llm.eos_id in special, f"special_ids {sorted(special)} lack eos_id {llm.eos_id}")
    require(llm.bos_id is None or llm.bos_id in special, f"special_ids {sorted(special)} lack bos_id {llm.bos_id}")
    for written in TEXTS:
        with calling(f"tokenize({written!r})"):
            ids = llm.tokenize(written)
        wrong = [i for i in ids if not (isinstance(i, int) and 0 <= i < vocabulary)]
        require(not wrong, f"tokenize({written!r}) gives {wrong[:3]}, wanted ints below the vocabulary, {vocabulary}")
        extra = [i for i in ids if i in special]
        require(not extra, f"tokenize({written!r}) adds the special ids {extra}; wanted the text alone, no BOS or EOS")
        with calling(f"detokenize({ids})"):
            back, ended = llm.detokenize(ids), llm.detokenize([*ids, llm.eos_id])
        require(back.strip() == written, f"{written!r} is {back!r} after tokenize and detokenize")
        require(ended.strip() == written, f"detokenize writes EOS into {ended!r}; wanted special tokens left out")
    _check_added(llm)
    with calling("tokenize('')"):
        nothing = llm.tokenize("")
    require(nothing == [], f"tokenize('') gives {nothing}, wanted no id")
    with calling("detokenize([]), an empty answer,"):
        silence = llm.detokenize([])
    require(silence == "", f"detokenize([]), an empty answer, gives {silence!r}, wanted no text")
    outside = [i for i in special if not 0 <= i < vocabulary]
    require(not outside, f"the special ids {outside} are not in the vocabulary of {vocabulary}")


def _check_added(llm: LanguageModel) -> None:
    """No id that stands for nothing is put before or behind every text."""
    rows = [llm.tokenize(written) for written in TEXTS]
    for name, end in (("before", 0), ("behind", -1)):
        ids = {row[end] for row in rows if row}
        rest = [row[1:] if end == 0 else row[:-1] for row in rows]
        if len(ids) == 1 and all(llm.detokenize(row).strip() == text for row, text in zip(rest, TEXTS, strict=True)):
            raise ContractError(
                f"tokenize adds the id {ids.pop()} {name} every text, which stands for none of it; wanted the text "
                "alone: the prompt's builder adds BOS and EOS"
            )


def chat(cls: type[LanguageModel]) -> None:
    """`render_chat` writes each message once and asks as it trains, or raises ValueError where there is no template."""
    llm = make_tiny(cls)
    messages = [
        Message(role="user", content="first question"),
        Message(role="assistant", content="first answer"),
        Message(role="user", content="second question"),
    ]
    if not llm.geometry.chat_template:
        try:
            llm.render_chat(messages, generate=True)
        except ValueError:
            return
        raise ContractError("spec states chat_template=False and render_chat works; wanted it to raise ValueError")
    with calling("render_chat"):
        rendered = llm.render_chat(messages, generate=True)
    places = [rendered.find(message["content"]) for message in messages]
    require(
        -1 not in places and places == sorted(places),
        f"render_chat does not write all contents in order: {rendered!r}",
    )
    _check_system(llm, messages)
    builder = PromptBuilder(llm, TokensConfig(turns="template"), visual_tokens=1, system="")
    try:
        asked = builder.ask(Sample("asked", (Turn("a", "b"), Turn("c"))), reserve=1)
        trained = builder.train(Sample("trained", (Turn("a", "b"), Turn("c", "d"))))
    except ChiasmError as error:
        raise ContractError(f"the chat template cannot be trained on: {error}") from error
    length = len(asked)
    require(
        trained.ids[:length] == asked.ids,
        f"the template leads to an answer with {llm.render_chat(messages, generate=True)!r} when it is asked for, and "
        f"otherwise in training: ids {asked.ids[-8:]} and {trained.ids[:length][-8:]}",
    )
    require(
        trained.labels[length] == trained.ids[length] != IGNORE,
        "the token behind the template's generation prompt is not the first of the answer",
    )


def _check_system(llm: LanguageModel, messages: list[Message]) -> None:
    """What the system says is written, or refused."""
    try:
        rendered = llm.render_chat([Message(role="system", content="be brief"), *messages], generate=True)
    except ValueError:
        return
    require(
        "be brief" in rendered,
        f"render_chat leaves out what the system says: {rendered!r}; write it, or raise ValueError if the model knows "
        "no such role",
    )


TEXT_CHECKS: tuple[Check, ...] = (text, chat)
