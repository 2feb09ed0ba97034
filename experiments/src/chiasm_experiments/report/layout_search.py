"""Tables of what was tried: the best of many, what was pruned, what was left out, what mattered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median

from chiasm_experiments.report import format as fmt
from chiasm_experiments.report.cells import cell_key
from chiasm_experiments.report.costs import further_seeds
from chiasm_experiments.report.effects import Analysis
from chiasm_experiments.report.importance import DRAWS, Importance, Shares
from chiasm_experiments.report.layout import Column, Row, Table, cell_columns, cell_values
from chiasm_experiments.report.ranges import RangeResult
from chiasm_experiments.report.study import Study

BEST = 10
MAX_ROWS = 40
ENOUGH_SEEDS = 3


def tried(study: Study) -> str:
    """What became of everything that was tried, at all fidelities, in one paragraph."""
    number = Counter(trial.status for trial in study.every)
    begun = number["complete"] + number["pruned"] + number["failed"]
    seeds = Counter(cell_key(t.cell) + str(t.fidelity) for t in study.every if t.cell and t.status == "complete")
    repeated = [count for count in seeds.values() if count > 1]
    cells = len({cell_key(trial.cell) for trial in study.every if trial.cell})
    listed = max(sum(study.listed.values()), len(study.every))
    text = (
        f"{fmt.number(listed, 'trial')} of {fmt.number(cells, 'cell')} were tried: {number['complete']} complete, "
        f"{number['pruned']} pruned, {number['failed']} failed, {listed - begun} not finished."
    )
    if repeated:
        have = "has" if len(repeated) == 1 else "have"
        text += f" Of {fmt.number(len(seeds), 'cell')} with a result {len(repeated)} {have} it from more than one seed."
    if study.added_seeds:
        text += f" Seeds added later: {', '.join(map(str, study.added_seeds))}."
    if study.skipped:
        text += f" {fmt.number(len(study.skipped), 'combination')} were skipped."
    if study.warm_start:
        text += (
            f" The search began with results of {', '.join(_warm(study))}; these steer what is proposed and are in no "
            "table here."
        )
    return text


def curse(study: Study, analyses: Sequence[Analysis]) -> str | None:
    """The warning that the best of many is optimistic; None where nothing was chosen, or with enough seeds."""
    cells = {cell_key(trial.cell) for trial in study.every if trial.cell and not study.is_control(trial.cell)}
    chosen = study.design == "search" or study.several or any(trial.status == "pruned" for trial in study.every)
    best = {cell.label: len(cell.trials) for item in analyses for cell in item.cells[:1] if not cell.is_control}
    if not chosen or len(cells) < 2 or not best or min(best.values()) >= ENOUGH_SEEDS:
        return None
    label, count = min(best.items(), key=lambda item: item[1])
    return (
        f"The best of {len(cells)} cells is known from {fmt.number(count, 'seed')}{study.where} ({label}): chance "
        "favours whatever wins, so its accuracy is optimistic (the winner's curse), and its interval does not allow "
        "for the choice. Run chiasm sweep STUDY --add-seeds 2, which trains the best cells again, and judge them by "
        "the further seeds."
    )


def best_table(study: Study, analysis: Analysis) -> Table:
    """The most accurate cells with the number of their seeds, and their accuracy over seeds added after the choice."""
    cells = [cell for cell in analysis.cells if not cell.is_control][:BEST]
    columns = [*cell_columns(study), Column("accuracy, %", True), Column("seeds", True)]
    if study.added_seeds:
        columns.append(Column("further seeds alone, %", True, "seeds that were added after the cell was chosen"))
    rows = []
    for cell in cells:
        further = (fmt.accuracy(further_seeds(study, analysis, cell)),) if study.added_seeds else ()
        values = (*cell_values(study, cell), fmt.accuracy(cell.accuracy), str(len(cell.trials)), *further)
        rows.append(Row(values))
    total = sum(not cell.is_control for cell in analysis.cells)
    notes = [f"The {len(rows)} most accurate of {fmt.number(total, 'cell')}; their order among neighbours is chance."]
    if study.added_seeds:
        notes.append("The accuracy over further seeds alone does not suffer from the choice; the other one does.")
    caption = f"{analysis.scores.name}: the best cells{study.where}"
    return Table(caption, tuple(columns), tuple(rows), tuple(notes))


def pruned_table(study: Study) -> Table | None:
    """Every pruned trial, where it was stopped and how it stood; None without any."""
    pruned = [trial for trial in study.every if trial.status == "pruned"]
    if not pruned:
        return None
    rows = []
    for trial in pruned[:MAX_ROWS]:
        point = next((point for point in trial.curve if point.rung == trial.rung), None)
        others = [
            other.accuracy
            for one in study.every
            if one is not trial and one.fidelity == trial.fidelity
            for other in one.curve
            if other.rung == trial.rung
        ]
        rows.append(
            Row(
                (
                    study.label(trial.cell) if trial.cell else trial.id,
                    *((trial.fidelity or fmt.MISSING,) if study.several else ()),
                    str(trial.seed),
                    fmt.MISSING if trial.rung is None else str(trial.rung),
                    fmt.MISSING if point is None else fmt.percent(point.share),
                    fmt.MISSING if point is None else fmt.points(point.accuracy),
                    fmt.points(median(others)) if others else fmt.MISSING,
                )
            )
        )
    columns = (
        Column("cell"), *((Column("fidelity"),) if study.several else ()), Column("seed", True), Column("rung", True),
        Column("share of the last stage", True), Column("accuracy there, %", True, "on the rung's questions"),
        Column("median of others there, %", True),
    )  # fmt: skip
    notes = [
        "Pruned trials have no result: they are in no mean and no comparison. Cells that learn late may be among them."
    ]
    if len(rows) < len(pruned):
        notes.append(f"{len(pruned) - len(rows)} more are not shown.")
    return Table("Pruned trials", columns, tuple(rows), tuple(notes))


def skipped_table(study: Study) -> Table | None:
    """The combinations of which no cell was made, by reason; None without any."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for item in study.skipped:
        label = ", ".join(f"{study.short.get(path, path)}={level}" for path, level in item.levels.items())
        key = (item.by, "; ".join(item.reasons), *((item.fidelity or fmt.MISSING,) if study.several else ()))
        groups.setdefault(key, []).append(label)
    if not groups:
        return None
    rows = [
        Row(
            (
                labels[0] if len(labels) == 1 else f"{labels[0]}; and {len(labels) - 1} more",
                *key[2:],
                _by(key[0]),
                key[1],
            )
        )
        for key, labels in groups.items()
    ]
    columns = (
        Column("levels"), *((Column("fidelity"),) if study.several else ()), Column("why"), Column("reason")
    )  # fmt: skip
    notes = () if len(rows) <= MAX_ROWS else (f"{len(rows) - MAX_ROWS} more reasons are not shown.",)
    return Table("Combinations that were skipped", columns, tuple(rows[:MAX_ROWS]), notes)


