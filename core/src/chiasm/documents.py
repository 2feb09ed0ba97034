"""Documents: the sequences of a packed row, none of which sees another.

Shape letters: P documents and one more, T positions of the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Documents:
    """The documents of a packed row: no position sees another document's.

    Args:
        lengths: of the documents in order, the row's padding as the last of them.
        bounds_P: int32; where each begins, and the row's end.
        positions_1T: int64; the place of each position within its document.
        longest: positions that no document exceeds; a power of two, so that code compiled for one row serves others.
    """

    lengths: tuple[int, ...]
    bounds_P: Tensor
    positions_1T: Tensor
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Documents:
        """Documents of these lengths, one after the other."""
        bounds_P = np.cumsum([0, *lengths], dtype=np.int32)
        positions_T = np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])
        longest = 1 << (max(lengths) - 1).bit_length()
        return cls(tuple(lengths), torch.from_numpy(bounds_P), torch.from_numpy(positions_T).unsqueeze(0), longest)

    def to(self, device: torch.device | str) -> Documents:
        """The same documents on a device."""
        bounds_P, positions_1T = (x.to(device, non_blocking=True) for x in (self.bounds_P, self.positions_1T))
        return replace(self, bounds_P=bounds_P, positions_1T=positions_1T)
