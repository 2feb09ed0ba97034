"""The figure: accuracy of every cell with its interval, chance, and the control set apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from chiasm_experiments.report.cells import CellResult
from chiasm_experiments.report.drawing import BLIND, CHANCE, MUTED, SEEN, STYLE, bare, new_figure, save
from chiasm_experiments.report.effects import Analysis
from chiasm_experiments.report.layout import MAX_CELLS, shown_cells
from chiasm_experiments.report.study import Study

_DASHES = (0, (4, 3))


def draw(study: Study, analyses: Sequence[Analysis], path: Path) -> None:
    """Writes a PNG with one panel for each benchmark, the most accurate cell on top; the same bytes for equal input."""
    with rc_context(STYLE):
        shown = [analysis for analysis in analyses if analysis.cells]
        rows = [len(shown_cells(analysis.cells, MAX_CELLS)) for analysis in shown]
        heights = [0.30 * count + 0.2 for count in rows] or [1.0]
        figure = new_figure(sum(heights) + 1.25 * max(len(shown), 1))
        if not shown:
            figure.text(0.5, 0.5, "No complete trial yet", ha="center", va="center", color=MUTED, fontsize=12)
        else:
            panels = figure.subplots(len(shown), 1, squeeze=False, height_ratios=heights)[:, 0]
            for axes, analysis in zip(panels, shown, strict=True):
                _panel(study, analysis, axes)
        save(figure, path)


def alt_text(study: Study, analyses: Sequence[Analysis]) -> str:
    """The figure in words, for those who do not see it; its numbers are those of the main table."""
    names = ", ".join(analysis.scores.name for analysis in analyses) or "no benchmark"
    control = "" if study.control is None else f" The control {study.control.label} is drawn as an open square."
    return (
        f"Accuracy of each cell on {names} with 95% intervals, most accurate on top; small dots are single seeds, the "
        f"dashed line is chance.{control} The same numbers stand in the first table."
    )


def _panel(study: Study, analysis: Analysis, axes: Axes) -> None:
    cells = shown_cells(analysis.cells, MAX_CELLS)
    for y, cell in enumerate(cells):
        _row(axes, cell, y)
    chance = 100 * float(analysis.scores.chance.mean())
    axes.axvline(chance, color=CHANCE, linewidth=1.1, linestyle=_DASHES, zorder=1)
    axes.set_yticks(range(len(cells)), [_label(study, cell) for cell in cells])
    for tick, cell in zip(axes.get_yticklabels(), cells, strict=True):
        if cell.is_control:
            tick.set_color(BLIND)
    axes.set_ylim(len(cells) - 0.4, -0.6)
    axes.set_xlim(*_limits(cells, chance))
    part = "" if len(cells) == len(analysis.cells) else f" ({len(cells)} of {len(analysis.cells)} cells)"
    axes.set_xlabel(f"accuracy on {analysis.scores.name}{study.where}, %{part}")
    if len(study.named) > 1:
        heading = "  \N{MIDDLE DOT}  ".join(study.short[path] for path in study.named)
        axes.set_title(heading, loc="left", fontsize=8.5, color=MUTED, x=0.0)
    bare(axes, "x")
    axes.legend(
        handles=_legend(any(cell.is_control for cell in cells), any(len(cell.trials) > 1 for cell in cells), chance),
        loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=4, frameon=False, fontsize=8, handletextpad=0.4,
        columnspacing=1.2, borderaxespad=0.2,
    )  # fmt: skip


def _row(axes: Axes, cell: CellResult, y: float) -> None:
    color = BLIND if cell.is_control else SEEN
    interval = cell.accuracy
    if np.isfinite(interval.low) and np.isfinite(interval.high):
        axes.plot([100 * interval.low, 100 * interval.high], [y, y], color=color, linewidth=1.8, solid_capstyle="round")
    if len(cell.seed_accuracies) > 1:
        seeds = [100 * value for value in cell.seed_accuracies]
        axes.plot(seeds, [y + 0.22] * len(seeds), "o", color=color, markersize=2.6, alpha=0.55, markeredgewidth=0)
    shape, fill = ("s", "white") if cell.is_control else ("o", color)
    axes.plot(
        [100 * interval.estimate], [y], color=color, marker=shape, markerfacecolor=fill, markersize=6,
        markeredgewidth=1.4, zorder=3,
    )  # fmt: skip


def _label(study: Study, cell: CellResult) -> str:
    text = "  \N{MIDDLE DOT}  ".join(study.value(cell.cell, path) for path in study.named) or cell.label
    text = text if len(text) <= 60 else text[:57] + "..."
    return f"{text}  (control)" if cell.is_control else text


def _limits(cells: Sequence[CellResult], chance: float) -> tuple[float, float]:
    """From a little below the lowest interval to a little above the highest, chance always inside."""
    ends = [100 * value for cell in cells for value in (cell.accuracy.low, cell.accuracy.high, cell.accuracy.estimate)]
    ends = [end for end in ends if np.isfinite(end)] + [chance]
    margin = max(0.05 * (max(ends) - min(ends)), 1.0)
    return max(min(ends) - margin, -1.0), min(max(ends) + margin, 101.0)


def _legend(control: bool, seeds: bool, chance: float) -> list[Line2D]:
    handles = [_key("mean, 95% interval", SEEN, marker="o", markersize=5, linewidth=1.8)]
    if seeds:
        handles.append(_key("one seed", SEEN, marker="o", markersize=2.6, linewidth=0, alpha=0.55))
    if control:
        handles.append(_key("control", BLIND, marker="s", markersize=5, markerfacecolor="white", linewidth=1.8))
    handles.append(_key(f"chance, {chance:.1f} %", CHANCE, linewidth=1.1, linestyle=_DASHES))
    return handles


def _key(label: str, color: str, **style: Any) -> Line2D:
    return Line2D([], [], color=color, label=label, **style)
