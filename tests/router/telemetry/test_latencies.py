"""Latencies are counted in the buckets that vLLM has."""

from __future__ import annotations

import doctest
import importlib.util
import runpy
from pathlib import Path

import pytest

from vllm_rvec.router.telemetry import latencies
from vllm_rvec.router.telemetry.latencies import Latencies


def test_a_latency_on_a_bound_is_counted_below_it() -> None:
    """As Prometheus' `le` says: less or equal."""
    counted = Latencies((0.1, 1.0))
    for seconds in (0.1, 0.100001, 1.0, 1.1):
        counted.add(seconds)
    assert counted.cumulative() == [1, 3, 4]


def test_merged_latencies_are_those_of_both() -> None:
    """Counts and sums add up, and the other is left as it was."""
    one, other = Latencies((1.0,)), Latencies((1.0,))
    one.add(0.5)
    other.add(2.0, times=3)
    one.merge(other)
    assert (one.cumulative(), one.total_seconds, one.count) == ([1, 4], 6.5, 4)
    assert other.cumulative() == [0, 3]


def test_the_examples_in_the_documentation_hold() -> None:
    """The doctests pass."""
    assert doctest.testmod(latencies).failed == 0


def test_the_buckets_are_those_of_vllm() -> None:
    """So that the router's histograms and the engines' fit in one graph."""
    if (vllm := importlib.util.find_spec("vllm")) is None or vllm.origin is None:
        pytest.skip("vLLM is not installed")
    # By its path: importing vLLM itself takes seconds.
    buckets = runpy.run_path(str(Path(vllm.origin).parent / "v1/metrics/buckets.py"))
    assert buckets["TIME_TO_FIRST_TOKEN_BUCKETS"] == latencies.TIME_TO_FIRST_TOKEN_BUCKETS
    assert buckets["INTER_TOKEN_LATENCY_BUCKETS"] == latencies.INTER_TOKEN_BUCKETS
    assert buckets["REQUEST_LATENCY_BUCKETS"] == latencies.REQUEST_BUCKETS
