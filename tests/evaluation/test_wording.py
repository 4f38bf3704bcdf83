"""vllm_rvec.evaluation.wording: numbers as people read them."""

from __future__ import annotations

import doctest

from vllm_rvec.evaluation import wording
from vllm_rvec.evaluation.wording import between, p_number, share, times
from vllm_rvec.intervals import Interval


def test_examples_hold() -> None:
    """The doctests pass."""
    assert doctest.testmod(wording).failed == 0


def test_what_is_not_known_is_a_dash() -> None:
    """Or nothing, where it stands beside a value."""
    assert (share(None), p_number(None), between(None)) == ("-", "-", "")


def test_numbers_have_the_digits_that_they_deserve() -> None:
    """Points to a tenth with their sign, ratios to a tenth, p to two digits."""
    assert between(Interval(-0.021, 0.0996)) == "[-2.1, +10.0]"
    assert (times(2.345), times(12.3)) == ("2.3 times", "12 times")
    assert (p_number(0.04567), p_number(0.0)) == ("0.046", "< 0.0001")
