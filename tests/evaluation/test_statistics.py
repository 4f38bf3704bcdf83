"""vllm_rvec.evaluation.statistics: published values, scipy's, and exact coverage."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from vllm_rvec.evaluation import statistics
from vllm_rvec.evaluation.statistics import (
    POWER,
    detectable_effect,
    holm,
    mcnemar_p,
    needed_problems,
    paired_interval,
    power_of,
    ratio_of_lengths,
)

COUNTS = st.integers(0, 60)


def test_examples_hold() -> None:
    """The doctests pass."""
    assert doctest.testmod(statistics).failed == 0


@pytest.mark.parametrize(
    ("gained", "lost", "n", "expected"),
    [
        (1, 7, 21, (-0.517, -0.026)),
        (6, 16, 161, (-0.124, -0.005)),
    ],
)
def test_tangos_interval_gives_published_values(
    gained: int, lost: int, n: int, expected: tuple[float, float]
) -> None:
    """Airway hyper-responsiveness (Bentur) and complete response (Cavo), both in Fagerland 2014."""
    found = paired_interval(gained, lost, n)
    assert found is not None
    assert (round(found.low, 3), round(found.high, 3)) == expected


def test_no_difference_seen_still_has_an_interval() -> None:
    """Without a discordant pair Tango's limits are ± z² / (n + z²)."""
    found = paired_interval(0, 0, 30)
    z2 = float(stats.norm.ppf(0.975)) ** 2
    assert found is not None
    assert found.high == pytest.approx(z2 / (30 + z2), rel=1e-9)
    assert found.low == pytest.approx(-found.high)


@given(COUNTS, COUNTS, st.integers(0, 200))
def test_the_interval_is_around_the_difference_and_mirrors(
    gained: int, lost: int, alike: int
) -> None:
    """It holds what was seen, stays within -1 and 1, and swapping the arms swaps its ends."""
    n = gained + lost + alike
    found, mirrored = paired_interval(gained, lost, n), paired_interval(lost, gained, n)
    if n == 0:
        assert found is None
        return
    assert found is not None
    assert mirrored is not None
    assert -1 <= found.low <= (gained - lost) / n + 1e-9
    assert (gained - lost) / n - 1e-9 <= found.high <= 1
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low), abs=1e-9)


@given(COUNTS, COUNTS, st.integers(1, 200))
def test_the_interval_excludes_zero_where_the_score_test_does(
    gained: int, lost: int, alike: int
) -> None:
    """(gained - lost)² / (gained + lost) against chi square at 5 %."""
    found = paired_interval(gained, lost, gained + lost + alike)
    assert found is not None
    score = (gained - lost) ** 2 / max(1, gained + lost)
    if abs(score - stats.chi2.ppf(0.95, 1)) > 1e-6:
        assert (found.low > 0 or found.high < 0) == (score > stats.chi2.ppf(0.95, 1))


@pytest.mark.parametrize("n", [20, 50])
def test_interval_and_test_hold_their_level_at_small_n(n: int) -> None:
    """Exact, over every table: coverage at least 93 %, on average 95 %; size under 5.1 %.

    Discordance from 2 % to 80 %, differences from none to nearly all of it.
    """
    tables = [(gained, lost) for gained in range(n + 1) for lost in range(n + 1 - gained)]
    intervals = [paired_interval(gained, lost, n) for gained, lost in tables]
    lows = np.array([one.low for one in intervals if one is not None])
    highs = np.array([one.high for one in intervals if one is not None])
    rejected = np.array([mcnemar_p(*table) < 0.05 for table in tables])
    outcomes = np.array([(gained, lost, n - gained - lost) for gained, lost in tables])
    coverages = []
    for discordance in (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8):
        for difference in np.linspace(0, discordance, 5, endpoint=False):
            rates = (discordance + difference) / 2, (discordance - difference) / 2, 1 - discordance
            weights = stats.multinomial.pmf(outcomes, n, rates)
            coverages.append(weights[(lows <= difference) & (difference <= highs)].sum())
            if difference == 0:
                assert weights[rejected].sum() < 0.051
    assert min(coverages) > 0.93
    assert np.mean(coverages) > 0.95


