"""Values with their intervals: what the router's experiments and an evaluation's sweeps both need.

Pure functions without imports, so that a router starts as fast with them as without.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["CONFIDENCE", "Estimate", "Interval", "Z", "quantile", "wilson"]

CONFIDENCE = 0.95
"""Of every interval."""
Z = 1.959963984540054
"""The standard normal distribution's quantile at 97.5 %."""


@dataclass(frozen=True, slots=True)
class Interval:
    """From `low` to `high`, at 95 % confidence."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value, and its interval where there is one."""

    value: float
    interval: Interval | None


def wilson(successes: float, n: float) -> Interval | None:
    """Wilson's score interval of a rate.

    E. B. Wilson, JASA 22 (1927) 209; as in Newcombe, Statistics in Medicine 17 (1998) 857,
    method 3.

    Args:
        successes: At most n; need not be whole (an effective number).
        n: Trials.

    Returns:
        None without trials.

    >>> interval = wilson(81, 263)
    >>> f"{interval.low:.4f} {interval.high:.4f}"
    '0.2553 0.3662'
    """
    if not n > 0:
        return None
    p = successes / n
    scale = 1 + Z * Z / n
    centre = p + Z * Z / (2 * n)
    half = Z * math.sqrt(max(0.0, p * (1 - p)) / n + Z * Z / (4 * n * n))
    low = 0.0 if p <= 0 else max(0.0, (centre - half) / scale)
    high = 1.0 if p >= 1 else min(1.0, (centre + half) / scale)
    return Interval(low, high)


def quantile(ordered: Sequence[float], share: float) -> float | None:
    """A quantile, with linear interpolation.

    Hyndman and Fan, American Statistician 50 (1996) 361, type 7: numpy's default.

    Args:
        ordered: Ascending, without NaN.
        share: 0.5 for the median.

    >>> quantile([1.0, 2.0, 4.0], 0.75)
    3.0
    """
    if not ordered:
        return None
    place = (len(ordered) - 1) * share
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
