"""The plans of a study's cells as a table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from chiasm.cost import SampleSize
from chiasm.plan import RunPlan

GIB = 2**30


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