def importance_table(study: Study, found: Sequence[Importance]) -> Table | None:
    """fANOVA beside PED-ANOVA; None where there are too few trials."""
    if not found:
        return None
    rows = tuple(Row((item.factor, _shares(item.fanova), _shares(item.ped_anova))) for item in found)
    columns = (
        Column("factor"),
        Column("fANOVA", True, "share of the variance of a forest that the factor explains alone"),
        Column("PED-ANOVA", True, "how the best trials' levels differ from all trials'"),
    )
    notes = (
        "Shares sum to 1 in each column, whatever there is to explain: with noise alone they are spread over all "
        "factors, and PED-ANOVA gives a factor without effect a share of its own. Read them together, and as a hint "
        f"which factor to vary next. The range is that of 95% of {DRAWS} draws of the cells with replacement. Cells of "
        "a search are no random sample, which the range does not show.",
    )
    return Table(f"Importance of the factors{study.where}", columns, rows, notes)


def range_table(study: Study, analysis: Analysis, found: Sequence[RangeResult]) -> Table | None:
    """Accuracy over three parts of each range; None without ranges."""
    rows = []
    for item in found:
        trend = item.trend
        text = "too few cells to say"
        if trend is not None:
            text = f"{fmt.coefficient(trend.estimate)} [{fmt.coefficient(trend.low)}, {fmt.coefficient(trend.high)}]"
        for place, part in enumerate(item.parts):
            mean, low, high = part.accuracy
            ends = f" [{fmt.points(low)}, {fmt.points(high)}]" if part.cells > 1 else ""
            rows.append(
                Row(
                    (
                        item.factor if place == 0 else "",
                        f"{part.low:.3g} to {part.high:.3g}",
                        str(part.cells),
                        f"{fmt.points(mean)}{ends}",
                        fmt.points(part.best),
                        text if place == 0 else "",
                    )
                )
            )
    if not rows:
        return None
    columns = (
        Column("factor"), Column("values"), Column("cells", True), Column("mean accuracy, %", True),
        Column("best, %", True), Column("Spearman with accuracy", True, "over cells"),
    )  # fmt: skip
    notes = (
        "The cells by value in three parts of equal size; the interval is over cells, which differ in all else. A "
        "search tries good values more often, so neither the means nor the trend are those of a random sample.",
    )
    caption = f"{analysis.scores.name}: accuracy over ranges of numbers{study.where}"
    return Table(caption, columns, tuple(rows), notes)


def _warm(study: Study) -> list[str]:
    return [f"{name} ({fmt.number(count, 'trial')})" for name, count in study.warm_start.items()]


def _shares(shares: Shares) -> str:
    return f"{shares[0]:.2f} [{shares[1]:.2f}, {shares[2]:.2f}]"


def _by(by: str) -> str:
    return {"plan": "cannot work", "constraint": "left out by a constraint"}.get(by, by)
