"""What trials have in common for the pool that places them: loaded parts, and what they ask of a GPU."""

from __future__ import annotations

import json
from dataclasses import dataclass

from chiasm.config import RunConfig
from chiasm.plan import RunPlan
from chiasm_experiments.training.cache import identity


@dataclass(frozen=True, slots=True)
class Key:
    """What a pool goes by.

    Args:
        parts: equal where one trial finds what another has loaded.
        load: equal where one trial keeps a GPU as busy as another, and its memory as full.
    """

    parts: str
    load: str


def make_key(run: RunConfig, plan: RunPlan) -> Key:
    """The key of a trial."""
    return Key(warm_key(run), load_key(run, plan))


def warm_key(run: RunConfig) -> str:
    """Equal for runs whose frozen encoders and language model are the same, so that one finds the other's loaded.

    Args:
        run: with its seed, which random weights depend on.
    """
    parts = []
    if "encoders" not in run.trained:
        for place, ref in enumerate(run.vision.encoders):
            pretrained = ref.options.get("pretrained") is not None
            parts.append(identity("encoder", ref, f"{run.seed}/encoder.{place}", run.precision, pretrained))
    if "llm" not in run.trained:
        pretrained = run.llm.options.get("pretrained") is not None
        parts.append(identity("llm", run.llm, f"{run.seed}/llm", run.precision, pretrained))
    return json.dumps(parts)


def load_key(run: RunConfig, plan: RunPlan) -> str:
    """Equal for runs that do about the same work: models of one size in memory on as many tokens, trained alike.

    Neither what the weights are nor the seed counts, so that few trials are measured alone.

    Args:
        run: its stages.
        plan: its sizes.
    """
    sequence = plan.sequence
    return json.dumps(
        [
            [run.vision.encoders[i].name for i in range(len(run.vision.encoders))],
            run.llm.name,
            plan.parameters.get("encoders"),
            plan.parameters.get("llm"),
            plan.matrix_bits,
            plan.views,
            plan.visual_tokens,
            None if sequence is None else [sequence.tokens, sequence.width],
            [[sorted(stage.train), stage.batch_size, stage.micro_batch_size] for stage in run.stages],
            run.precision,
        ]
    )
