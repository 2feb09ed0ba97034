"""The long table, a row for each question of each complete trial, and the score matrices that derive from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from chiasm.errors import DataError
from chiasm_experiments.report.pairing import Runs
from chiasm_experiments.report.statistics import Floats
from chiasm_experiments.report.study import Study, Trial

QUESTION_COLUMNS = (
    "benchmark", "split", "question_id", "cluster", "skill", "question", "reference",
    "response", "parsed", "score", "status", "chance",
)  # fmt: skip
STUDY_COLUMNS = ("study", "trial", "fidelity", "seed", "cell")
# What makes two rows of equal id the same question: were one of them changed, the scores would not compare.
IDENTITY = ("cluster", "skill", "question", "reference", "chance")


@dataclass(frozen=True, eq=False)
class BenchmarkScores:
    """The scores of every complete trial that has some on one benchmark.

    Args:
        trials: T trials, in the study's order.
        questions: `[n]` `split/question_id`, sorted.
        clusters: `[n]` integer codes of the images; one code across splits.
        skills: `[n]`.
        chance: `[n]` expected score of a guess, in [0, 1].
        scores: `[T, n]` in [0, 1], NaN where not scored.
        unparsed: `[T]` share of questions whose answer could not be read.
        dropped: complete trials without any score on this benchmark.
    """

    name: str
    trials: tuple[Trial, ...]
    questions: NDArray[Any]
    clusters: NDArray[np.int64]
    skills: NDArray[Any]
    chance: Floats
    scores: Floats
    unparsed: Floats
    dropped: tuple[Trial, ...] = ()

    @cached_property
    def images(self) -> int:
        return int(np.unique(self.clusters).size)

    def runs(self, trials: Sequence[Trial], keys: Sequence[str], name: str, mask: NDArray[Any] | None = None) -> Runs:
        """The scores of some trials; `keys` gives each one's cell of the factors not compared, `mask` is `[n]`."""
        row = {trial.folder.name: i for i, trial in enumerate(self.trials)}
        keep = slice(None) if mask is None else mask
        pairs = tuple((key, trial.seed) for key, trial in zip(keys, trials, strict=True))
        scores = self.scores[[row[trial.folder.name] for trial in trials]]
        return Runs(pairs, self.questions[keep], self.clusters[keep], scores[:, keep], name)


def load_scores(study: Study) -> tuple[BenchmarkScores, ...]:
    """Aligns the questions of the complete trials of one fidelity, one record for each benchmark, by name.

    Raises:
        DataError: a table lacks a column, a question occurs twice, a score or a chance is not in [0, 1], or two
            trials were asked different questions; the message names the trials and the questions.
    """
    parts: dict[str, list[tuple[Trial, pd.DataFrame]]] = {}
    for trial in study.complete:
        for name, rows in _read_questions(trial).groupby("benchmark", sort=True):
            parts.setdefault(str(name), []).append((trial, rows))
            if len(parts[str(name)]) > 1:
                _require_same(*parts[str(name)][0], trial, rows)
                # Equal to the first trial's, which is kept: the texts of many trials would fill the memory.
                parts[str(name)][-1] = (trial, rows[["score", "status"]])
    return tuple(_benchmark(name, parts[name]) for name in sorted(parts))


def write_results(study: Study, path: Path) -> int:
    """Writes the long table of all fidelities, one trial at a time; the number of rows.

    Columns: those of `questions.parquet`, then study, trial, fidelity, seed, cell and one for each factor, named by
    its path (with `factor:` before it where a column has that name already).
    """
    known = set(QUESTION_COLUMNS + STUDY_COLUMNS)
    column = {factor: f"factor:{factor}" if factor in known else factor for factor in study.paths}
    complete = [trial for trial in study.every if trial.status == "complete"]
    added = [pa.field(name, pa.string()) for name in ("study", "trial", "fidelity")]
    added += [pa.field("seed", pa.int64())]
    added += [pa.field(name, pa.string()) for name in ("cell", *column.values())]
    schema = pa.schema([*_question_schema(complete), *added])
    rows = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for trial in complete:
            table = pq.read_table(trial.questions, columns=list(QUESTION_COLUMNS))
            values = [study.name, trial.id, trial.fidelity, trial.seed, study.label(trial.cell)]
            values += [trial.cell[factor] for factor in column]
            for item, value in zip(added, values, strict=True):
                table = table.append_column(item, pa.repeat(pa.scalar(value, item.type), table.num_rows))
            writer.write_table(table.cast(schema))
            rows += table.num_rows
    return rows


