"""The figures of a study beside its cells: accuracy against costs, over ranges of numbers, and while trials learn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, NullFormatter, PercentFormatter

from chiasm_experiments.report.costs import Front
from chiasm_experiments.report.drawing import CHANCE, MUTED, SEEN, STYLE, bare, new_figure, panels, save
from chiasm_experiments.report.effects import Analysis
from chiasm_experiments.report.ranges import RangeResult
from chiasm_experiments.report.statistics import Floats
from chiasm_experiments.report.study import Study, Trial

PANEL = 2.7
"""Inches."""


def draw_costs(study: Study, found: Sequence[tuple[Analysis, Front]], path: Path) -> None:
    """A panel for each cost of each benchmark: every cell with its interval, the front as a line of steps."""
    with rc_context(STYLE):
        figure = new_figure(PANEL * -(-len(found) // 2) + 0.3)
        for axes, (analysis, front) in zip(panels(figure, len(found)), found, strict=True):
            _cost_panel(study, analysis, front, axes)
        save(figure, path)


def draw_ranges(study: Study, found: Sequence[tuple[Analysis, RangeResult]], path: Path) -> None:
    """A panel for each range of each benchmark: every cell by its value."""
    with rc_context(STYLE):
        figure = new_figure(PANEL * -(-len(found) // 2) + 0.3)
        for axes, (analysis, item) in zip(panels(figure, len(found)), found, strict=True):
            x, y, seeds = (np.array([point[k] for point in item.points]) for k in (0, 1, 2))
            axes.scatter(x, 100 * y, s=10 + 8 * seeds, color=SEEN, alpha=0.6, linewidths=0)
            _scale(axes, x, log=item.range.log)
            axes.set_xlabel(study.short[item.factor])
            axes.set_ylabel(f"accuracy on {analysis.scores.name}, %")
            bare(axes, "both")
        save(figure, path)


def draw_curves(study: Study, path: Path) -> None:
    """A panel for each fidelity: accuracy at the rungs of each trial; pruned ones end in a cross."""
    shown = curved(study)
    with rc_context(STYLE):
        figure = new_figure(PANEL * -(-len(shown) // 2) + 0.3)
        for axes, (name, trials) in zip(panels(figure, len(shown)), shown, strict=True):
            for trial in trials:
                _curve(axes, trial)
            axes.set_xlabel("share of the last stage" + (f", fidelity {name}" if study.several else ""))
            axes.set_ylabel("accuracy, %")
            axes.xaxis.set_major_formatter(PercentFormatter(1.0))
            axes.set_xlim(0, 1)
            bare(axes, "both")
            handles = [Line2D([], [], color=SEEN, marker="o", markersize=3, label="went on")]
            if any(trial.status == "pruned" for trial in trials):
                handles.append(Line2D([], [], color=CHANCE, marker="x", markersize=5, label="pruned"))
            axes.legend(handles=handles, loc="best", frameon=False, fontsize=8)
        save(figure, path)


def curved(study: Study) -> list[tuple[str, list[Trial]]]:
    """By fidelity, the dearest first, the trials with a learning curve."""
    names = [str(name) for name in reversed(study.fidelities)] or [""]
    by_name = [
        (name, [trial for trial in study.every if trial.curve and (trial.fidelity or name) == name]) for name in names
    ]
    return [(name, trials) for name, trials in by_name if trials]


def _scale(axes: Axes, values: Floats, *, log: bool) -> None:
    """The horizontal axis: without powers of ten as formulas, which are not parsed here, and without an offset."""
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    if values.max() >= 1e4:
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    elif log:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _curve(axes: Axes, trial: Trial) -> None:
    shares = [point.share for point in trial.curve]
    values = [100 * point.accuracy for point in trial.curve]
    pruned = trial.status == "pruned"
    color = CHANCE if pruned else SEEN
    axes.plot(shares, values, color=color, linewidth=0.9, alpha=0.55, marker="o", markersize=2.2)
    if pruned:
        axes.plot(shares[-1:], values[-1:], color=color, marker="x", markersize=5, linewidth=0)


def _cost_panel(study: Study, analysis: Analysis, front: Front, axes: Axes) -> None:
    known = [(cell, cost) for cell, cost in zip(analysis.cells, front.costs, strict=True) if cost is not None]
    on = {id(step.cell) for step in front.steps}
    for cell, cost in known:
        interval, best = cell.accuracy, id(cell) in on
        color = SEEN if best else MUTED
        if np.isfinite(interval.low) and np.isfinite(interval.high):
            ends = [100 * interval.low, 100 * interval.high]
            axes.plot([cost, cost], ends, color=color, linewidth=1.2 if best else 0.8, alpha=1.0 if best else 0.4)
        axes.plot([cost], [100 * interval.estimate], "o", color=color, markersize=5 if best else 3, zorder=3)
    costs = [step.cost for step in front.steps]
    axes.step(costs, [100 * step.cell.accuracy.estimate for step in front.steps], where="post", color=SEEN, linewidth=1)
    values = [cost for _, cost in known]
    _scale(axes, np.array(values), log=min(values) > 0 and max(values) > 20 * min(values))
    axes.set_xlabel(front.title + study.where)
    axes.set_ylabel(f"accuracy on {analysis.scores.name}, %")
    bare(axes, "both")
