"""`write_report`: reads a study folder, computes everything once and writes the files of its report."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from chiasm_experiments.report.compose import FIGURE, PICTURES, View, compose
from chiasm_experiments.report.effects import Analysis, analyse
from chiasm_experiments.report.layout import Table
from chiasm_experiments.report.reading import load_study
from chiasm_experiments.report.render import Document, to_html, to_markdown
from chiasm_experiments.report.study import Study
from chiasm_experiments.report.table import load_scores, write_results

T = TypeVar("T")


@dataclass(frozen=True)
class Report:
    """What was computed and where it was written.

    Args:
        study: the plan and its trials, seen at the most expensive fidelity with a complete one.
        analyses: the results of each benchmark there, by name, as numbers.
        cheaper: the same of the other fidelities, the most expensive first.
        document: all of it as printed.
        rows: how many rows the long table has.
        results: `results.parquet`, the long table.
        markdown: `report.md`.
        html: `report.html`, one file.
        figure: `report.png`; figures of costs, ranges and learning curves lie beside it where there are such.
    """

    study: Study
    analyses: tuple[Analysis, ...]
    cheaper: tuple[View, ...]
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

    Trials that were pruned, failed or have not finished are counted and listed; everything else is computed from the
    rest, within one fidelity at a time. Equal input gives equal bytes, and a file is replaced only when it is whole.

    Args:
        folder: has `study.json` and, for each trial, `trials/<id>/manifest.json` and `questions.parquet`.

    Raises:
        DataError: the plan is missing or malformed, a table is unreadable, two complete trials share a cell, a seed
            and a fidelity, or trials of one fidelity were asked different questions.
    """
    study = load_study(folder)
    main = _view(study)
    cheaper = tuple(_view(study.at(name)) for name in study.finished if name != study.fidelity)
    composed = compose(main, cheaper)
    paths = {name: folder / name for name in ("results.parquet", "report.md", "report.html", FIGURE)}
    rows = _replace(paths["results.parquet"], lambda path: write_results(study, path))
    for name in PICTURES:
        if name in composed.pictures:
            _replace(folder / name, composed.pictures[name])
        else:  # of an earlier report
            (folder / name).unlink(missing_ok=True)
    pictures = {name: (folder / name).read_bytes() for name in composed.pictures}
    _replace_text(paths["report.md"], to_markdown(composed.document))
    _replace_text(paths["report.html"], to_html(composed.document, pictures))
    return Report(study, main.analyses, cheaper, composed.document, rows, *paths.values())


def _view(study: Study) -> View:
    return View(study, tuple(analyse(study, scores) for scores in load_scores(study)))


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
