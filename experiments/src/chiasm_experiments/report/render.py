"""Two renderers of one document: Markdown for a repository, one HTML file for a reader."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from jinja2 import Environment, StrictUndefined

from chiasm_experiments.report.layout import Section, Table
from chiasm_experiments.report.summary import Line


@dataclass(frozen=True, slots=True)
class Document:
    """What both renderers print, in this order.

    Args:
        title: the study's name.
        question: what the study asks; may be empty.
        facts: numbers for the head of the page, each with its name.
        summary: the answer in a few sentences.
        warnings: what must be known before.
        sections: the evidence.
        figures: each figure in words, by the name of its file.
    """

    title: str
    question: str
    facts: tuple[tuple[str, str], ...]
    summary: tuple[Line, ...]
    warnings: tuple[str, ...]
    sections: tuple[Section, ...]
    figures: Mapping[str, str]


def to_html(document: Document, pictures: Mapping[str, bytes]) -> str:
    """One page without script and without any reference to another file; `pictures`, PNG by name, are inside."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = resources.files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    images = {name: base64.b64encode(png).decode("ascii") for name, png in pictures.items()}
    return environment.from_string(source).render(doc=document, images=images) + "\n"


def to_markdown(document: Document) -> str:
    """GitHub's Markdown; the figures lie beside the page."""
    lines = [f"# {_escape(document.title)}", ""]
    if document.question:
        lines += [f"*{_escape(document.question)}*", ""]
    lines += ["## In short", ""]
    lines += [f"- **{_escape(line.lead)}**: {_escape(line.text)}" for line in document.summary]
    for warning in document.warnings:
        lines += ["", "> [!WARNING]", f"> {_escape(warning)}"]
    for section in document.sections:
        lines += ["", f"## {_escape(section.title)}"]
        for paragraph in section.paragraphs:
            lines += ["", _escape(paragraph)]
        for table in section.tables:
            lines += ["", *_table(table)]
        for name in section.figures:
            lines += ["", f"![{_escape(document.figures[name])}]({name})"]
    return "\n".join(lines) + "\n"


def _table(table: Table) -> list[str]:
    lines = [f"**{_escape(table.caption)}**", ""]
    lines.append(_row([column.title for column in table.columns]))
    lines.append("|" + "|".join("---:" if column.numeric else ":---" for column in table.columns) + "|")
    lines += [_row(row.cells) for row in table.rows]
    for note in table.notes:
        lines += ["", _escape(note)]
    return lines


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_escape(cell) for cell in cells) + " |"


def _escape(text: str) -> str:
    """Text that Markdown prints as it is: on one line, without HTML, emphasis, links, code or table cells.

    Underscores inside words stay: GitHub does not read them as emphasis, and names are full of them.
    """
    text = " ".join(text.split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*|~$])", r"\\\1", text)
    # Only brackets that could make a link or a footnote, so that an interval stays readable in the source.
    text = re.sub(r"\](?=[(\[:])|\[(?=\^)", r"\\\g<0>", text)
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)
    # Addresses would become links by themselves.
    return re.sub(r"(?i)\b(https?|ftp)://", r"\1:\\//", text.replace("www.", "www\\."))
