"""The plan of a study and of its cells, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import shorten

from chiasm.cost import SampleSize
from chiasm.plan import RunPlan
from chiasm_experiments.study.cells import FULL, Skipped, planned
from chiasm_experiments.study.config import StudyConfig
from chiasm_experiments.study.overview import FidelityPlan, StudyPlan
from chiasm_experiments.study.settings import Planned, Range
from chiasm_experiments.study.space import in_words

GIB = 2**30
MOST_ROWS = 40
"""Of a search's combinations; more are told by their ends alone."""
MOST_SKIPPED = 20


def study_as_text(plan: StudyPlan, gpu_memory: float | None = None, workers: int = 1) -> str:
    """What a study does: its factors, the cells of each fidelity, what is left out, and what it takes in all.

    Args:
        plan: of the study.
        gpu_memory: GiB of a GPU; cells that are estimated to take more are named.
        workers: over how many the language model is spread.
    """
    config, first = plan.study.config, plan.fidelities[0]
    lines = [f"{config.name}: {_head(plan, first)}"]
    lines += [f"  {config.question}"] if config.question else []
    lines += ["", *_factors(config)]
    for item in plan.fidelities:
        lines.append("")
        if item.name != FULL or len(plan.fidelities) > 1:
            lines.append(f"fidelity {item.name}: {_fidelity(plan, item)}")
        lines += _cells(plan, item, gpu_memory, workers)
    lines += ["", *_meaning(plan.sample, workers)]
    lines += ["", *(f"NOTE: {note}" for note in plan.notes), *_in_all(plan)]
    return "\n".join(lines)


def _head(plan: StudyPlan, first: FidelityPlan) -> str:
    config = plan.study.config
    if config.design == "search":
        return f"a search, {_count_of(first.trials, 'trial')}" + (" at the first fidelity" if config.fidelities else "")
    words = f"{_count_of(first.tried, 'cell')} x {_count_of(len(config.seeds), 'seed')} = "
    return words + _count_of(first.trials, "trial")


def _fidelity(plan: StudyPlan, item: FidelityPlan) -> str:
    fields = plan.study.config.fidelities.get(item.name, {})
    what = ", ".join(f"{path} {shorten(str(value), 60)}" for path, value in fields.items()) or "the run as it is"
    trials = _count_of(item.trials, "trial")
    if item is plan.fidelities[0]:
        return f"{what}; {trials}"
    best = _count_of(item.tried, "cell")
    return f"{what}; the best {best} of the one before go on to it, and the control that belongs to them: {trials}"


def _factors(config: StudyConfig) -> list[str]:
    lines = []
    for path, levels in config.factors.items():
        if isinstance(levels, Range):
            kind = "whole numbers" if levels.whole else "numbers"
            what = f"{kind} from {levels.low:g} to {levels.high:g}" + (", on a logarithmic scale" if levels.log else "")
        else:
            what = " | ".join(levels)
        needed = config.when.get(path)
        lines.append(f"  {path}: {what}" + (f"; only where {in_words(needed)}" if needed else ""))
    if config.design == "search":
        lines.append(f"  proposed by {config.search.sampler}")
    if config.rungs:
        shares = ", ".join(f"{share:g}" for share in config.rungs)
        lines.append(f"  asked at {shares} of the last stage; pruner: {config.pruner}")
    return lines


def _cells(plan: StudyPlan, item: FidelityPlan, gpu_memory: float | None, workers: int) -> list[str]:
    cells, skipped = item.cells.cells, item.cells.skipped
    rows = [(cell.label, cell.plan) for cell in cells]
    if plan.study.config.design == "search" and len(rows) > MOST_ROWS:
        lines = [f"  of {len(rows) + len(skipped)} combinations that were planned {len(rows)} can work:", *_ends(rows)]
    else:
        lines = _table(rows, workers) if rows else ["  no cell"]
    if gpu_memory is not None:
        lines += _too_large(rows, gpu_memory, workers)
    told = [f"  {left.label}: {_left_out(left)}: {reason}" for left in skipped for reason in left.reasons]
    more = len(told) - MOST_SKIPPED
    return lines + told[:MOST_SKIPPED] + ([f"  ... and {more} more; --json has all of them"] if more > 0 else [])


def _left_out(item: Skipped) -> str:
    return "CANNOT WORK" if item.by == "plan" else "left out"


