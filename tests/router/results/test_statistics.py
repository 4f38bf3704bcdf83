"""vllm_rvec.router.results.statistics: known values, reductions, simulation."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from vllm_rvec.intervals import Interval, wilson
from vllm_rvec.router.results.statistics import (
    Clusters,
    Difference,
    effective_size,
    mean_difference,
    mean_of,
    rate_difference,
    rate_of,
    sample_ratio_p,
    size_factor,
)

EXPERIMENTS = 200
FALSE_ALARMS = (2, 21)
"""Of 200 at 5 %: binomial, 99.8 % within."""


def singles(ups: int, n: int) -> Clusters:
    """Each request by a user of its own."""
    return Clusters.of([(1, 1.0)] * ups + [(1, 0.0)] * (n - ups))


def values(*numbers: float) -> Clusters:
    return Clusters.of((1, number) for number in numbers)


def rounded(interval: Interval | None) -> tuple[float, float]:
    assert interval is not None
    return round(interval.low, 4), round(interval.high, 4)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ((56, 70), (48, 80), (0.0524, 0.3339)),
        ((9, 10), (3, 10), (0.1705, 0.8090)),
        ((10, 10), (0, 10), (0.6075, 1.0)),
    ],
)
def test_the_difference_of_rates_gives_newcombes_table(
    one: tuple[int, int], other: tuple[int, int], expected: tuple[float, float]
) -> None:
    """Newcombe 1998 (II), table II, method 10; the tables have first less second."""
    difference = rate_difference(singles(*other), singles(*one))
    assert difference is not None
    assert rounded(difference.interval) == expected


def test_the_z_test_is_the_chi_square_test_of_the_two_by_two_table() -> None:
    """The pooled two-sided z test and Pearson's chi-square have the same p value."""
    difference = rate_difference(singles(48, 80), singles(56, 70))
    assert difference is not None
    expected = stats.chi2_contingency([[48, 32], [56, 14]], correction=False).pvalue
    assert difference.p_value == pytest.approx(expected, rel=1e-12)


@given(
    st.lists(st.floats(-100, 100), min_size=3, max_size=30),
    st.lists(st.floats(-100, 100), min_size=3, max_size=30),
)
def test_the_difference_of_means_is_welchs(one: list[float], other: list[float]) -> None:
    """With one request for each user it is scipy's Welch test, interval and all."""
    if np.std(one) < 0.01 or np.std(other) < 0.01:
        return
    found = mean_difference(values(*one), values(*other))
    expected = stats.ttest_ind(other, one, equal_var=False)
    low, high = expected.confidence_interval(0.95)
    assert found is not None
    assert found.interval is not None
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-6)
    assert (found.interval.low, found.interval.high) == pytest.approx((low, high), rel=1e-6)


@given(st.integers(0, 60), st.integers(1, 60))
def test_a_rate_of_single_requests_is_the_plain_wilson_interval(ups: int, more: int) -> None:
    """One request for each user: the design effect is 1, to the last digits."""
    n = ups + more
    found = rate_of(singles(ups, n))
    plain = wilson(ups, n)
    assert found is not None
    assert effective_size(singles(ups, n)) == pytest.approx(n, rel=1e-9)
    assert rounded(found.interval) == rounded(plain)


def test_requests_that_copy_each_other_count_once() -> None:
    """Ten users who each say the same five times are worth ten requests, or fewer."""
    copied = Clusters.of([(5, 5.0)] * 6 + [(5, 0.0)] * 4)
    assert effective_size(copied) <= 10
    assert effective_size(Clusters.of([(5, 5.0)] * 10)) == pytest.approx(10)


def test_one_user_proves_nothing() -> None:
    """A thousand votes of a single user are worth one."""
    one = rate_of(Clusters.of([(1000, 1000.0)]))
    assert one is not None
    assert rounded(one.interval) == rounded(wilson(1, 1))
    mean = mean_of(Clusters.of([(1000, 700.0)]))
    assert mean is not None
    assert mean.interval is None
    welch = mean_difference(Clusters.of([(9, 1.0)]), values(1, 2, 3))
    assert welch is not None
    assert (welch.interval, welch.p_value) == (None, None)


def test_what_can_not_be_calculated_is_none() -> None:
    """No data, all the same, infinite sums: None, and no NaN, no exception."""
    nothing = Clusters()
    assert rate_of(nothing) is None
    assert mean_of(nothing) is None
    assert rate_difference(nothing, singles(1, 2)) is None
    assert mean_difference(values(1), nothing) is None
    assert values(1e300, 1e300, -1e300).variance_of_mean is None
    assert Clusters.of([(1, math.inf)]).mean is None
    alike = mean_difference(values(*[0.1] * 7), values(*[0.2] * 7))
    assert alike is not None
    assert (alike.interval, alike.p_value) == (None, None)
    all_up = rate_difference(singles(5, 5), singles(6, 6))
    assert all_up is not None
    assert all_up.p_value is None
    assert size_factor(all_up) is None


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=8),
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=8),
)
def test_no_data_gives_a_number_that_is_none(
    one: list[tuple[int, int]], other: list[tuple[int, int]]
) -> None:
    """Whatever the clusters: intervals lie around the value, p is a probability."""
    first, second = (Clusters.of((n, float(min(n, s))) for n, s in pairs) for pairs in (one, other))
    for found in (rate_difference(first, second), mean_difference(first, second)):
        if found is None:
            continue
        assert math.isfinite(found.value)
        assert found.p_value is None or 0 <= found.p_value <= 1
        if found.interval is not None:
            assert found.interval.low <= found.value + 1e-9
            assert found.value <= found.interval.high + 1e-9


