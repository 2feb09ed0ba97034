"""The layers of one encoder, each normalised and projected, as one matrix product.

Shape letters: B images, L layers, N tokens, C channels in (L * D), D width of a layer, E width out; l counts layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from chiasm.features import FeatureSpec
from chiasm_adapters._compiled import compiled_on_gpu


class LayerProjections(nn.Module):
    """`sum_l a_l (W_l LN(h_l) + b_l)` for the layers of one encoder, `[B, L, N, D]` to `[B, N, E]`.

    Every LN has an affine map of its own (eps 1e-5). The W_l are one parameter `[E, L * D]` and act in one matrix
    product: scalars and affine maps go into the weight, `a W (g x + c) = (a W g) x + W (a c)`, so that features of a
    frozen encoder reach the product through no trained operation, and only one copy of them, the normalised one, is
    kept for backward. At the start each W_l and b_l has the distribution of its own `nn.Linear(D, E)`, bound
    1 / sqrt(D) whatever L is, and each a_l is 1 / L.

    Args:
        feature: the geometry of the encoder's features.
        width: E.
        layer_scalars: a_l are parameters; else they are the constant 1 / L.
        bias: b_l exist.
    """

    def __init__(self, feature: FeatureSpec, width: int, *, layer_scalars: bool, bias: bool) -> None:
        super().__init__()
        layers, bound = feature.layers, feature.width**-0.5  # that of nn.Linear(D, E), not nn.Linear(L * D, E)
        self.norm_weight = nn.Parameter(torch.ones(layers, feature.width))
        self.norm_bias = nn.Parameter(torch.zeros(layers, feature.width))
        self.weight = nn.Parameter(torch.empty(width, layers * feature.width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(layers, width).uniform_(-bound, bound)) if bias else None
        self.scalars = nn.Parameter(torch.full((layers,), 1 / layers)) if layer_scalars else None

    def forward(self, tokens_BLND: Tensor) -> Tensor:
        layers = len(self.norm_weight)
        scalars_L = self.weight.new_full((layers,), 1 / layers) if self.scalars is None else self.scalars
        scale_C = (scalars_L.unsqueeze(1) * self.norm_weight).flatten()
        shift_C = (scalars_L.unsqueeze(1) * self.norm_bias).flatten()
        device = tokens_BLND.device.type
        dtype = _autocast_dtype(device)
        # autocast would normalise in float32, and move twice the bytes, for a product that rounds to its dtype anyway;
        # the statistics are float32 in any case
        with torch.autocast(device, enabled=False):
            normal_BNC = _normalise(tokens_BLND, dtype or tokens_BLND.dtype)
            offset_E = None if self.bias is None else scalars_L @ self.bias
            out_BNE: Tensor = _FoldedProduct.apply(  # type: ignore[no-untyped-call]
                normal_BNC, self.weight, scale_C, shift_C, offset_E, dtype
            )
        return out_BNE


def _autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype of matrix products under autocast, None where it is off."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


class _FoldedProduct(torch.autograd.Function):
    """`x (W g)^T + W c + b`: x `[B, N, C]`, W `[E, C]`, g and c `[C]`, b `[E]` or None to `[B, N, E]`.

    As separate operations, the backward pass would move the gradient of the weight, which at 24 layers is as large as
    the features, again and again; here one pass makes both of what it gives.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_BNC: Tensor,
        weight_EC: Tensor,
        scale_C: Tensor,
        shift_C: Tensor,
        offset_E: Tensor | None,
        dtype: torch.dtype | None,
    ) -> Tensor:
        ctx.save_for_backward(x_BNC, weight_EC, scale_C, shift_C)
        folded_EC, constant_E = _fold(weight_EC, scale_C, shift_C, dtype or weight_EC.dtype)
        if offset_E is not None:
            constant_E = constant_E + offset_E
        return F.linear(x_BNC, folded_EC, constant_E.to(folded_EC.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BNE: Tensor) -> tuple[Tensor | None, ...]:
        x_BNC, weight_EC, scale_C, shift_C = ctx.saved_tensors
        grad_x = grad_weight = grad_scale = grad_shift = None
        with torch.autocast(grad_BNE.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = grad_BNE @ (weight_EC * scale_C).to(x_BNC.dtype)
            sum_E = grad_BNE.sum((0, 1), dtype=weight_EC.dtype)
            if ctx.needs_input_grad[3]:
                grad_shift = sum_E @ weight_EC
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                grad_folded_EC = grad_BNE.flatten(0, 1).T @ x_BNC.flatten(0, 1)
                grad_weight, grad_scale = _unfold(grad_folded_EC, weight_EC, scale_C, shift_C, sum_E)
        return grad_x, grad_weight, grad_scale, grad_shift, sum_E if ctx.needs_input_grad[4] else None, None


@compiled_on_gpu
def _normalise(tokens_BLND: Tensor, dtype: torch.dtype) -> Tensor:
    """Every layer's LN without its affine map, side by side: `[B, L, N, D]` to `[B, N, C]` in a dtype."""
    # side by side first, so that one pass reads each row of a layer, normalises it, and writes it to its place
    side_by_side_BNLD = tokens_BLND.transpose(1, 2)
    return F.layer_norm(side_by_side_BNLD, tokens_BLND.shape[-1:], eps=1e-5).flatten(2).to(dtype)


@compiled_on_gpu
def _unfold(
    grad_EC: Tensor, weight_EC: Tensor, scale_C: Tensor, shift_C: Tensor, sum_E: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of W and g from that of `W g`, and what the constant `W c` adds."""
    grad_weight_EC = grad_EC * scale_C + sum_E[:, None] * shift_C
    return grad_weight_EC, (grad_EC * weight_EC).sum(0)


@compiled_on_gpu
def _fold(weight_EC: Tensor, scale_C: Tensor, shift_C: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`W g` in a dtype, and the constant `W c`, from one pass over the weight."""
    return (weight_EC * scale_C).to(dtype), (weight_EC * shift_C).sum(1)
