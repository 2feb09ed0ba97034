"""Numbers as the report prints them: percent points with one decimal, each with its interval, and a true minus."""

from __future__ import annotations

import math

from chiasm_experiments.report.statistics import Interval

MISSING = "\N{EM DASH}"
_MINUS = "\N{MINUS SIGN}"


def accuracy(interval: Interval | None) -> str:
    """`61.3 [57.0, 65.6]`."""
    if interval is None:
        return MISSING
    return f"{points(interval.estimate)} {_ends(interval, points)}"


def difference(interval: Interval | None) -> str:
    """`+3.1 [+1.0, +5.2]`, signed unless exactly 0, so that an end rounded to 0.0 still shows its side."""
    if interval is None:
        return MISSING
    return f"{signed(interval.estimate)} {_ends(interval, signed)}"


def points(value: float) -> str:
    """A share in [0, 1] as percent points: `61.3`."""
    return f"{100 * value:.1f}".replace("-", _MINUS)


def signed(value: float) -> str:
    """A difference of shares as percent points: `+3.1`."""
    if value == 0:
        return "0.0"
    return f"{'+' if value > 0 else _MINUS}{abs(100 * value):.1f}"


def p_value(value: float) -> str:
    """`0.012`, `<0.001`."""
    if math.isnan(value):
        return MISSING
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def percent(share: float) -> str:
    """`1.2 %`."""
    return f"{100 * share:.1f} %"


def count(value: int | None) -> str:
    """`12,345`; the missing sign for None."""
    return MISSING if value is None else f"{value:,}"


def parameters(value: int | None) -> str:
    """`12.6 M`."""
    if value is None:
        return MISSING
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return str(value)


def flops(value: float) -> str:
    """`1.2 TFLOP`."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {unit}FLOP"
    return f"{value:.0f} FLOP"


def coefficient(value: float) -> str:
    """A correlation: `0.83`."""
    return f"{value:.2f}".replace("-", _MINUS)


def duration(seconds: float | None) -> str:
    """`8.4 s`, `412 s`, `1 h 52 min`."""
    if seconds is None:
        return MISSING
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 1000:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def number(value: int, singular: str, plural: str | None = None) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{value:,} {singular if value == 1 else plural or singular + 's'}"


def _ends(interval: Interval, form: object) -> str:
    if math.isinf(interval.low) or math.isinf(interval.high):
        return "[no interval: one image]"
    assert callable(form)
    return f"[{form(interval.low)}, {form(interval.high)}]"
