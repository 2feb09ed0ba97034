"""Evaluation by generation: each question of a benchmark is answered greedily, scored, and kept as one row."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from chiasm.config import ComponentRef, RunConfig, resolve
from chiasm.errors import DataError
from chiasm.sample import Sample, Turn
from chiasm.vlm import VLM
from chiasm_experiments.data.feed import Feed
from chiasm_experiments.interfaces import Benchmark, Question
from chiasm_experiments.training.precision import autocast
from chiasm_experiments.training.workers import Workers

Row = dict[str, Any]

COLUMNS = (
    "benchmark", "split", "question_id", "cluster", "skill", "question", "reference", "response", "parsed", "score",
    "status", "chance",
)  # fmt: skip
"""The long table: a row for each question; every figure of a report derives from it."""


def load_benchmarks(refs: Sequence[ComponentRef]) -> dict[str, Benchmark]:
    """The benchmarks that a run names, by name.

    Raises:
        DataError: one has no question, or one name is given twice.
    """
    benchmarks: dict[str, Benchmark] = {}
    for ref in refs:
        cls, config = resolve("benchmark", ref)
        if ref.name in benchmarks:
            raise DataError(f"benchmark {ref.name!r} is named twice in `evaluate`; name it once")
        benchmarks[ref.name] = cls(config)
        if not benchmarks[ref.name].questions():
            raise DataError(f"benchmark {ref.name!r} has no question: {ref.options}")
    return benchmarks


@torch.no_grad()
def answer(
    vlm: VLM, run: RunConfig, feed: Feed, samples: Sequence[Sample], device: torch.device, max_new_tokens: int
) -> list[str]:
    """The model's greedy answers to open dialogues, in order."""
    vlm.eval()
    responses: list[str] = []
    size = run.evaluation_batch_size
    for first in range(0, len(samples), size):
        examples = [feed.ask(sample, max_new_tokens) for sample in samples[first : first + size]]
        with autocast(run, device):
            batch = feed.batch(examples, device, pad="left")
            responses += [text.strip() for text in vlm.generate(batch, max_new_tokens=max_new_tokens)]
    return responses


def evaluate(
    vlm: VLM,
    run: RunConfig,
    feed: Feed,
    benchmarks: Mapping[str, Benchmark],
    workers: Workers,
    *,
    questions: Mapping[str, Sequence[Question]] | None = None,
    answered: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """One row for each question of each benchmark, in the order of the questions; the same on every worker.

    Args:
        vlm: the trained model.
        run: its run.
        feed: makes batches.
        benchmarks: by name.
        workers: each of which answers its share.
        questions: those that are asked of each benchmark; None: all.
        answered: told on every worker, the same number of times, how many questions all workers have answered about
            now, and how many there are.
    """
    asked = questions or {name: benchmark.questions() for name, benchmark in benchmarks.items()}
    total = sum(map(len, asked.values()))
    rows: list[Row] = []
    for name, benchmark in benchmarks.items():
        mine = asked[name][workers.rank :: workers.size]
        samples = [as_sample(question) for question in mine]
        responses: list[str] = []
        size = run.evaluation_batch_size
        for first in range(0, -(-len(asked[name]) // workers.size), size):
            some = samples[first : first + size]
            responses += answer(vlm, run, feed, some, workers.device, benchmark.max_new_tokens)
            answered(len(rows) + min(len(asked[name]), (first + size) * workers.size), total)
        found = {
            question.id: _row(name, benchmark, question, response)
            for question, response in zip(mine, responses, strict=True)
        }
        if workers.size > 1:
            shares: list[dict[str, Row]] = [{} for _ in range(workers.size)]
            dist.all_gather_object(shares, found)
            found = {key: row for share in shares for key, row in share.items()}
        rows += [found[question.id] for question in asked[name]]
    return rows


def as_sample(question: Question) -> Sample:
    """A question as a dialogue that waits for its answer."""
    return Sample(question.id, (Turn(question.text),), question.images)


def scores(rows: Sequence[Row]) -> dict[str, float]:
    """Mean score of each benchmark over its scored questions; a benchmark without any is left out."""
    result = {}
    for name in dict.fromkeys(row["benchmark"] for row in rows):
        values = [row["score"] for row in rows if row["benchmark"] == name and row["score"] is not None]
        if values:
            result[name] = sum(values) / len(values)
    return result


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Writes the long table as parquet, whole or not at all."""
    import pyarrow as pa
    from pyarrow import parquet

    types = {"score": pa.float64(), "chance": pa.float64()}
    schema = pa.schema([(name, types.get(name, pa.string())) for name in COLUMNS])
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    parquet.write_table(pa.Table.from_pylist(list(rows), schema=schema), temporary)
    os.replace(temporary, path)


def _row(name: str, benchmark: Benchmark, question: Question, response: str) -> Row:
    score = benchmark.score(question, response)
    return {
        "benchmark": name,
        "split": benchmark.split,
        "question_id": question.id,
        "cluster": question.cluster,
        "skill": question.skill,
        "question": question.text,
        "reference": " | ".join(question.references),
        "response": response,
        "parsed": score.parsed,
        "score": score.value,
        "status": score.status,
        "chance": question.chance,
    }
