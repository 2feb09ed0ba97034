"""What trials have in common for the pool that places them: loaded parts, and what they ask of a GPU."""

from __future__ import annotations

import json
from dataclasses import dataclass

from chiasm.config import RunConfig
from chiasm.plan import RunPlan
from chiasm_experiments.training.cache import identity


@dataclass(frozen=True, slots=True)
class Load:
    """What a trial asks of a GPU, as far as its plan tells.

    Neither what the weights are nor the seed counts, so that few trials are measured alone.

    Args:
        kind: equal for the same models, trained alike.
        sizes: of the models and of what they work on.
    """

    kind: str
    sizes: tuple[int, ...] = ()

    def covers(self, other: Load) -> bool:
        """Whether a trial of the other load does no more, at any place, than one of this."""
        return (
            self.kind == other.kind
            and len(self.sizes) == len(other.sizes)
            and all(mine >= theirs for mine, theirs in zip(self.sizes, other.sizes, strict=True))
        )


@dataclass(frozen=True, slots=True)
class Key:
    """What a pool goes by.

    Args:
        parts: equal where one trial finds what another has loaded.
        load: what it asks of a GPU.
    """

    parts: str
    load: Load


def make_key(run: RunConfig, plan: RunPlan) -> Key:
    """The key of a trial."""
    return Key(warm_key(run), load_of(run, plan))


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


def load_of(run: RunConfig, plan: RunPlan) -> Load:
    """The load of a run.

    Args:
        run: its stages.
        plan: its sizes.
    """
    sequence = plan.sequence
    kind = [
        [ref.name for ref in run.vision.encoders],
        run.llm.name,
        plan.matrix_bits,
        [[sorted(stage.train), stage.batch_size, stage.micro_batch_size] for stage in run.stages],
        run.precision,
    ]
    # connectors are small beside these, and would each be measured alone
    models = [plan.parameters.get("encoders", 0), plan.parameters.get("llm", 0)]
    tokens = [0, 0] if sequence is None else [sequence.tokens, sequence.width]
    return Load(json.dumps(kind), (*models, *(plan.views or (0, 0)), plan.visual_tokens or 0, *tokens))
