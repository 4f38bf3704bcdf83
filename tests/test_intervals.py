"""vllm_rvec.intervals: known values, and numpy's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from vllm_rvec.intervals import CONFIDENCE, Z, quantile, wilson


@pytest.mark.parametrize(
    ("successes", "n", "expected"),
    [
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
        (29, 29, (0.8830, 1.0)),
    ],
)
def test_wilson_gives_newcombes_table(
    successes: int, n: int, expected: tuple[float, float]
) -> None:
    """Newcombe 1998 (I), table I, method 3; and the last row its mirror image."""
    found = wilson(successes, n)
    assert found is not None
    assert (round(found.low, 4), round(found.high, 4)) == expected


def test_z_is_the_normal_quantile() -> None:
    """Two-sided, at the confidence that every interval has."""
    assert float(stats.norm.ppf((1 + CONFIDENCE) / 2)) == pytest.approx(Z, rel=1e-15)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 1))
def test_quantiles_are_numpys(numbers: list[float], share: float) -> None:
    """Linear interpolation, type 7."""
    found = quantile(sorted(numbers), share)
    assert found == pytest.approx(float(np.quantile(numbers, share)), rel=1e-9, abs=1e-6)


def test_nothing_has_no_interval_and_no_quantile() -> None:
    """None, and no NaN, no exception."""
    assert wilson(0, 0) is None
    assert quantile([], 0.5) is None
