"""Every installed component keeps the contract of its kind, and the contracts of data sets and benchmarks are real.

The contracts of the core's own kinds are tried on deliberate faults in `core/test_testing_kit.py`.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import random
from functools import cached_property

import pytest
from PIL import Image
from pydantic import ConfigDict

from chiasm.errors import DataError, PluginError
from chiasm.registry import registry
from chiasm.sample import Sample, Turn
from chiasm.settings import Settings
from chiasm.testing import checks_of, run_check
from chiasm_experiments.interfaces import Benchmark, Dataset, Question, Score
from chiasm_experiments.testing import BENCHMARK_CHECKS, DATASET_CHECKS, BenchmarkContract, DatasetContract

OWN = {"config", "options", "missing_checkpoint", "light", "chat"}
"""What a published model changes in a family: its configuration and what it names."""


def installed() -> list:
    """Each check of each component that is installed, by name.

    A published model by name that has neither code nor a tiny instance of its own is checked for what is its own;
    `benchmarks/contract_faults.py` asks all of every component.
    """
    cases, seen = [], set()
    for item in registry().all():
        kind, name = item.component.kind, item.component.name
        try:
            checks = checks_of(kind)
        except PluginError:  # `test_every_kind_has_checks` tells
            continue
        if kind in ("encoder", "llm"):
            key = code_and_geometry(kind, name)
            checks = [check for check in checks if key not in seen or check.__name__ in OWN]
            seen.add(key)
        cases += [pytest.param(kind, name, check, id=f"{kind}-{name}-{check.__name__}") for check in checks]
    return cases


def code_and_geometry(kind: str, name: str) -> tuple:
    """What two components have in common that differ in their defaults alone."""
    try:
        cls = registry().load(kind, name)
        code = next(base for base in cls.__mro__ if any(map(inspect.isroutine, vars(base).values())))
        return code, repr(cls.tiny().geometry)
    except Exception:  # its checks tell
        return kind, name


@pytest.mark.parametrize(("kind", "name", "check"), installed())
def test_installed_component_keeps_its_contract(kind, name, check):
    result = run_check(check, registry().load(kind, name))
    assert result.passed, result.message


@pytest.mark.parametrize("kind", list(registry().kinds))
def test_every_kind_has_checks(kind):
    names = [check.__name__ for check in checks_of(kind)]
    assert names
    assert len(set(names)) == len(names)
    assert all(check.__doc__ for check in checks_of(kind))


def test_no_plugin_is_broken_and_no_name_has_two_owners():
    assert registry().broken == {}
    assert registry().duplicates() == {}


class Plain:
    """An image of one colour."""

    def __init__(self, colour: tuple[int, int, int], key: str | None = None) -> None:
        self.colour = colour
        self.key = str(colour) if key is None else key

    def load(self) -> Image.Image:
        return Image.new("RGB", (4, 4), self.colour)


class Grey(Plain):
    def load(self) -> Image.Image:
        return super().load().convert("L")


class Counted(Settings):
    size: int = 4


class GoodDataset(Dataset):
    """A colour each."""

    Config = Counted

    @classmethod
    def tiny(cls):
        return cls(cls.Config())

    def __len__(self):
        return self.config.size

    def __getitem__(self, index):
        return Sample(f"colour-{index}", (Turn("How red?", str(index)),), (self.image(index),))

    def image(self, index):
        return Plain((index, 0, 0))


class NoSamples(GoodDataset):
    def __len__(self):
        return 0


class OneId(GoodDataset):
    def __getitem__(self, index):
        return dataclasses.replace(super().__getitem__(index), id="colour")


class NoAnswer(GoodDataset):
    def __getitem__(self, index):
        return dataclasses.replace(super().__getitem__(index), turns=(Turn("How red?"),))


class Endless(GoodDataset):
    def __iter__(self):
        return (self[i] for i in range(len(self) + 1))


class RandomSamples(GoodDataset):
    def __getitem__(self, index):
        return dataclasses.replace(super().__getitem__(index), system=str(random.random()))


class OneAfterTheOther(GoodDataset):
    """The order of reading decides."""

    @cached_property
    def numbers(self):
        return itertools.count()

    def __getitem__(self, index):
        return dataclasses.replace(super().__getitem__(index), system=str(next(self.numbers)))


class OneKey(GoodDataset):
    def image(self, index):
        return Plain((index, 0, 0), key="the same")


class GreyImages(GoodDataset):
    def image(self, index):
        return Grey((index, 0, 0))


class Unhappy(GoodDataset):
    def check(self):
        raise DataError("the folder is missing")


class Open(Settings):
    model_config = ConfigDict(frozen=True, extra="allow")
    size: int = 4


class TakesAnyOption(GoodDataset):
    Config = Open


class GoodBenchmark(Benchmark):
    """One question about each colour."""

    Config = Counted
    split = "test"

    @classmethod
    def tiny(cls):
        return cls(cls.Config())

    def questions(self):
        return [self.question(i) for i in range(self.config.size)]

    def question(self, i):
        return Question(f"q{i}", "How red?", (str(i),), (Plain((i, 0, 0)),), f"c{i}", "colour", 0.25)

    def score(self, question, response):
        parsed = response.strip()
        return Score(float(parsed in question.references), parsed)


class NoQuestions(GoodBenchmark):
    def questions(self):
        return []


class ChanceInPercent(GoodBenchmark):
    def question(self, i):
        return dataclasses.replace(super().question(i), chance=25.0)


class NoReference(GoodBenchmark):
    def question(self, i):
        return dataclasses.replace(super().question(i), references=())


class MissingImage(GoodBenchmark):
    def question(self, i):
        return dataclasses.replace(super().question(i), text="<image> and <image>?")


class ClusterPerQuestion(GoodBenchmark):
    """Two questions about one image in two clusters."""

    def question(self, i):
        return dataclasses.replace(super().question(i), images=(Plain((0, 0, 0)),))


class RandomQuestions(GoodBenchmark):
    def question(self, i):
        return dataclasses.replace(super().question(i), text=f"How red? {random.random()}")


class OneQuestionId(GoodBenchmark):
    def question(self, i):
        return dataclasses.replace(super().question(i), id="q")


class RefusesItsReference(GoodBenchmark):
    def score(self, question, response):
        return super().score(question, response + ".")


class AcceptsAnything(GoodBenchmark):
    """Finds any reference in an empty response."""

    def score(self, question, response):
        return Score(float(any(response.strip() in reference for reference in question.references)), response)


class Percent(GoodBenchmark):
    def score(self, question, response):
        score = super().score(question, response)
        return Score(0.5 if score.value else 50.0, score.parsed)


class ZeroForNotScored(GoodBenchmark):
    def score(self, question, response):
        return Score(0.0, None, "not_scored")


class CrashesOnNothing(GoodBenchmark):
    def score(self, question, response):
        return super().score(question, response.split()[0])


GOOD = {"dataset": GoodDataset, "benchmark": GoodBenchmark}
CHECKS = {"dataset": DATASET_CHECKS, "benchmark": BENCHMARK_CHECKS}

FAULTS = [
    ("dataset", NoSamples, "samples", r"tiny\(\) holds no sample"),
    ("dataset", OneId, "samples", "two samples have the id 'colour'"),
    ("dataset", NoAnswer, "samples", "has no last answer to train on"),
    ("dataset", Endless, "samples", r"iterating gives 5 samples, len\(\) is 4"),
    ("dataset", RandomSamples, "same_samples", "read again in another order it is"),
    ("dataset", OneAfterTheOther, "same_samples", "read again in another order it is"),
    ("dataset", OneKey, "sample_images", "features are shared by key"),
    ("dataset", GreyImages, "sample_images", "loads as L, wanted RGB"),
    ("dataset", Unhappy, "passes_its_own_check", "raised DataError: the folder is missing"),
    ("dataset", TakesAnyOption, "config", "a misspelt option would be ignored"),
    ("benchmark", NoQuestions, "questions", "asks no question"),
    ("benchmark", ChanceInPercent, "questions", r"chance = 25\.0, wanted \[0, 1\]"),
    ("benchmark", NoReference, "questions", "'q0' has no reference"),
    ("benchmark", MissingImage, "questions", "cannot be asked: .* 2 <image> markers and 1 images"),
    ("benchmark", ClusterPerQuestion, "questions", "intervals would be too narrow"),
    ("benchmark", RandomQuestions, "same_questions", "asked for again it is"),
    ("benchmark", OneQuestionId, "questions", "two questions have the id 'q'"),
    ("benchmark", RefusesItsReference, "scores", "its own references score {'0': 0.0}, wanted the best 1.0"),
    ("benchmark", AcceptsAnything, "scores", "the response '' scores .* wanted less than 1"),
    ("benchmark", Percent, "scores", "its own references score {'0': 0.5}, wanted the best 1.0"),
    ("benchmark", ZeroForNotScored, "scores", "what is not scored has no value"),
    ("benchmark", CrashesOnNothing, "scores", "score of '' raised IndexError"),
]


@pytest.mark.parametrize("kind", GOOD)
def test_a_correct_component_passes_every_check(kind):
    results = [run_check(check, GOOD[kind]) for check in CHECKS[kind]]
    assert {result.name: result.message for result in results if not result.passed} == {}


@pytest.mark.parametrize(
    ("kind", "cls", "name", "message"), FAULTS, ids=[f"{cls.__name__}-{name}" for _, cls, name, _ in FAULTS]
)
def test_a_fault_is_caught_and_named(kind, cls, name, message):
    check = next(check for check in CHECKS[kind] if check.__name__ == name)
    result = run_check(check, cls)
    assert not result.passed
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        raise AssertionError(result.message)


class TestDataset(DatasetContract):
    component_class = GoodDataset


class TestBenchmark(BenchmarkContract):
    component_class = GoodBenchmark
