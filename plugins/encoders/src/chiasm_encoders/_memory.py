"""What a vision encoder that learns keeps for its backward pass, counted on fake tensors.

Shape letters: B views, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from chiasm.cost import saved_bytes
from chiasm.image import ImageSpec


def activation_bytes(module: nn.Module, forward: Callable[[Tensor], Tensor], image: ImageSpec) -> int:
    """Bytes that one view keeps between forward and backward, with bfloat16 computation.

    Attention is taken to be a kernel that keeps no square of tokens, as a GPU's is.

    Args:
        module: on the meta device; its tensors are replaced by fake ones.
        forward: pixels `[B, 3, H, W]` to what comes out, through the module.
        image: the pixels that it wants.
    """
    # tensors that `forward` brings along are real
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16):
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                part.register_parameter(name, nn.Parameter(torch.empty(parameter.shape)))
            for name, buffer in part.named_buffers(recurse=False):
                setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype))

        def kept(views: int) -> int:
            pixels_B3HW = torch.empty(views, 3, image.height, image.width)
            return saved_bytes(lambda: forward(pixels_B3HW), module.train())

        return kept(2) - kept(1)  # less what does not grow with the views: bfloat16 copies of the weights
