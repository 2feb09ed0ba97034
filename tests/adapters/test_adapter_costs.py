"""What the plan says that an adapter costs, against what torch counts in a pass over numbers."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from chiasm.config import RunConfig
from chiasm.cost import connector_cost
from chiasm.features import FeatureSpec, TokenSequence
from chiasm.registry import registry

CASES = [(name, {}) for name in registry().names("adapter")]
# its latents and tokens reach the first layer as they are
CASES.append(("resampler", {"positions": "none", "width": None, "heads": 1}))


@pytest.mark.parametrize(("name", "fields"), CASES, ids=[f"{name}{len(fields) or ''}" for name, fields in CASES])
def test_operations_of_an_adapter_are_those_that_torch_counts(name, fields):
    cls = registry().load("adapter", name)
    tiny = cls.tiny()
    config = cls.Config.model_validate(tiny.config.model_dump(exclude_unset=True) | fields)
    spec, llm_width = tiny.sequence, tiny.llm_width
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        cls(config, spec, llm_width)(TokenSequence(torch.randn(1, spec.tokens, spec.width), spec.grid))
    vision = {"encoders": ["clip"], "fusion": "single", "adapter": {"name": name, **config.model_dump(mode="json")}}
    stage = {"name": "s", "data": "world", "train": ["adapter"], "lr": 1e-3, "batch_size": 4}
    run = RunConfig.model_validate({"vision": vision, "llm": "causal", "stages": [stage]})
    cost = connector_cost(run, [FeatureSpec(1, spec.grid, spec.width)], llm_width)
    assert cost.flops == counter.get_total_flops()
    assert (cost.flops > 0) is (name != "identity")
