"""Where the numbers come from: versions, revision, command and time, as the manifests tell them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from chiasm_experiments.report import format as fmt
from chiasm_experiments.report.layout import Column, Row, Table
from chiasm_experiments.report.study import Study, Trial

MAX_VALUES = 5
_CODE = ("git", "revision", "version", "package", "plugin")


def provenance_table(study: Study) -> Table:
    """One row for each fact; where trials differ, every value with the number of its trials."""
    rows = [Row(("study", study.name)), Row(("design", study.design))]
    rows += [Row((f"factor {path}", _levels(study, path))) for path in study.paths]
    rows.append(Row(("seeds", ", ".join(map(str, study.seeds)) or fmt.MISSING)))
    if study.several:
        rows.append(Row(("fidelities", ", ".join(study.fidelities))))
    if study.outside:
        left = fmt.number(len(study.outside), "trial")
        rows.append(Row(("on disk, no longer part of the study", f"{left}: {', '.join(study.outside[:MAX_VALUES])}")))
    # what a stage cost that another trial trained is part of a trial's training, and was spent once
    complete = _complete(study)
    saved = sum(trial.seconds.get("shared", 0.0) for trial in complete)
    for phase in ("train", "evaluate", "total"):
        spent = [trial.seconds[phase] for trial in complete if phase in trial.seconds]
        if spent:
            total = fmt.duration(sum(spent) - (saved if phase == "train" else 0))
            rows.append(Row((f"time, {phase}", f"{total} over {fmt.number(len(spent), 'trial')}")))
    if saved:
        rows.append(Row(("time saved by shared stages", fmt.duration(saved))))
    rows += [Row((name, value)) for name, value in _environment(complete)]
    return Table("Provenance", (Column("what"), Column("value")), tuple(rows))


def mixed_code(study: Study) -> tuple[str, ...]:
    """The versions and revisions in which complete trials differ: a rival explanation of any difference."""
    facts = _facts(_complete(study))
    return tuple(name for name in facts if len(set(facts[name])) > 1 and any(word in name.lower() for word in _CODE))


def _complete(study: Study) -> list[Trial]:
    """Of all fidelities."""
    return [trial for trial in study.every if trial.status == "complete"]


def _levels(study: Study, path: str) -> str:
    if path in study.ranges:
        numbers = study.ranges[path]
        return f"{numbers.low:g} to {numbers.high:g}{', logarithmic' if numbers.log else ''}"
    return ", ".join(study.factors[path])


def _environment(trials: Sequence[Trial]) -> Iterator[tuple[str, str]]:
    for name, values in _facts(trials).items():
        counts = Counter(values)
        if len(counts) == 1:
            yield name, values[0]
        else:
            shown = [f"{value} ({fmt.number(count, 'trial')})" for value, count in counts.most_common(MAX_VALUES)]
            more = len(counts) - len(shown)
            yield name, "; ".join(shown) + (f"; {more} more" if more else "")


def _facts(trials: Sequence[Trial]) -> dict[str, list[str]]:
    """For each fact the value in each trial; `not recorded` where some trials lack it."""
    flat = [dict(_flatten(trial.environment)) for trial in trials]
    names = dict.fromkeys(name for facts in flat for name in facts)
    return {name: [facts.get(name, "not recorded") for facts in flat] for name in names}


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _flatten(item, f"{prefix}{key}.")
        elif isinstance(item, list) and all(isinstance(part, str) for part in item):
            yield f"{prefix}{key}", " ".join(item)
        else:
            yield f"{prefix}{key}", item if isinstance(item, str) else json.dumps(item)
