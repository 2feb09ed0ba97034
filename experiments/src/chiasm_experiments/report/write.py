"""`write_report`: reads a study folder, computes everything once and writes the four files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from chiasm_experiments.report import format as fmt
from chiasm_experiments.report.effects import Analysis, analyse
from chiasm_experiments.report.figure import alt_text, draw
from chiasm_experiments.report.layout import (
    Section,
    Table,
    cells_table,
    effect_table,
    failures_table,
    method,
    quality_table,
    skills_table,
)
from chiasm_experiments.report.provenance import mixed_code, provenance_table
from chiasm_experiments.report.render import Document, to_html, to_markdown
from chiasm_experiments.report.study import Study, load_study
from chiasm_experiments.report.summary import summary, warnings
from chiasm_experiments.report.table import load_scores, write_results

T = TypeVar("T")


@dataclass(frozen=True)
class Report:
    """What was computed and where it was written.

    Args:
        study: the plan and its trials.
        analyses: the results of each benchmark, by name, as numbers.
        document: the same as printed.
        rows: how many rows the long table has.
        results: `results.parquet`, the long table.
        markdown: `report.md`.
        html: `report.html`, one file.
        figure: `report.png`.
    """

    study: Study
    analyses: tuple[Analysis, ...]
    document: Document
    rows: int
    results: Path
    markdown: Path
    html: Path
    figure: Path

    @property
    def tables(self) -> tuple[Table, ...]:
        """All printed tables, in order."""
        return tuple(table for section in self.document.sections for table in section.tables)


def write_report(folder: Path) -> Report:
    """Writes `results.parquet`, `report.md`, `report.html` and `report.png` into a study folder.

    Trials that failed or have not finished are counted and listed; everything else is computed from the rest. Equal
    input gives equal bytes, and a file is replaced only when it is whole.

    Args:
        folder: has `study.json` and, for each trial, `trials/<id>/manifest.json` and `questions.parquet`.

    Raises:
        DataError: the plan is missing or malformed, a table is unreadable, two complete trials share a cell and a
            seed, or trials were asked different questions.
    """
    study = load_study(folder)
    analyses = tuple(analyse(study, scores) for scores in load_scores(study))
    document = compose(study, analyses)
    paths = {name: folder / name for name in ("results.parquet", "report.md", "report.html", "report.png")}
    rows = _replace(paths["results.parquet"], lambda path: write_results(study, path))
    _replace(paths["report.png"], lambda path: draw(study, analyses, path))
    png = paths["report.png"].read_bytes()
    _replace_text(paths["report.md"], to_markdown(document, "report.png"))
    _replace_text(paths["report.html"], to_html(document, png))
    return Report(study, analyses, document, rows, *paths.values())


def compose(study: Study, analyses: Sequence[Analysis]) -> Document:
    """Puts the results in the order in which a reader needs them."""
    several = len(analyses) > 1
    sections = []
    for analysis in analyses:
        at = f" on {analysis.scores.name}" if several else ""
        effects = tuple(effect_table(effect) for effect in analysis.effects)
        sections.append(Section(f"Every cell{at}", tables=(cells_table(study, analysis),)))
        if effects:
            sections.append(Section(f"Effects of the factors{at}", tables=effects))
        sections.append(Section(f"By skill{at}", tables=(skills_table(study, analysis),)))
    sections.append(Section("Figure", figure=True))
    sections.append(Section("How it was computed", paragraphs=method(study, analyses)))
    if analyses:
        quality = tuple(quality_table(study, analysis) for analysis in analyses)
        sections.append(Section("Seeds, unparsed and not scored", tables=quality))
    failures = failures_table(study)
    if failures is not None:
        sections.append(Section("Failures", tables=(failures,)))
    sections.append(Section("Provenance", tables=(provenance_table(study),)))
    mixed = mixed_code(study)
    extra = (f"Complete trials ran with different code, a rival explanation of any difference: {', '.join(mixed)}.",)
    return Document(
        title=study.name,
        question=study.question,
        facts=_facts(study, analyses),
        summary=summary(study, analyses),
        warnings=warnings(study, analyses) + (extra if mixed else ()),
        sections=tuple(sections),
        figure_alt=alt_text(study, analyses),
    )


def _facts(study: Study, analyses: Sequence[Analysis]) -> tuple[tuple[str, str], ...]:
    done = len(study.complete)
    facts = [("trials", f"{done}" if study.planned is None else f"{done} of {study.planned}")]
    facts.append(("seeds", str(len({trial.seed for trial in study.complete}))))
    if len(analyses) == 1:
        scores = analyses[0].scores
        facts += [("questions", fmt.count(len(scores.questions))), ("images", fmt.count(scores.images))]
        facts.append(("chance", fmt.percent(float(scores.chance.mean()))))
    elif analyses:
        facts.append(("benchmarks", str(len(analyses))))
    return tuple(facts)


def _replace(path: Path, write: Callable[[Path], T]) -> T:
    """Writes beside `path` and renames, so that no reader sees half a file."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        result = write(temporary)
        # mkstemp makes private files; a report is as readable as its folder's other files.
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return result


def _replace_text(path: Path, text: str) -> None:
    _replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))
