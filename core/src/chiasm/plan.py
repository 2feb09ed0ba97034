"""What a run would be, told without loading a weight: whether its parts fit, and what they hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import ValidationError

from chiasm.config import PARTS, ComponentRef, Part, RunConfig, resolve
from chiasm.cost import RunCost, SampleSize, run_cost
from chiasm.errors import ChiasmError
from chiasm.features import SequenceSpec
from chiasm.llm import FIXED_LLM, LanguageModelSpec
from chiasm.prompt import learned_vectors
from chiasm.registry import registry
from chiasm.views import Views
from chiasm.yamlfile import problems_of


@dataclass(slots=True)
class RunPlan:
    """The outcome of planning one run; figures are None where a problem stopped them from being known."""

    problems: list[str] = field(default_factory=list)
    """Why the run cannot work; empty for a valid run."""
    views: tuple[int, int] | None = None
    """The fewest and the most views of an image."""
    visual_tokens: int | None = None
    """Of one image; the most that it can have where tiles make them differ."""
    sequence: SequenceSpec | None = None
    """What the fusion gives."""
    context_length: int | None = None
    parameters: dict[Part, int] = field(default_factory=dict)
    matrix_bits: int | None = None
    """Of a quantised language model, as its spec says."""
    trained: dict[Part, int] = field(default_factory=dict)
    """Parameters that some stage trains."""
    cost: RunCost | None = None
    """Operations and memory; None for a run that cannot work."""

    @property
    def valid(self) -> bool:
        return not self.problems

    def summary(self, workers: int = 1) -> dict[str, Any]:
        """The plan as plain values, for `--json`; memory is that of each worker over which the LLM is spread."""
        return {
            "valid": self.valid,
            "problems": self.problems,
            "views": self.views,
            "visual_tokens": self.visual_tokens,
            "context_length": self.context_length,
            "parameters": dict(self.parameters),
            "trained": dict(self.trained),
            **(self.cost.summary(workers) if self.cost else {}),
        }


def plan_run(run: RunConfig, sample: SampleSize | None = None) -> RunPlan:
    """Plans a run from the specs of its parts; no weight is loaded and no data is read.

    Args:
        run: as `load_run` gives it.
        sample: the sample whose cost is estimated; None leaves the estimate out.
    """
    plan = RunPlan()

    def attempt(where: str, step: Callable[[], Any]) -> Any:
        try:
            return step()
        except (ChiasmError, ValueError) as error:
            plan.problems.append(f"{where}: {error}")
        return None

    def spec(where: str, kind: str, ref: ComponentRef, *geometry: Any) -> Any:
        try:
            cls: Any = registry().load(kind, ref.name)
            config = cls.Config.model_validate(ref.options)
        except ValidationError as error:
            for problem in problems_of(error, ref.options, model=cls.Config):
                plan.problems.append(f"{'.'.join(map(str, (where, *problem.location)))}: {problem.message}")
        except ChiasmError as error:
            plan.problems.append(f"{where}: {error}")
        else:
            return attempt(where, lambda: cls.spec(config, *geometry))
        return None

    def count(kind: str, ref: ComponentRef, *geometry: Any) -> int:
        cls, config = resolve(kind, ref)
        with torch.device("meta"):
            return sum(p.numel() for p in cls(config, *geometry).parameters())

    encoders = [spec(f"vision.encoders.{i}", "encoder", ref) for i, ref in enumerate(run.vision.encoders)]
    llm: LanguageModelSpec | None = spec("llm", "llm", run.llm)
    if None not in encoders:
        plan.parameters["encoders"] = sum(encoder.parameters for encoder in encoders)
    if llm is not None:
        plan.context_length = llm.context_length
        plan.parameters["llm"], plan.matrix_bits = llm.parameters, llm.matrix_bits
        plan.parameters["tokens"] = learned_vectors(run.tokens) * llm.width
        if "llm" in run.trained and not llm.trainable:
            plan.problems.append(f"llm: {FIXED_LLM}")
        if run.tokens.turns == "template" and not llm.chat_template:
            plan.problems.append(
                f"tokens.turns: {run.llm.name!r} has no chat template; choose [USER, BOT] or an instruct model"
            )
    if llm is None or None in encoders:
        return _finish(plan, run, llm)

    features = tuple(encoder.features for encoder in encoders)
    plan.sequence = spec("vision.fusion", "fusion", run.vision.fusion, features, llm.width)
    if plan.sequence is None:
        return _finish(plan, run, llm)
    plan.parameters["fusion"] = count("fusion", run.vision.fusion, features, llm.width)
    out = spec("vision.adapter", "adapter", run.vision.adapter, plan.sequence, llm.width)
    if out is None:
        return _finish(plan, run, llm)
    plan.parameters["adapter"] = count("adapter", run.vision.adapter, plan.sequence, llm.width)
    views = attempt("vision.image", lambda: Views(run.vision.image, encoders[0].image, out))
    if views is None:
        return _finish(plan, run, llm)
    plan.views, plan.visual_tokens = views.counts, views.most_tokens
    if out.width != llm.width:
        plan.problems.append(
            f"vision.adapter: {run.vision.adapter.name!r} gives width {out.width}, the language model has {llm.width}"
        )
    needed = plan.visual_tokens + len(run.tokens.image) + len(run.tokens.views) * (views.counts[1] - 1) + 2
    if needed >= llm.context_length:
        plan.problems.append(
            f"llm: the context of {llm.context_length} positions is too short for {plan.visual_tokens} visual tokens "
            f"({views.counts[1]} views of an image) with any text; choose an encoder or adapter with fewer tokens, "
            "fewer tiles, or a longer context"
        )
    if sample is not None and plan.valid:
        plan.cost = run_cost(run, encoders, llm, views.counts[1], plan.visual_tokens, plan.parameters, sample)
    return _finish(plan, run, llm)


def _finish(plan: RunPlan, run: RunConfig, llm: LanguageModelSpec | None) -> RunPlan:
    """Fills in what is trained, and finds stages that would train nothing."""
    learning = plan.parameters | ({} if llm is None else {"llm": llm.trainable})
    plan.trained = {part: learning[part] for part in PARTS if part in run.trained and part in learning}
    for stage in run.stages:
        known = [plan.parameters.get(part) for part in stage.train]
        if known and all(count == 0 for count in known):
            plan.problems.append(
                f"stages.{stage.name}.train: {list(stage.train)} hold no parameter; nothing would learn"
            )
    return plan