def test_the_split_is_tested_as_scipy_tests_it() -> None:
    """Pearson's chi-square against relative weights; variants of weight 0 are left out."""
    expected = stats.chisquare([510, 270, 220], [500, 250, 250]).pvalue
    assert sample_ratio_p([510, 270, 220], [2, 1, 1]) == pytest.approx(expected)
    assert sample_ratio_p([510, 7, 270, 220], [2, 0, 1, 1]) == pytest.approx(expected)
    assert sample_ratio_p([500, 500], [1, 1]) == 1


@pytest.mark.parametrize("observed", [[], [5], [0, 0], [3, 4], [400, 0]])
def test_too_few_units_tell_nothing_of_the_split(observed: list[int]) -> None:
    """No p value where the chi-square distribution is far off."""
    weights = [99.0, 1.0] if observed == [400, 0] else [1.0] * len(observed)
    assert sample_ratio_p(observed, weights) is None


def test_the_size_factor_is_one_where_the_power_is_reached() -> None:
    """A difference of 2.8 standard errors (1.96 + 0.84) is what 80 % power means."""
    assert size_factor(Difference(2.8016, None, None, 1.0)) == pytest.approx(1, abs=1e-3)
    assert size_factor(Difference(1.4008, None, None, 1.0)) == pytest.approx(4, abs=1e-3)


def votes_of_users(rng: random.Random, users: int) -> list[tuple[int, float]]:
    """Users who each have a taste, and few or many requests."""
    pairs = []
    for _ in range(users):
        taste, n = rng.betavariate(0.7, 0.7), min(40, 1 + int(rng.expovariate(0.12)))
        pairs.append((n, float(sum(rng.random() < taste for _ in range(n)))))
    return pairs


def apart(pairs: list[tuple[int, float]]) -> Clusters:
    """As if each request came from a user of its own: the naive way."""
    return singles(int(sum(s for _, s in pairs)), sum(n for n, _ in pairs))


def is_alarm(difference: Difference | None) -> bool:
    assert difference is not None
    assert difference.p_value is not None
    return difference.p_value < 0.05


def test_equal_variants_give_false_alarms_at_the_nominal_rate() -> None:
    """200 A/A experiments whose users vote several times: about 5 % alarms, votes and means.

    The test that takes each request for a user of its own would cry wolf about half of the time.
    """
    rng = random.Random(20261)  # noqa: S311 - a simulation
    rates = means = naive = 0
    for _ in range(EXPERIMENTS):
        one, other = votes_of_users(rng, 80), votes_of_users(rng, 80)
        rates += is_alarm(rate_difference(Clusters.of(one), Clusters.of(other)))
        means += is_alarm(mean_difference(Clusters.of(one), Clusters.of(other)))
        naive += is_alarm(rate_difference(apart(one), apart(other)))
    low, high = FALSE_ALARMS
    assert low <= rates <= high
    assert low <= means <= high
    assert naive > 0.3 * EXPERIMENTS


def test_the_interval_of_a_rate_holds_the_truth_as_often_as_it_says() -> None:
    """Clustered votes with a true rate of 0.5: at least 90 % of the 95 % intervals have it.

    Each user is as likely in any experiment, so the truth is the mean over requests.
    """
    rng = random.Random(7)  # noqa: S311 - a simulation
    held = 0
    for _ in range(EXPERIMENTS):
        found = rate_of(Clusters.of(votes_of_users(rng, 40)))
        assert found is not None
        assert found.interval is not None
        held += found.interval.low <= 0.5 <= found.interval.high
    assert EXPERIMENTS - held <= FALSE_ALARMS[1]


def test_a_fair_split_is_rarely_suspected_and_a_lossy_one_is() -> None:
    """1,000 fair splits of 1,000 users: p < 0.001 at most five times; 10 % lost: nearly always."""
    rng = np.random.default_rng(3)
    fair = rng.binomial(1000, 0.5, size=1000)
    suspected = sum((sample_ratio_p([int(n), 1000 - int(n)], [1, 1]) or 0) < 0.001 for n in fair)
    assert suspected <= 5
    lossy = sample_ratio_p([10_000, 9_000], [1, 1])
    assert lossy is not None
    assert lossy < 0.001
