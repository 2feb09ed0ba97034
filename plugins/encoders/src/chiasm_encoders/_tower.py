"""What an encoder runs of a vision transformer of the transformers library.

Shape letters: B images, H and W pixels, T tokens with CLS and registers, N patch tokens, L layers, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Tower(nn.Module):
    """What an encoder keeps of a transformers model: nothing that the selected layers do not need.

    Args:
        stem: pixels `[B, 3, H, W]` to the first block's input `[B, T, D]`.
        blocks: up to the last selected one.
        norm: applied to each selected layer.
        rotary: pixels to what rotates queries and keys in each block, where positions are no weights.
    """

    def __init__(
        self, stem: nn.Module, blocks: nn.ModuleList, norm: nn.Module, rotary: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = blocks
        self.norm = norm
        self.rotary = rotary

    def forward(self, pixels_B3HW: Tensor, arguments: Sequence[Any], layers: Sequence[int], prefix: int) -> Tensor:
        """Pixels to the patches of the selected layers, `[B, L, N, D]`.

        Args:
            pixels_B3HW: of the images.
            arguments: what each block wants after its input.
            layers: the selected blocks, from 1.
            prefix: tokens before the patches.
        """
        states_BND = {}
        hidden_BTD = self.stem(pixels_B3HW)
        for index, block in enumerate(self.blocks, start=1):
            hidden_BTD = block(hidden_BTD, *arguments)
            if index in layers:
                states_BND[index] = self.norm(hidden_BTD[:, prefix:])
        return torch.stack([states_BND[index] for index in layers], dim=1)

    def flops(self, patches: int, tokens: int, width: int) -> int:
        """Operations of one view: each matrix product of the patch embedding, of attention and of the MLPs."""
        convolutions = sum(m.weight.numel() for m in self.stem.modules() if isinstance(m, nn.Conv2d))
        linears = sum(m.weight.numel() for m in self.blocks.modules() if isinstance(m, nn.Linear))
        attention = 2 * tokens**2 * width * len(self.blocks)  # queries by keys, weights by values
        return 2 * (patches * convolutions + tokens * linears + attention)
