"""`ContractError`: a component breaks a promise of its kind."""

from __future__ import annotations


class ContractError(AssertionError):
    """What was found, what was wanted, and where to look.

    `forward returned (1, 16, 8), declared (B, N, D) = (1, 17, 8)`
    """
