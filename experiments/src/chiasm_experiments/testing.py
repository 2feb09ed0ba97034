"""What every data set and every benchmark promises, and the pytest classes that test it.

    class TestMine(DatasetContract):
        component_class = Mine

Both need no pytest to run: `chiasm check dataset NAME`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from PIL import Image

from chiasm.errors import ChiasmError, DataError
from chiasm.sample import ImageSource, Sample, Turn
from chiasm.settings import Settings
from chiasm.testing.check import Check, describe
from chiasm.testing.common import calling, check_config, check_quick, make_tiny, require
from chiasm.testing.errors import ContractError
from chiasm.testing.plugin_checks import light
from chiasm.testing.process import random_numbers_kept, seed_all
from chiasm.testing.spec_checks import variants
from chiasm.testing.suites import Contract
from chiasm_experiments.elsewhere import facts_elsewhere, question_facts, sample_facts
from chiasm_experiments.interfaces import Benchmark, Dataset, Question, Score

MANY = 64
"""Samples or questions that are looked at."""

MOST_VARIANTS, FEW = 6, 8
"""Changed settings that are tried, and the images of each that are looked at."""

NONSENSE = ("", "\n", "xyzzy plugh 4711", "-7.5e3", "Ünïcödé ✓ 漢字", "I am sorry, I cannot see the image. " * 20)
"""Responses that answer nothing."""


def tiny(cls: Any) -> None:
    """`tiny()` gives a small instance at once."""
    check_quick(cls)


def config(cls: Any) -> None:
    """`Config` is frozen, refuses unknown fields, and survives JSON."""
    check_config(cls, Settings, make_tiny(cls).config)


def passes_its_own_check(cls: Any) -> None:
    """`check()` of a tiny instance finds nothing wrong."""
    made = make_tiny(cls)
    with calling("check() of tiny()"):
        made.check()


def missing_files(cls: Any) -> None:
    """Nothing is read before `check`, which refuses a file or folder that does not exist, by name."""
    made = make_tiny(cls)
    given = made.config.model_dump()
    for name in [name for name, value in given.items() if isinstance(value, Path)]:
        absent = given[name].parent / "no-such-file"
        with calling(f"{cls.__name__}(config) with a {name} that does not exist; nothing is read before check():"):
            other = cls(cls.Config.model_validate(given | {name: absent}))
        try:
            other.check()
        except DataError as error:
            require(absent.name in str(error), f"check() does not name the {name} that is missing: {error}")
            continue
        except Exception as error:
            raise ContractError(
                f"check() with a {name} that does not exist raised {describe(error)}; wanted a DataError that names it"
            ) from error
        raise ContractError(
            f"check() accepts a {name} that does not exist, so a run would find out in the middle; look for it there"
        )


def samples(cls: type[Dataset]) -> None:
    """There is a sample, each can be trained on, and ids are unique."""
    dataset = make_tiny(cls)
    with calling("len()"):
        length = len(dataset)
    require(length > 0, "tiny() holds no sample")
    found = _samples(dataset)
    for i, sample in enumerate(found):
        require(isinstance(sample, Sample), f"sample {i} is a {type(sample).__name__}, wanted a chiasm.Sample")
        name = f"sample {i} ({sample.id!r})"
        require(isinstance(sample.id, str) and bool(sample.id), f"{name} has the id {sample.id!r}, wanted a string")
        require(sample.turns[-1].answer is not None, f"{name} has no last answer to train on")
        blank = [i for i, turn in enumerate(sample.turns) if not (turn.answer or "").strip()]
        require(not blank, f"{name} has a blank answer in turn {blank[:1]}: a model would learn to say nothing")
    with calling("iterating"):
        whole = list(dataset)
    require(len(whole) == length, f"iterating gives {len(whole)} samples, len() is {length}")
    _unique([sample.id for sample in whole], "sample")
    with calling("reading a sample a second time"):
        _equal(
            [sample_facts(dataset[i]) for i in range(len(found))],
            [sample_facts(sample) for sample in whole[: len(found)]],
            "sample",
            "when iterated over, in the same order,",
        )


def identity(cls: type[Dataset]) -> None:
    """`identity` is equal for equal samples, and another where a setting changes them."""
    dataset = make_tiny(cls)
    with calling("identity()"):
        own, again = dataset.identity(), cls(dataset.config).identity()
    require(isinstance(own, str) and bool(own), f"identity() is {own!r}, wanted a string")
    require(
        own == again,
        f"identity() is {own!r}, of another instance with the same settings {again!r}: no result could be shared",
    )
    facts = [sample_facts(sample) for sample in _samples(dataset)]
    for name, other in _others(dataset):
        try:
            changed, stated = [sample_facts(sample) for sample in _samples(other)], other.identity()
        except (ChiasmError, ContractError):
            continue  # an arbitrary value need not work
        require(
            changed == facts or stated != own,
            f"with {name} samples are others and identity() is the same, {own!r}: a stage would take the result of "
            "another data set; hold every setting in it",
        )


def alone(cls: Any) -> None:
    """Reading and scoring draw no random number that others draw from, and seed none."""
    made = make_tiny(cls)
    _read(made)  # the first time may import what draws numbers of its own
    with random_numbers_kept("reading it"):
        _read(made)


def elsewhere(cls: Any) -> None:
    """Another process, which hashes strings otherwise, gives the same samples or questions."""
    made = make_tiny(cls)
    here = facts_elsewhere(cls, made.config)
    if here is None:
        return
    kind = "sample" if isinstance(made, Dataset) else "question"
    if isinstance(made, Dataset):
        facts = [repr(sample_facts(sample)) for sample in _samples(made)]
    else:
        facts = [repr(question_facts(question)) for question in _questions(made)]
    how = "in another process (does hash(), the order of a set, the clock or a process id decide?)"
    _equal(facts, here[0][: len(facts)], kind, how)
    if kind == "sample":
        require(made.identity() == here[1], f"identity() is {made.identity()!r}, {how} it is {here[1]!r}")


def same_samples(cls: type[Dataset]) -> None:
    """Sample i is the same each time, in another instance and whatever random numbers were drawn before."""
    dataset = make_tiny(cls)
    first = [sample_facts(sample) for sample in _samples(dataset)]
    seed_all(5)
    # backwards, so that samples that are drawn one after the other differ
    with calling("reading a sample a second time"):
        again = [sample_facts(dataset[i]) for i in reversed(range(len(first)))][::-1]
    _equal(first, again, "sample", "read again in another order")
    other = cls(dataset.config)
    require(
        other.config == dataset.config,
        f"{cls.__name__}(config) has the settings {other.config!r}, given {dataset.config!r}",
    )
    _equal(first, [sample_facts(sample) for sample in _samples(other)], "sample", "of another instance")


def sample_images(cls: type[Dataset]) -> None:
    """Images load upright in RGB, and equal keys have equal pixels."""
    dataset = make_tiny(cls)
    pixels: dict[str, str] = {}
    _check_images([(sample.id, sample.images) for sample in _samples(dataset)], pixels)
    for name, other in _others(dataset):  # kept features are shared by key between data sets
        try:
            few = [other[i] for i in range(min(FEW, len(other)))]
        except Exception:  # an arbitrary value need not work
            continue
        _check_images([(f"{sample.id} with {name}", sample.images) for sample in few], pixels)


def questions(cls: type[Benchmark]) -> None:
    """There is a question, each is complete, ids are unique, and questions about one image share a cluster."""
    benchmark = make_tiny(cls)
    with calling("questions()"):
        given = benchmark.questions()
    require(
        isinstance(given, Sequence), f"questions() returned a {type(given).__name__}, wanted a sequence, say a list"
    )
    found = _questions(benchmark)
    require(len(found) > 0, "tiny() asks no question")
    require(bool(benchmark.split), "split is empty; say which part of the benchmark is asked")
    require(benchmark.max_new_tokens > 0, f"max_new_tokens is {benchmark.max_new_tokens}")
    clusters: dict[str, str] = {}
    for question in found:
        name = f"question {question.id!r}"
        require(isinstance(question, Question), f"questions() gives a {type(question).__name__}, wanted a Question")
        require(isinstance(question.id, str) and bool(question.id), f"{name} has an id that is no string")
        require(bool(question.references), f"{name} has no reference")
        words = question.references
        written = not isinstance(words, str) and all(isinstance(word, str) and word.strip() for word in words)
        require(written, f"{name} has the references {words!r}, wanted a tuple of strings, none of them blank")
        fewest = min(len(word.split()) for word in words)
        require(
            fewest <= benchmark.max_new_tokens,
            f"{name} has references of {fewest} words and more, and max_new_tokens is {benchmark.max_new_tokens}: no "
            "model could give one",
        )
        strings = all(isinstance(text, str) for pair in question.metadata.items() for text in pair)
        require(strings, f"{name} has the metadata {question.metadata!r}, wanted strings only: tables hold them")
        require(0 <= question.chance <= 1, f"{name} states chance = {question.chance}, wanted [0, 1]")
        require(
            bool(question.cluster and question.skill and question.text.strip()),
            f"{name} lacks a cluster, skill or text",
        )
        try:
            Sample(question.id, (Turn(question.text),), question.images)
        except ChiasmError as error:
            raise ContractError(f"{name} cannot be asked: {error}") from error
        for image in question.images:
            cluster = clusters.setdefault(image.key, question.cluster)
            require(
                cluster == question.cluster,
                f"{name} is in cluster {question.cluster!r}, another one about the same image in {cluster!r}: "
                "intervals would be too narrow",
            )
    _unique([question.id for question in found], "question")


def same_questions(cls: type[Benchmark]) -> None:
    """The questions are the same each time, in another instance and whatever random numbers were drawn before."""
    benchmark = make_tiny(cls)
    first = [question_facts(question) for question in _questions(benchmark)]
    seed_all(5)
    _equal(first, [question_facts(q) for q in _questions(benchmark)], "question", "asked for again")
    _equal(first, [question_facts(q) for q in _questions(cls(benchmark.config))], "question", "of another instance")


def question_images(cls: type[Benchmark]) -> None:
    """Images load upright in RGB, and equal keys have equal pixels."""
    _check_images([(question.id, question.images) for question in _questions(make_tiny(cls))], {})


def scores(cls: type[Benchmark]) -> None:
    """The best reference scores 1, nonsense less or nothing, and what has no score has no value."""
    benchmark = make_tiny(cls)
    for question in _questions(benchmark):
        found = {reference: _score(benchmark, question, reference) for reference in question.references}
        values = {reference: score.value for reference, score in found.items() if score.value is not None}
        # where annotators disagree a reference may be worth part of a point, but never nothing
        require(
            not values or (max(values.values()) == 1 and 0 not in values.values()),
            f"question {question.id!r}: its own references score {values}, wanted the best 1.0 and none 0",
        )
        for response in NONSENSE:
            score = _score(benchmark, question, response)
            require(
                score.value is None or score.value < 1,
                f"question {question.id!r}: the response {response[:40]!r} scores {score}, wanted less than 1",
            )
    _check_wrong(benchmark)


def _check_wrong(benchmark: Benchmark) -> None:
    """Some right answer to one question is a wrong one to another."""
    questions = _questions(benchmark)
    right = []
    for question in questions:
        own = {reference.casefold() for reference in question.references}
        for other in questions:
            wrong = [reference for reference in other.references if reference.casefold() not in own]
            for reference in wrong[:1]:
                value = _score(benchmark, question, reference).value
                if value is None or value < 1:
                    return
                right.append((question, reference))
    if right:
        question, reference = right[0]
        raise ContractError(
            f"question {question.id!r} with the references {question.references}: {reference!r}, the answer to another "
            "question, scores 1, as all those of others do: compare the response with the question's own references"
        )


def _samples(dataset: Dataset) -> list[Sample]:
    with calling("reading samples"):
        return [dataset[i] for i in range(min(len(dataset), MANY))]


def _questions(benchmark: Benchmark) -> list[Question]:
    with calling("questions()"):
        return list(benchmark.questions())[:MANY]


def _score(benchmark: Benchmark, question: Question, response: str) -> Score:
    with calling(f"score of {response[:40]!r}"):
        score, again = benchmark.score(question, response), benchmark.score(question, response)
    name = f"question {question.id!r}: score of {response[:40]!r}"
    require(isinstance(score, Score), f"{name} is a {type(score).__name__}, wanted a Score")
    require(score == again, f"{name} is {score}, and then {again}: wanted the same")
    statuses = get_args(Score.__annotations__["status"]) or ("scored", "unparsed", "not_scored")
    require(score.status in statuses, f"{name} has the status {score.status!r}, wanted one of {', '.join(statuses)}")
    if score.status == "not_scored":
        require(score.value is None, f"{name} is {score}: what is not scored has no value")
    else:
        plain = isinstance(score.value, int | float)
        require(plain, f"{name} has the value {score.value!r} of type {type(score.value).__name__}, wanted a float")
        require(score.value is not None and 0 <= score.value <= 1, f"{name} is {score}, wanted a value in [0, 1]")
    return score


def _read(made: Any) -> None:
    """Reads all that there is, and scores what can be scored."""
    if isinstance(made, Dataset):
        for sample in _samples(made):
            _ = [image.load() for image in sample.images]
        return
    for question in _questions(made)[:FEW]:
        _ = [image.load() for image in question.images]
        _score(made, question, question.references[0])


def _others(dataset: Dataset) -> list[tuple[str, Dataset]]:
    """The data set with one setting changed, by the setting."""
    changed = list(variants(dataset.config))[:MOST_VARIANTS]
    return [(f"{name} = {value!r}", type(dataset)(config)) for name, value, _, config in changed]


def _equal(first: list[Any], again: list[Any], what: str, how: str) -> None:
    require(len(first) == len(again), f"{len(first)} {what}s, {len(again)} {how}")
    for i, (one, other) in enumerate(zip(first, again, strict=True)):
        require(one == other, f"{what} {i} is {one}, {how} it is {other}")


def _unique(ids: list[str], what: str) -> None:
    seen: set[str] = set()
    for name in ids:
        require(name not in seen, f"two {what}s have the id {name!r}")
        seen.add(name)


def _check_images(items: list[tuple[str, tuple[ImageSource, ...]]], pixels: dict[str, str]) -> None:
    """Args: the images of each item by its name, and the contents that are known by their keys."""
    for name, images in items:
        for source in images:
            with calling(f"loading an image of {name!r}"):
                key, image, again = source.key, source.load(), source.load()
            require(isinstance(key, str) and bool(key), f"the key of an image of {name!r} is {key!r}, wanted a string")
            require(
                isinstance(image, Image.Image) and image.mode == "RGB",
                f"an image of {name!r} loads as {getattr(image, 'mode', type(image).__name__)}, wanted RGB",
            )
            require(key == source.key, f"the key of an image of {name!r} changes")
            require(
                image.size == again.size and image.tobytes() == again.tobytes(),
                f"an image of {name!r} loads with other pixels the second time: features are kept by its key",
            )
            content = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
            require(
                pixels.setdefault(key, content) == content,
                f"an image of {name!r} has other pixels than one with the same key {key!r}: features are shared by key",
            )


DATASET_CHECKS: tuple[Check, ...] = (
    tiny,
    config,
    passes_its_own_check,
    missing_files,
    samples,
    same_samples,
    sample_images,
    identity,
    alone,
    elsewhere,
    light,
)
BENCHMARK_CHECKS: tuple[Check, ...] = (
    tiny,
    config,
    passes_its_own_check,
    missing_files,
    questions,
    same_questions,
    question_images,
    scores,
    alone,
    elsewhere,
    light,
)


class DatasetContract(Contract):
    """What every data set promises."""

    checks = DATASET_CHECKS


class BenchmarkContract(Contract):
    """What every benchmark promises."""

    checks = BENCHMARK_CHECKS
