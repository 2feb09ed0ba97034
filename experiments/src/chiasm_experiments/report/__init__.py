"""From a study folder to a report that gives no number without an interval."""

from __future__ import annotations

from chiasm_experiments.report.pairing import Runs, cell_interval, paired_difference
from chiasm_experiments.report.statistics import Interval, accuracy_interval, holm, mean_interval, variance_components
from chiasm_experiments.report.write import Report, write_report

__all__ = [
    "Interval",
    "Report",
    "Runs",
    "accuracy_interval",
    "cell_interval",
    "holm",
    "mean_interval",
    "paired_difference",
    "variance_components",
    "write_report",
]
