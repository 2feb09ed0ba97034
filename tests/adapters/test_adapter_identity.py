"""The adapter that does nothing, where that is right."""

from __future__ import annotations

import pytest
import torch

from chiasm.errors import CombinationError
from chiasm.features import FeatureSpec, SequenceSpec, TokenSequence
from chiasm_adapters.identity import Identity, IdentityConfig
from chiasm_adapters.project_sum import ProjectSum, ProjectSumConfig


@pytest.mark.parametrize("grid", [(2, 3), None])
def test_identity_hands_the_tokens_on(grid):
    spec = SequenceSpec(6, 9, grid)
    adapter = Identity(IdentityConfig(), spec, 9)
    sequence = TokenSequence(torch.randn(3, 6, 9, dtype=torch.bfloat16), grid)
    out = adapter(sequence)
    assert torch.equal(out.tokens, sequence.tokens)
    assert out.tokens.dtype == torch.bfloat16
    assert out.spec == adapter.out == spec
    assert list(adapter.parameters()) == []
    assert adapter.state_dict() == {}


def test_identity_fits_behind_a_fusion_that_projects():
    fusion = ProjectSum(ProjectSumConfig(), [FeatureSpec(2, (2, 3), 5)], 9)
    assert Identity(IdentityConfig(), fusion.out, 9).out == fusion.out


def test_identity_refuses_another_width():
    message = r"has the width 8, the language model 9; choose the adapter `linear`, or a fusion that projects"
    with pytest.raises(CombinationError, match=message):
        Identity.spec(IdentityConfig(), SequenceSpec(6, 8, (2, 3)), 9)
