"""Layers that several adapters share.

Shape letters: B images (or regions of images), Q queries, N keys, D width, H heads, K width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chiasm.errors import CombinationError


def perceptron(widths: Sequence[int], bias: bool = True, activation: type[nn.Module] = nn.GELU) -> nn.Sequential:
    """Linear layers of these widths with an activation between them, none after the last; layers are 0, 2, .."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [activation(), nn.Linear(before, after, bias=bias)]
    return nn.Sequential(*layers[1:])


def mlp_widths(width: int, depth: int, hidden: int | None, llm_width: int) -> list[int]:
    """Widths of an adapter's perceptron of `depth` layers; `hidden` null is the width of the language model."""
    return [width, *[hidden or llm_width] * (depth - 1), llm_width]


def check_heads(adapter: str, heads: int, width: int) -> None:
    """Raises CombinationError where heads do not divide the width that they share."""
    if width % heads:
        raise CombinationError(
            f"{adapter}: {heads} heads do not divide the width {width}; set `heads` to a divisor of it, or set `width`"
        )


class Attention(nn.Module):
    """Attention of queries to other tokens, `softmax(q k^T / sqrt(K)) v` in each head, without a mask.

    Each head takes its own K = D / H channels of the projections `query`, `key` and `value`; `output` mixes them. The
    keys never have a bias: it would move all scores of a query alike, which the softmax does not see.

    Args:
        width: D, of the queries, of keys and values, and of what comes out.
        heads: H, a divisor of the width.
        bias: gives the other three projections a bias.
    """

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=bias)
        self.output = nn.Linear(width, width, bias=bias)

    def forward(self, queries_BQD: Tensor, keys_BND: Tensor, values_BND: Tensor) -> Tensor:
        """`[B, Q, D]`, `[B, N, D]` and `[B, N, D]` to `[B, Q, D]`."""
        q_BHQK = self._heads(self.query(queries_BQD)).transpose(1, 2)
        k_BHNK = self._heads(self.key(keys_BND)).transpose(1, 2)
        v_BHNK = self._heads(self.value(values_BND)).transpose(1, 2)
        out_BHQK = F.scaled_dot_product_attention(q_BHQK, k_BHNK, v_BHNK)
        out_BQD: Tensor = self.output(out_BHQK.transpose(1, 2).flatten(2))
        return out_BQD

    def one_each(self, queries_BMD: Tensor, keys_BMND: Tensor, values_BMND: Tensor) -> Tensor:
        """`[B, M, D]` and twice `[B, M, N, D]` to `[B, M, D]`: query m attends to the m-th few tokens alone.

        Written out, as kernels of attention take at most 65535 sequences, and a batch of images has more regions.
        """
        q_BM1HK = self._heads(self.query(queries_BMD)).unsqueeze(2)
        k_BMNHK, v_BMNHK = self._heads(self.key(keys_BMND)), self._heads(self.value(values_BMND))
        scores_BMNH = (q_BM1HK * k_BMNHK).sum(-1) * k_BMNHK.shape[-1] ** -0.5
        out_BMHK = (scores_BMNH.softmax(2).unsqueeze(-1) * v_BMNHK).sum(2)
        out_BMD: Tensor = self.output(out_BMHK.flatten(2))
        return out_BMD

    def _heads(self, x_D: Tensor) -> Tensor:
        """`[..., D]` to `[..., H, K]`."""
        return torch.unflatten(x_D, -1, (self.heads, x_D.shape[-1] // self.heads))
