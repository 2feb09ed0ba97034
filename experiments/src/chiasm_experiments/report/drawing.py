"""How every figure of a report looks, and that equal input gives equal bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2933", "#5f6b7a", "#e3e8ee"
SEEN, BLIND, CHANCE = "#1f5fa8", "#8a6d3b", "#b42318"
DPI = 160

STYLE: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": MUTED,
    "ytick.color": INK,
    # Labels are data: a dollar sign in one must not start a formula.
    "text.parse_math": False,
}


def new_figure(height: float) -> Figure:
    """A white figure of the report's width; `height` in inches."""
    figure = Figure(figsize=(8.2, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.patch.set_facecolor("white")
    return figure


def panels(figure: Figure, count: int, columns: int = 2) -> list[Axes]:
    """So many panels, row by row; places without one are blank."""
    rows = -(-count // columns)
    places = list(figure.subplots(rows, min(columns, count), squeeze=False).flat)
    for place in places[count:]:
        place.set_axis_off()
    return places[:count]


def bare(axes: Axes, grid: Literal["x", "y", "both"]) -> None:
    """Leaves grid lines alone of the frame."""
    axes.tick_params(length=0)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    """As PNG, without the time and the version of the library."""
    figure.savefig(path, format="png", metadata={"Software": None})