def _ends(rows: Sequence[tuple[str, RunPlan]]) -> list[str]:
    """The least and the most of each quantity."""
    names: dict[Planned, str] = {
        "visual_tokens": "visual tokens",
        "trained_parameters": "trained parameters",
        "flops": "operations to answer",
        "gpu_gib": "GiB of GPU",
    }
    lines = []
    for name, words in names.items():
        values = [value for _, plan in rows if (value := planned(plan, name)) is not None]
        if values:
            lines.append(f"    {words}: {_figure(min(values))} to {_figure(max(values))}")
    return lines


def _in_all(plan: StudyPlan) -> list[str]:
    """What the study takes."""
    trials, budget = plan.trials, plan.study.config.budget
    exact = all(item.exact for item in plan.fidelities)
    lines = [f"in all: {_count_of(trials, 'trial')}"]
    if plan.flops is not None:
        about = "" if exact else "about "
        lines[0] += f", {about}{plan.flops:.3g} operations to train them"
        lines.append("  (samples as above; stages that trials have in common once; no pruning, no cached features)")
    lines += [f"  how much training that is cannot be told: {reason}" for reason in plan.unknown]
    if budget.gpu_hours is not None:
        lines.append(f"  no trial starts after {budget.gpu_hours:g} GPU-hours")
    if budget.money is not None:
        lines.append(f"  no trial starts after {budget.money:g} are spent, at {budget.price_per_gpu_hour:g} a GPU-hour")
    return lines


def _count_of(number: int | None, what: str) -> str:
    if number is None:
        return f"{what}s until the budget is spent"
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def plans_as_text(
    plans: Sequence[tuple[str, RunPlan]], sample: SampleSize, gpu_memory: float | None = None, workers: int = 1
) -> str:
    """A row for each cell that works, then why the others do not, then what the figures mean.

    Args:
        plans: the label and the plan of each cell.
        sample: what the costs are for.
        gpu_memory: GiB of a GPU; cells that are estimated to take more are named.
        workers: over how many the language model is spread.
    """
    valid = [(label, plan) for label, plan in plans if plan.cost is not None]
    lines = _table(valid, workers) if valid else []
    for label, plan in plans:
        lines += [f"  {label}: CANNOT WORK: {problem}" for problem in plan.problems]
    if valid:
        lines += ["", *_meaning(sample, workers)]
    if gpu_memory is not None:
        lines += _too_large(valid, gpu_memory, workers)
    return "\n".join(lines)


def _table(plans: Sequence[tuple[str, RunPlan]], workers: int) -> list[str]:
    rows = [("cell", "visual tokens", "trained", "frozen", "GFLOP to train", "GFLOP to answer", "GiB of GPU")]
    for label, plan in plans:
        assert plan.cost is not None
        assert plan.views is not None
        trained, total = sum(plan.trained.values()), sum(plan.parameters.values())
        stages = plan.cost.stages
        tokens = f"{plan.visual_tokens:,}" if plan.views[1] == 1 else f"{plan.visual_tokens:,} in {plan.views[1]} views"
        needed = [stage.worker_bytes(workers) for stage in stages.values()]
        memory = [None if amount is None else amount / GIB for amount in needed]
        rows.append(
            (
                label,
                tokens,
                _count(trained),
                _count(total - trained),
                _each([stage.flops / 1e9 for stage in stages.values()]),
                _figure(plan.cost.inference / 1e9),
                _each(memory),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines


def _meaning(sample: SampleSize, workers: int) -> list[str]:
    gpu = "one GPU" if workers == 1 else f"each of {workers} GPUs (FSDP2)"
    return [
        f"  For a sample of one image with the most views it can have and {sample.text} positions of text, "
        f"{sample.answer} of them answered.",
        f"  To train: forward and backward of one sample, stage / stage. GiB: estimated peak of a step on {gpu} in",
        "  bfloat16, at each stage's micro-batch; without torch.compile, which takes less.",
    ]


def _too_large(plans: Sequence[tuple[str, RunPlan]], gpu_memory: float, workers: int) -> list[str]:
    lines = []
    for label, plan in plans:
        assert plan.cost is not None
        for name, stage in plan.cost.stages.items():
            needed = stage.worker_bytes(workers)
            if needed is not None and needed > gpu_memory * GIB:
                lines.append(
                    f"  {label}: stage {name} is estimated to take {needed / GIB:.1f} GiB with micro-batches "
                    f"of {stage.micro_batch}, the GPU has {gpu_memory:g}; lower micro_batch_size or train less"
                )
    return lines


def _each(values: Sequence[float | None]) -> str:
    return " / ".join("unknown" if value is None else _figure(value) for value in values)


def _figure(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.2f} M"