@given(COUNTS, COUNTS)
def test_mid_p_is_the_exact_p_less_half_of_what_was_seen(gained: int, lost: int) -> None:
    """Scipy's exact binomial test, two-sided, less the probability of the counts seen."""
    n = gained + lost
    if gained == lost:
        seen = float(stats.binom.pmf(gained, n, 0.5)) if n else 0.0
        assert mcnemar_p(gained, lost) == pytest.approx(1 - seen / 2)
        return
    exact = stats.binomtest(gained, n, 0.5).pvalue
    expected = exact - float(stats.binom.pmf(gained, n, 0.5))
    assert mcnemar_p(gained, lost) == pytest.approx(expected, rel=1e-9)
    assert mcnemar_p(gained, lost) == mcnemar_p(lost, gained)


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values: list[float]) -> None:
    """From the smallest: p against 5 % over how many are left, until the first that fails."""
    adjusted = holm(p_values)
    ranked = sorted(p_values)
    passed = 0
    while passed < len(ranked) and ranked[passed] * (len(ranked) - passed) < 0.05:
        passed += 1
    assert sum(p < 0.05 for p in adjusted) == passed
    assert all(p <= adjusted_p <= 1 for p, adjusted_p in zip(p_values, adjusted, strict=True))


@given(st.floats(0.01, 0.9), st.floats(0.01, 1))
def test_the_needed_problems_just_reach_the_power(share: float, discordance: float) -> None:
    """One problem fewer has less than the power that was asked for."""
    effect = share * discordance
    n = needed_problems(effect, discordance)
    assert power_of(effect, discordance, n) >= POWER - 1e-9
    assert n == 1 or power_of(effect, discordance, n - 1) < POWER + 1e-9


def test_the_planned_power_is_what_the_exact_test_has() -> None:
    """By enumeration of every table: within three points of what Connor's formula plans."""
    for effect, discordance in ((0.1, 0.2), (0.15, 0.3), (0.2, 0.4)):
        n = needed_problems(effect, discordance)
        pairs = np.arange(n + 1)
        power = 0.0
        for k, weight in enumerate(stats.binom.pmf(pairs, n, discordance)):
            if weight > 1e-6:
                gained = np.arange(k // 2 + 1, k + 1)
                found = np.array([mcnemar_p(int(one), int(k - one)) < 0.05 for one in gained])
                chances = stats.binom.pmf(gained, k, (1 + effect / discordance) / 2)
                power += weight * float(chances[found].sum())
        assert power == pytest.approx(POWER, abs=0.03)


@given(st.integers(5, 5000), st.floats(0, 1))
def test_the_detectable_effect_has_the_power(n: int, discordance: float) -> None:
    """What is said to be found four times out of five is, and a bit less isn't."""
    effect = detectable_effect(n, discordance)
    assert effect is not None
    assert power_of(effect, max(effect, discordance), n) >= POWER - 1e-6
    less = effect * 0.99
    assert power_of(less, max(less, discordance), n) < POWER


def test_too_few_problems_show_nothing() -> None:
    """With four problems no outcome is significant, so no effect is detectable."""
    assert detectable_effect(4, 0.5) is None
    assert mcnemar_p(4, 0) > 0.05
    assert mcnemar_p(5, 0) < 0.05
    assert mcnemar_p(0, 0) == 1
    assert power_of(0.1, 0.05, 100) == power_of(0.0, 0.5, 100) == power_of(0.1, 0.2, 0) == 0


@pytest.mark.parametrize(
    ("effect", "discordance", "power"),
    [(0.0, 0.2, 0.8), (0.3, 0.2, 0.8), (0.1, 1.1, 0.8), (0.1, 0.2, 1.0)],
)
def test_impossible_plans_are_refused(effect: float, discordance: float, power: float) -> None:
    """No effect, one larger than the discordance, no share, certainty."""
    with pytest.raises(ValueError, match="between 0 and"):
        needed_problems(effect, discordance, power)


@given(st.lists(st.tuples(st.integers(1, 500), st.integers(1, 500)), min_size=2, max_size=40))
def test_the_ratio_of_lengths_is_the_t_interval_of_logarithms(pairs: list[tuple[int, int]]) -> None:
    """scipy's, of the mean log ratio."""
    lengths, references = np.array(pairs, dtype=float).T
    logs = np.log(lengths / references)
    found = ratio_of_lengths(lengths, references)
    assert found.value == pytest.approx(math.exp(logs.mean()))
    if np.std(logs) < 1e-9:
        return
    low, high = stats.t.interval(0.95, logs.size - 1, logs.mean(), stats.sem(logs))
    assert found.interval is not None
    assert (found.interval.low, found.interval.high) == pytest.approx(
        (math.exp(low), math.exp(high)), rel=1e-6
    )


def test_lengths_without_spread_have_no_interval() -> None:
    """One problem, all ratios alike, empty answers: a value, and no exception."""
    assert ratio_of_lengths(np.array([8.0]), np.array([4.0])).interval is None
    assert ratio_of_lengths(np.array([8.0, 6.0]), np.array([4.0, 3.0])).interval is None
    assert ratio_of_lengths(np.array([0.0]), np.array([4.0])).value == 0.25
