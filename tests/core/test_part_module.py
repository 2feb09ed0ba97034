"""What stands under a name of the interface would be hidden by it, and never run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from chiasm.testing.stand_ins import StandInLanguageModel


@pytest.mark.parametrize(
    ("name", "value"),
    [("block_modules", nn.ModuleList()), ("packs", nn.Linear(1, 1)), ("embed", nn.Parameter(torch.ones(1)))],
)
def test_a_submodule_under_a_name_of_the_interface_is_refused(name, value):
    llm = StandInLanguageModel.tiny()
    with pytest.raises(AttributeError, match=rf"named '{name}' would be hidden by .*{name}, .*otherwise"):
        setattr(llm, name, value)
    assert name not in dict(llm.named_modules()) | dict(llm.named_parameters())


def test_other_names_are_free():
    llm = StandInLanguageModel.tiny()
    llm.blocks = nn.ModuleList([nn.Linear(1, 1)])
    assert llm.blocks[0] is dict(llm.named_modules())["blocks.0"]
