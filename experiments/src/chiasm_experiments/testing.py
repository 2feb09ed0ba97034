"""What every data set and every benchmark promises, and the pytest classes that test it.

    class TestMine(DatasetContract):
        component_class = Mine

Both need no pytest to run: `chiasm check dataset NAME`.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from PIL import Image

from chiasm.errors import ChiasmError
from chiasm.sample import ImageSource, Sample, Turn
from chiasm.settings import Settings
from chiasm.testing.check import Check
from chiasm.testing.common import calling, check_config, check_quick, make_tiny, require
from chiasm.testing.errors import ContractError
from chiasm.testing.plugin_checks import light
from chiasm.testing.suites import Contract
from chiasm_experiments.interfaces import Benchmark, Dataset, Question, Score

MANY = 64
"""Samples or questions that are looked at."""

NONSENSE = ("", "\n", "xyzzy plugh 4711", "I am sorry, I cannot see the image. " * 20)
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


def samples(cls: type[Dataset]) -> None:
    """There is a sample, each can be trained on, and ids are unique."""
    dataset = make_tiny(cls)
    with calling("len()"):
        length = len(dataset)
    require(length > 0, "tiny() holds no sample")
    found = _samples(dataset)
    for i, sample in enumerate(found):
        require(isinstance(sample, Sample), f"sample {i} is a {type(sample).__name__}, wanted a chiasm.Sample")
        require(sample.turns[-1].answer is not None, f"sample {i} ({sample.id!r}) has no last answer to train on")
    _unique([sample.id for sample in found], "sample")
    whole = sum(1 for _ in dataset)
    require(whole == length, f"iterating gives {whole} samples, len() is {length}")


def same_samples(cls: type[Dataset]) -> None:
    """Sample i is the same each time, in another instance and whatever random numbers were drawn before."""
    dataset = make_tiny(cls)
    first = [_facts(sample) for sample in _samples(dataset)]
    _disturb()
    # backwards, so that samples that are drawn one after the other differ
    again = [_facts(dataset[i]) for i in reversed(range(len(first)))][::-1]
    _equal(first, again, "sample", "read again in another order")
    _equal(first, [_facts(sample) for sample in _samples(cls(dataset.config))], "sample", "of another instance")


def sample_images(cls: type[Dataset]) -> None:
    """Images load upright in RGB, and equal keys have equal pixels."""
    _check_images([(sample.id, sample.images) for sample in _samples(make_tiny(cls))])


def questions(cls: type[Benchmark]) -> None:
    """There is a question, each is complete, ids are unique, and questions about one image share a cluster."""
    benchmark = make_tiny(cls)
    found = _questions(benchmark)
    require(len(found) > 0, "tiny() asks no question")
    require(bool(benchmark.split), "split is empty; say which part of the benchmark is asked")
    require(benchmark.max_new_tokens > 0, f"max_new_tokens is {benchmark.max_new_tokens}")
    clusters: dict[tuple[str, ...], str] = {}
    for question in found:
        name = f"question {question.id!r}"
        require(isinstance(question, Question), f"questions() gives a {type(question).__name__}, wanted a Question")
        require(bool(question.references), f"{name} has no reference")
        require(0 <= question.chance <= 1, f"{name} states chance = {question.chance}, wanted [0, 1]")
        require(bool(question.cluster and question.skill and question.text), f"{name} lacks a cluster, skill or text")
        try:
            Sample(question.id, (Turn(question.text),), question.images)
        except ChiasmError as error:
            raise ContractError(f"{name} cannot be asked: {error}") from error
        keys = tuple(image.key for image in question.images)
        cluster = clusters.setdefault(keys, question.cluster) if keys else question.cluster
        require(
            cluster == question.cluster,
            f"{name} is in cluster {question.cluster!r}, another one about the same image in {cluster!r}: intervals "
            "would be too narrow",
        )
    _unique([question.id for question in found], "question")


def same_questions(cls: type[Benchmark]) -> None:
    """The questions are the same each time, in another instance and whatever random numbers were drawn before."""
    benchmark = make_tiny(cls)
    first = [_question_facts(question) for question in _questions(benchmark)]
    _disturb()
    _equal(first, [_question_facts(q) for q in _questions(benchmark)], "question", "asked for again")
    _equal(first, [_question_facts(q) for q in _questions(cls(benchmark.config))], "question", "of another instance")


def question_images(cls: type[Benchmark]) -> None:
    """Images load upright in RGB, and equal keys have equal pixels."""
    _check_images([(question.id, question.images) for question in _questions(make_tiny(cls))])


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
    if score.status == "not_scored":
        require(score.value is None, f"{name} is {score}: what is not scored has no value")
    else:
        require(score.value is not None and 0 <= score.value <= 1, f"{name} is {score}, wanted a value in [0, 1]")
    return score


def _facts(sample: Sample) -> tuple[Any, ...]:
    return sample.id, sample.turns, sample.system, [image.key for image in sample.images]


def _question_facts(question: Question) -> tuple[Any, ...]:
    keys = [image.key for image in question.images]
    return (
        question.id,
        question.text,
        question.references,
        keys,
        question.cluster,
        question.skill,
        question.chance,
        question.metadata,
    )


def _disturb() -> None:
    """Draws from the global generators, which samples must not depend on."""
    torch.rand(3)
    np.random.random(3)


def _equal(first: list[Any], again: list[Any], what: str, how: str) -> None:
    require(len(first) == len(again), f"{len(first)} {what}s, {len(again)} {how}")
    for i, (one, other) in enumerate(zip(first, again, strict=True)):
        require(one == other, f"{what} {i} is {one}, {how} it is {other}")


def _unique(ids: list[str], what: str) -> None:
    seen: set[str] = set()
    for name in ids:
        require(name not in seen, f"two {what}s have the id {name!r}")
        seen.add(name)


def _check_images(items: list[tuple[str, tuple[ImageSource, ...]]]) -> None:
    pixels: dict[str, str] = {}
    for name, images in items:
        for source in images:
            with calling(f"loading an image of {name!r}"):
                key, image = source.key, source.load()
            require(
                isinstance(image, Image.Image) and image.mode == "RGB",
                f"an image of {name!r} loads as {getattr(image, 'mode', type(image).__name__)}, wanted RGB",
            )
            require(key == source.key, f"the key of an image of {name!r} changes")
            content = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
            require(
                pixels.setdefault(key, content) == content,
                f"an image of {name!r} has other pixels than one with the same key {key!r}: features are shared by key",
            )


DATASET_CHECKS: tuple[Check, ...] = (
    tiny,
    config,
    passes_its_own_check,
    samples,
    same_samples,
    sample_images,
    light,
)
BENCHMARK_CHECKS: tuple[Check, ...] = (
    tiny,
    config,
    passes_its_own_check,
    questions,
    same_questions,
    question_images,
    scores,
    light,
)


class DatasetContract(Contract):
    """What every data set promises."""

    checks = DATASET_CHECKS


class BenchmarkContract(Contract):
    """What every benchmark promises."""

    checks = BENCHMARK_CHECKS
