"""Which numbers can be an alpha. Imports no torch."""

from __future__ import annotations

import math

__all__ = ["alpha_problem"]

LARGEST_FLOAT32 = 3.4028234663852886e38
SMALLEST_FLOAT32 = 1.1754943508222875e-38
"""Smallest normal number: below it a float32 loses digits, and at last becomes zero."""


def alpha_problem(alpha: float) -> str:
    """Say why a number can't be an alpha; empty if it can.

    The formula takes alpha in float32, so it must be one that float32 holds.

    >>> alpha_problem(0.3), alpha_problem(float("nan")), alpha_problem(1e39)
    ('', 'is not finite', 'is beyond the range of float32')
    """
    if not math.isfinite(alpha):
        return "is not finite"
    if abs(alpha) > LARGEST_FLOAT32 or 0 < abs(alpha) < SMALLEST_FLOAT32:
        return "is beyond the range of float32"
    return ""
