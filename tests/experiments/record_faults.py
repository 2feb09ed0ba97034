"""Data sets and benchmarks: correct ones, and deliberately wrong ones with one fault each."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import random
import socket
import tempfile
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import ConfigDict

from chiasm.errors import DataError
from chiasm.sample import Sample, Turn
from chiasm.settings import FilePath, Settings
from chiasm_experiments.interfaces import Benchmark, Dataset, Question, Score
from fault_record import Fault, Recorder

dataset, benchmark = Recorder("dataset"), Recorder("benchmark")


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


@dataset.correct
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


@dataset("samples", r"tiny\(\) holds no sample")
class NoSamples(GoodDataset):
    """Holds no sample."""

    def __len__(self):
        return 0


@dataset("samples", "two samples have the id 'colour'")
class OneId(GoodDataset):
    """One id for all."""

    def __getitem__(self, index):
        return dataclasses.replace(super().__getitem__(index), id="colour")


@dataset("samples", "has no last answer to train on")
class NoAnswer(GoodDataset):
    """Nothing to train on."""

    def __getitem__(self, index):
        return dataclasses.replace(super().__getitem__(index), turns=(Turn("How red?"),))


@dataset("samples", r"iterating gives 5 samples, len\(\) is 4")
class Endless(GoodDataset):
    """Iterates past its end."""

    def __iter__(self):
        return (self[i] for i in range(len(self) + 1))


@dataset("same_samples", "read again in another order it is")
class RandomSamples(GoodDataset):
    """Another system prompt each time."""

    def __getitem__(self, index):
        return dataclasses.replace(super().__getitem__(index), system=str(random.random()))


@dataset("same_samples", "read again in another order it is")
class OneAfterTheOther(GoodDataset):
    """The order of reading decides."""

    @cached_property
    def numbers(self):
        return itertools.count()

    def __getitem__(self, index):
        return dataclasses.replace(super().__getitem__(index), system=str(next(self.numbers)))


@dataset("sample_images", "features are shared by key")
class OneKey(GoodDataset):
    """One key for all images."""

    def image(self, index):
        return Plain((index, 0, 0), key="the same")


@dataset("sample_images", "loads as L, wanted RGB")
class GreyImages(GoodDataset):
    """Grey images."""

    def image(self, index):
        return Grey((index, 0, 0))


@dataset("passes_its_own_check", "raised DataError: the folder is missing")
class Unhappy(GoodDataset):
    """Its tiny instance does not pass its own check."""

    def check(self):
        raise DataError("the folder is missing")


class Open(Settings):
    model_config = ConfigDict(frozen=True, extra="allow")
    size: int = 4


@dataset("config", "a misspelt option would be ignored")
class TakesAnyOption(GoodDataset):
    """Takes misspelt options."""

    Config = Open


@benchmark.correct
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


@benchmark("questions", "asks no question")
class NoQuestions(GoodBenchmark):
    """Asks nothing."""

    def questions(self):
        return []


@benchmark("questions", r"chance = 25\.0, wanted \[0, 1\]")
class ChanceInPercent(GoodBenchmark):
    """Chance in percent."""

    def question(self, i):
        return dataclasses.replace(super().question(i), chance=25.0)


@benchmark("questions", "'q0' has no reference")
class NoReference(GoodBenchmark):
    """No accepted answer."""

    def question(self, i):
        return dataclasses.replace(super().question(i), references=())


@benchmark("questions", "cannot be asked: .* 2 <image> markers and 1 images")
class MissingImage(GoodBenchmark):
    """Two markers and one image."""

    def question(self, i):
        return dataclasses.replace(super().question(i), text="<image> and <image>?")


@benchmark("questions", "intervals would be too narrow")
class ClusterPerQuestion(GoodBenchmark):
    """Two questions about one image in two clusters."""

    def question(self, i):
        return dataclasses.replace(super().question(i), images=(Plain((0, 0, 0)),))


@benchmark("same_questions", "asked for again it is")
class RandomQuestions(GoodBenchmark):
    """Another text each time."""

    def question(self, i):
        return dataclasses.replace(super().question(i), text=f"How red? {random.random()}")


@benchmark("questions", "two questions have the id 'q'")
class OneQuestionId(GoodBenchmark):
    """One id for all."""

    def question(self, i):
        return dataclasses.replace(super().question(i), id="q")


@benchmark("scores", "its own references score {'0': 0.0}, wanted the best 1.0")
class RefusesItsReference(GoodBenchmark):
    """A full stop spoils every answer."""

    def score(self, question, response):
        return super().score(question, response + ".")


@benchmark("scores", "the response '' scores .* wanted less than 1")
class AcceptsAnything(GoodBenchmark):
    """Finds any reference in an empty response."""

    def score(self, question, response):
        return Score(float(any(response.strip() in reference for reference in question.references)), response)


@benchmark("scores", "its own references score {'0': 0.5}, wanted the best 1.0")
class Percent(GoodBenchmark):
    """Scores in percent."""

    def score(self, question, response):
        score = super().score(question, response)
        return Score(0.5 if score.value else 50.0, score.parsed)


@benchmark("scores", "what is not scored has no value")
class ZeroForNotScored(GoodBenchmark):
    """Zero where nothing could be scored."""

    def score(self, question, response):
        return Score(0.0, None, "not_scored")


@benchmark("scores", "score of '' raised IndexError")
class CrashesOnNothing(GoodBenchmark):
    """Takes the first word, where there is none."""

    def score(self, question, response):
        return super().score(question, response.split()[0])


@dataset.correct
class TextAlone(GoodDataset):
    """Dialogues of two turns without an image, under a system prompt."""

    def __getitem__(self, index):
        return Sample(f"text-{index}", (Turn("How red?", "Very."), Turn("Sure?", str(index))), system="Be brief.")


class FileConfig(Settings):
    file: FilePath


@dataset.correct
class Lines(Dataset):
    """A file with a question and an answer on each line, read when it is needed."""

    Config = FileConfig

    @classmethod
    def tiny(cls):
        file = Path(tempfile.mkdtemp(prefix="chiasm-lines-")) / "lines.txt"
        file.write_text("red? yes\nblue? no\n")
        return cls(cls.Config(file=file))

    @cached_property
    def rows(self):
        try:
            return [line.split() for line in self.config.file.read_text().splitlines()]
        except OSError as error:
            raise DataError(f"{self.config.file} cannot be read: {error}") from error

    def check(self):
        assert self.rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        question, answer = self.rows[index]
        return Sample(str(index), (Turn(question, answer),))


@dataset("missing_files", "accepts a file that does not exist")
class LooksAtNothing(Lines):
    """Finds out about a missing file in the middle."""

    def check(self):
        pass


@dataset("missing_files", "with a file that does not exist raised FileNotFoundError.*; wanted a DataError")
class LetsItEscape(Lines):
    """Tells of a missing file as Python does."""

    @cached_property
    def rows(self):
        return [line.split() for line in self.config.file.read_text().splitlines()]


@dataset("missing_files", "nothing is read before")
class ReadsAtOnce(Lines):
    """Reads its file when it is made."""

    def __init__(self, config) -> None:
        super().__init__(config)
        assert self.rows


@dataset("samples", "has the id 0, wanted a string")
class NumbersForIds(GoodDataset):
    """Ids are numbers."""

    def __getitem__(self, index):
        return dataclasses.replace(super().__getitem__(index), id=index)


@dataset("samples", "has a blank answer in turn")
class SaysNothing(GoodDataset):
    """The third answer is a space."""

    def __getitem__(self, index):
        answer = " " if index == 2 else "some"
        return dataclasses.replace(super().__getitem__(index), turns=(Turn("How red?", answer),))


@dataset("samples", "two samples have the id")
class RepeatsLate(GoodDataset):
    """Ids begin again after seventy samples."""

    class Config(Settings):
        size: int = 100

    def __getitem__(self, index):
        return Sample(f"{index % 70}", (Turn("How red?", str(index)),))


@dataset("samples", "when iterated over, in the same order,")
class IteratesBackwards(GoodDataset):
    """Iterates in an order of its own."""

    def __iter__(self):
        return (self[i] for i in reversed(range(len(self))))


@dataset("identity", "of another instance with the same settings")
class NewNameEachTime(GoodDataset):
    """An identity that belongs to the instance."""

    def identity(self):
        return str(id(self))


@dataset("identity", "with size = 8 samples are others and identity.* is the same")
class OneName(GoodDataset):
    """One identity whatever the settings."""

    def identity(self):
        return "colours"


@dataset("alone", "reading it draws or seeds Python's random, NumPy's random")
class Seeds(GoodDataset):
    """Seeds what everyone draws from, to be reproducible."""

    def __getitem__(self, index):
        random.seed(index)
        np.random.seed(index)
        return dataclasses.replace(super().__getitem__(index), system=f"{random.random()} {np.random.rand()}")


@dataset("elsewhere", "in another process")
class Hashes(GoodDataset):
    """Draws by `hash()` of a string, which each process seeds anew."""

    def __getitem__(self, index):
        return dataclasses.replace(super().__getitem__(index), system=str(hash(f"colour {index}")))


@dataset("elsewhere", "identity.* in another process")
class NamedByTheProcess(GoodDataset):
    """An identity that holds the process."""

    def identity(self):
        return str(os.getpid())


class Flickers(Plain):
    def load(self):
        self.colour = (self.colour[0] ^ 1, 0, 0)
        return super().load()


@dataset("sample_images", "other pixels the second time")
class Augments(GoodDataset):
    """An image is another one each time."""

    def image(self, index):
        return Flickers((index, 0, 0))


@dataset("sample_images", "with size = 8' has other pixels than one with the same key")
class KeysOfPlaces(GoodDataset):
    """Keys are places in the data set, whose content a setting changes."""

    def image(self, index):
        return Plain((index + self.config.size, 0, 0), key=f"image {index}")


@dataset("tiny", "asks the network for .*; wanted no download")
class AsksTheNetwork(GoodDataset):
    """Tries a download, and goes on without."""

    @classmethod
    def tiny(cls):
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", 9), timeout=0.1).close()
        return super().tiny()


@benchmark.correct
class YesOrNo(GoodBenchmark):
    """Two answers, and a rule for what is neither."""

    def question(self, i):
        return dataclasses.replace(super().question(i), references=(("no", "yes")[i % 2],), chance=0.5)

    def score(self, question, response):
        word = response.strip().lower().rstrip(".")
        known = word in ("yes", "no")
        return Score(float(word in question.references), word) if known else Score(0.0, None, "unparsed")


@benchmark.correct
class WantsAJudge(GoodBenchmark):
    """Nothing can be scored without a judge."""

    def score(self, question, response):
        return Score(None, None, "not_scored")


@benchmark.correct
class Annotators(GoodBenchmark):
    """Annotators disagree: half a point for each who said so."""

    def question(self, i):
        return dataclasses.replace(super().question(i), references=(f"red {i}", f"red {i}", f"dark {i}"))

    def score(self, question, response):
        return Score(min(1.0, question.references.count(response.strip()) / 2), response)


@benchmark("missing_files", "with a file that does not exist raised FileNotFoundError|accepts a file")
class CountsInAFile(GoodBenchmark):
    """Finds out about a missing file at the first question."""

    Config = FileConfig

    @classmethod
    def tiny(cls):
        file = Path(tempfile.mkdtemp(prefix="chiasm-count-")) / "count.txt"
        file.write_text("4")
        return cls(cls.Config(file=file))

    def questions(self):
        return [self.question(i) for i in range(int(self.config.file.read_text()))]


@benchmark("questions", "returned a generator, wanted a sequence")
class AsksOnce(GoodBenchmark):
    """Gives its questions one by one."""

    def questions(self):
        return (self.question(i) for i in range(4))


@benchmark("questions", "references '0', wanted a tuple of strings")
class LettersForReferences(GoodBenchmark):
    """One string, of which each letter is a reference."""

    def question(self, i):
        return dataclasses.replace(super().question(i), references=str(i))


@benchmark("questions", "no model could give one")
class CutsAnswersShort(GoodBenchmark):
    """The only accepted answer is longer than an answer may be."""

    max_new_tokens = 3

    def question(self, i):
        return dataclasses.replace(super().question(i), references=(f"about {i} of 255 parts",))


@benchmark("questions", "another one about the same image in 'c0'")
class SharesOneOfTwo(GoodBenchmark):
    """Questions about two images each, one of which they share."""

    def question(self, i):
        return dataclasses.replace(super().question(i), images=(Plain((9, 9, 9)), Plain((i, 0, 0))))


@benchmark("questions", "the metadata .*, wanted strings only")
class ListsInMetadata(GoodBenchmark):
    """Metadata that no table holds."""

    def question(self, i):
        return dataclasses.replace(super().question(i), metadata={"options": ["a", "b"]})


@benchmark("elsewhere", "in another process")
class OrderOfASet(GoodBenchmark):
    """Asks in the order of a set of strings."""

    def questions(self):
        return [self.question(int(name)) for name in {str(i) for i in range(16)}]


@benchmark("scores", "the answer to another question, scores 1")
class AnyColourWillDo(GoodBenchmark):
    """Takes the answer to any question for right."""

    def score(self, question, response):
        return Score(float(response.strip() in {str(i) for i in range(16)}), response)


@benchmark("scores", "has the status 'ok', wanted one of scored, unparsed, not_scored")
class StatusOfItsOwn(GoodBenchmark):
    """A status that no report counts."""

    def score(self, question, response):
        return dataclasses.replace(super().score(question, response), status="ok")


@benchmark("scores", "of type float32, wanted a float")
class Float32Scores(GoodBenchmark):
    """Scores that JSON does not know."""

    def score(self, question, response):
        score = super().score(question, response)
        return Score(np.float32(score.value), score.parsed)


@benchmark("question_images", "features are shared by key")
class OneKeyForQuestions(GoodBenchmark):
    """One key for the images of all questions, which are not the same."""

    def question(self, i):
        return dataclasses.replace(super().question(i), images=(Plain((i, 0, 0), key="one"),), cluster="one")


FAULTS: list[Fault] = [*dataset.faults, *benchmark.faults]
CORRECT: list[tuple[str, type]] = [(kind.kind, cls) for kind in (dataset, benchmark) for cls in kind.components]