def _question_schema(trials: Iterable[Trial]) -> list[pa.Field[Any]]:
    schemas = [pq.read_schema(trial.questions).remove_metadata() for trial in trials]
    if not schemas:
        floats = ("score", "chance")
        return [pa.field(name, pa.float64() if name in floats else pa.string()) for name in QUESTION_COLUMNS]
    # Permissive, because a column without any value (`parsed`, say) is written with the type null.
    merged = pa.unify_schemas(schemas, promote_options="permissive")
    return [pa.field(name, merged.field(name).type) for name in QUESTION_COLUMNS]


def _read_questions(trial: Trial) -> pd.DataFrame:
    """One trial's rows, indexed by `split/question_id` and sorted, with NaN for what was not scored."""
    try:
        missing = set(QUESTION_COLUMNS) - set(pq.read_schema(trial.questions).names)
        if missing:
            raise DataError(f"{trial.questions} lacks the columns {sorted(missing)}")
        wanted = ["benchmark", "split", "question_id", "score", "status", *IDENTITY]
        rows = pq.read_table(trial.questions, columns=wanted).to_pandas()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{trial.questions} cannot be read: {error}") from error
    rows["score"] = rows["score"].astype("float64").where(rows["status"] != "not_scored")
    for column, values in (("score", rows["score"].dropna()), ("chance", rows["chance"].astype("float64"))):
        bad = ~((values >= 0) & (values <= 1))
        if bad.any():
            where = rows.loc[bad[bad].index[0], "question_id"]
            raise DataError(f"{trial.questions}: the {column} of question {where} is not in [0, 1]")
    rows.index = pd.Index(rows["split"].astype(str) + "/" + rows["question_id"].astype(str), name="key")
    twice = rows.set_index("benchmark", append=True).index
    if not twice.is_unique:
        raise DataError(f"{trial.questions}: question {twice[twice.duplicated()][0][0]} occurs twice")
    return rows.sort_index(kind="stable")


def _require_same(first: Trial, expected: pd.DataFrame, trial: Trial, rows: pd.DataFrame) -> None:
    names = f"trials {first.id} and {trial.id}"
    if not rows.index.equals(expected.index):
        lacking, more = expected.index.difference(rows.index), rows.index.difference(expected.index)
        raise DataError(
            f"{names} were not asked the same questions of {rows['benchmark'].iloc[0]}: {len(lacking)} only in "
            f"{first.id} {list(lacking[:3])}, {len(more)} only in {trial.id} {list(more[:3])}. "
            "Evaluate both on one version of the benchmark."
        )
    for column in IDENTITY:
        equal = pa.array(rows[column]).equals(pa.array(expected[column]))
        if not equal:
            raise DataError(
                f"{names} differ in the column {column} of {rows['benchmark'].iloc[0]}, so their questions are not "
                "the same although their ids are. Evaluate both on one version of the benchmark."
            )


def _benchmark(name: str, parts: list[tuple[Trial, pd.DataFrame]]) -> BenchmarkScores:
    rows = parts[0][1]
    scores = np.stack([part["score"].to_numpy(dtype=np.float64) for _, part in parts])
    has = ~np.isnan(scores).all(axis=1)
    unparsed = np.array([float((part["status"] == "unparsed").mean()) for _, part in parts])
    return BenchmarkScores(
        name=name,
        trials=tuple(trial for (trial, _), use in zip(parts, has, strict=True) if use),
        questions=rows.index.to_numpy(dtype=object),
        clusters=np.unique(rows["cluster"].astype(str).to_numpy(dtype=object), return_inverse=True)[1].astype(np.int64),
        skills=rows["skill"].astype(str).to_numpy(dtype=object),
        chance=rows["chance"].to_numpy(dtype=np.float64),
        scores=scores[has],
        unparsed=unparsed[has],
        dropped=tuple(trial for (trial, _), use in zip(parts, has, strict=True) if not use),
    )
