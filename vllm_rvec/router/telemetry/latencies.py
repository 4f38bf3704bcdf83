"""Counting latencies in buckets: one bisection each, cheap enough for every chunk of a stream.

Prometheus' own histogram takes a lock for each observation, and can't
take many at once. How the counts are shown is `metrics`' business.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "INTER_TOKEN_BUCKETS",
    "REQUEST_BUCKETS",
    "TIME_TO_FIRST_TOKEN_BUCKETS",
    "Latencies",
]

# The buckets of vLLM's own histograms (vllm/v1/metrics/buckets.py of 0.32), so that the router's
# and the engines' stand side by side in one graph.

# fmt: off
TIME_TO_FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)
"""Of `vllm:time_to_first_token_seconds`."""

INTER_TOKEN_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0,
)
"""Of `vllm:inter_token_latency_seconds`."""

REQUEST_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0,
    240.0, 480.0, 960.0, 1920.0, 7680.0,
)
"""Of `vllm:e2e_request_latency_seconds`."""
# fmt: on


class Latencies:
    """How many latencies fell between which bounds.

    >>> latencies = Latencies((0.1, 1.0))
    >>> latencies.add(0.1)
    >>> latencies.add(5.0, times=2)
    >>> latencies.cumulative()
    [1, 1, 3]

    Args:
        bounds: Upper ends of the buckets in seconds, rising; one without end comes behind them.
    """

    __slots__ = ("_bounds", "_counts", "total_seconds")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.total_seconds = 0.0
        """The sum of all latencies."""

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(self._counts)

    def add(self, seconds: float, times: int = 1) -> None:
        """Count a latency.

        Args:
            seconds: How long it was.
            times: How many there are of this length.
        """
        self._counts[bisect_left(self._bounds, seconds)] += times
        self.total_seconds += seconds * times

    def merge(self, other: Latencies) -> None:
        """Add what others there are.

        Args:
            other: Counted between the same bounds.
        """
        self._counts = [a + b for a, b in zip(self._counts, other._counts, strict=True)]
        self.total_seconds += other.total_seconds

    def cumulative(self) -> list[int]:
        """How many are at most each bound, and how many there are at all."""
        return list(accumulate(self._counts))
