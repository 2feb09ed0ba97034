"""Which strategy a run's workers follow: what the settings say, or what their memory holds."""

from __future__ import annotations

import torch

from chiasm.config import RunConfig
from chiasm.cost import SampleSize
from chiasm.errors import ConfigError
from chiasm.plan import plan_run
from chiasm.vlm import VLM
from chiasm_experiments.training.execution import Execution
from chiasm_experiments.training.strategy import Alone, Replicated, Sharded, Strategy
from chiasm_experiments.training.workers import Workers

SHARE = 0.8
"""Of a GPU's memory that weights, moments, gradients and one sample may take; micro-batches and fragments need some."""
GIB = 2**30


def choose(execution: Execution, run: RunConfig, vlm: VLM, workers: Workers) -> tuple[Strategy, str]:
    """The strategy of a run and why; the same on every worker.

    Args:
        execution: what the run's settings say.
        run: the run.
        vlm: its model, on the CPU as it was built.
        workers: that train together.

    Raises:
        ConfigError: `fsdp` is asked for, and the language model cannot be sharded.
    """
    why_not = _why_whole(vlm)
    if execution.strategy == "fsdp" and why_not is not None:
        raise ConfigError(f"strategy: fsdp cannot be: {why_not}; choose ddp")
    if workers.size == 1:
        return Alone(workers, vlm), "there is one worker"
    if execution.strategy != "auto":
        chosen = Sharded if execution.strategy == "fsdp" else Replicated
        return chosen(workers, vlm), "the settings say so"
    if why_not is not None:
        return Replicated(workers, vlm), why_not
    if workers.device.type != "cuda":
        return Replicated(workers, vlm), "on the CPU nothing is weighed"
    needed = needed_bytes(run)
    if needed is None:
        return Replicated(workers, vlm), "the language model does not say what it keeps, so memory is not weighed"
    total = torch.cuda.get_device_properties(workers.device).total_memory
    # workers of unlike GPUs must choose alike
    fits = workers.sum(float(needed <= SHARE * total)) == workers.size
    why = f"each worker would take about {needed / GIB:.1f} GiB with all of the model, of {total / GIB:.1f} GiB"
    return (Replicated if fits else Sharded)(workers, vlm), why


def needed_bytes(run: RunConfig) -> int | None:
    """Memory that the run's largest stage takes on each worker with the whole model, at one sample at a time."""
    single = run.model_copy(
        update={"stages": tuple(stage.model_copy(update={"micro_batch_size": 1}) for stage in run.stages)}
    )
    plan = plan_run(single, SampleSize())
    needed = [stage.gpu_bytes for stage in plan.cost.stages.values()] if plan.cost else []
    known = [amount for amount in needed if amount is not None]
    return max(known) if known else None


def _why_whole(vlm: VLM) -> str | None:
    """Why a language model cannot be sharded; None: it can."""
    if vlm.llm.geometry.matrix_bits is not None:
        return "the language model is quantised"
    if not vlm.llm.block_modules():
        return f"{type(vlm.llm).__name__} names no blocks that could be gathered one by one"
    return None
