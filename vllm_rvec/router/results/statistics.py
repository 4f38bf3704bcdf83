"""The statistics of an experiment: intervals, differences, the test of the split.

Pure functions of sums. A unit (a user, a session) makes several requests, and these are more alike
than those of different units; so all that is said of requests is made robust to clusters: the
variance is that of a ratio of per-unit sums (delta method), and where each unit has one request
it is the textbook's formula to the last digit. What can't be calculated (no data, one unit, no
spread) is None, never NaN. Reads no data and finds no words: that is for `reader` and `verdict`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from vllm_rvec.intervals import CONFIDENCE, Estimate, Interval, Z, wilson

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import ModuleType

__all__ = [
    "Clusters",
    "Difference",
    "effective_size",
    "mean_difference",
    "mean_of",
    "rate_difference",
    "rate_of",
    "sample_ratio_p",
    "size_factor",
]

POWER = 0.8
MIN_EXPECTED_UNITS = 5
"""Of each variant, for the chi-square distribution to be near (Cochran 1954)."""
ROUNDING = 1e-12
"""Of a sum of squares: what is smaller after a subtraction is no spread but rounding."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A variant's value less the first variant's.

    Args:
        value: The difference.
        interval: Its 95 % interval.
        p_value: Two-sided, of no difference.
        standard_error: Of the difference; what `size_factor` reads.
    """

    value: float
    interval: Interval | None
    p_value: float | None
    standard_error: float | None


@dataclass(frozen=True, slots=True)
class Clusters:
    """Sums over units, each with n requests whose values add up to s.

    Args:
        units: How many units.
        requests: Sum of n.
        squared_requests: Sum of n².
        total: Sum of s.
        squared_totals: Sum of s².
        products: Sum of s·n.
    """

    units: int = 0
    requests: float = 0.0
    squared_requests: float = 0.0
    total: float = 0.0
    squared_totals: float = 0.0
    products: float = 0.0

    @classmethod
    def of(cls, units: Iterable[tuple[int, float]]) -> Clusters:
        """Add up units.

        Args:
            units: Of each unit: its requests, and the sum of their values.

        >>> Clusters.of([(2, 1.0), (1, 1.0)]).mean
        0.6666666666666666
        """
        counted = [(n, s) for n, s in units if n > 0]
        return cls(
            units=len(counted),
            requests=float(sum(n for n, _ in counted)),
            squared_requests=float(sum(n * n for n, _ in counted)),
            total=math.fsum(s for _, s in counted),
            squared_totals=math.fsum(s * s for _, s in counted),
            products=math.fsum(s * n for n, s in counted),
        )

    @property
    def mean(self) -> float | None:
        """The mean over requests."""
        if not self.requests or not math.isfinite(self.total):
            return None
        return self.total / self.requests

    @property
    def variance_of_mean(self) -> float | None:
        """The variance of `mean`, robust to clusters.

        K/(K-1) · sum of (s - mean·n)² / N², with K units and N requests: the linearised variance
        of a ratio (Cochran, Sampling Techniques, 3rd ed. 1977, eq. 6.13 and 11.30; for online
        experiments Deng, Knoblich and Lu, KDD 2018, arXiv:1803.06336, section 3). With one request
        for each unit it is s²/N.

        Returns:
            None with fewer than two units; 0 where there is no spread.
        """
        mean = self.mean
        if self.units < 2 or mean is None:
            return None
        squares = (
            self.squared_totals - 2 * mean * self.products + mean * mean * self.squared_requests
        )
        if not math.isfinite(squares):
            return None
        if squares <= ROUNDING * self.squared_totals:
            return 0.0
        return self.units / (self.units - 1) * squares / self.requests**2


def effective_size(clusters: Clusters) -> float:
    """How many independent requests a rate's clusters are worth.

    N over the design effect, which is the robust variance over that of independent requests
    (Kish, Survey Sampling, 1965), times the squared ratio of t quantiles at N - 1 and K - 1 degrees
    of freedom, for the variance was estimated from K units (Korn and Graubard, Survey Methodology
    24 (1998) 193). A design effect under 1 is taken for chance. Where all values are alike, or
    there is one unit, the variance tells nothing: the requests of a unit are then taken for copies
    of each other, N² over the sum of n² (Kish).

    Returns:
        N itself where each unit has one request.
    """
    rate, variance, n = clusters.mean, clusters.variance_of_mean, clusters.requests
    if rate is None:
        return 0.0
    spread = rate * (1 - rate)
    if not variance or spread <= 0:
        return n * n / clusters.squared_requests
    design_effect = max(1.0, variance / (spread / (n - 1)))
    quantile_ratio = 1.0
    if clusters.units < n:
        quantile_ratio = _t(n - 1) / _t(clusters.units - 1)
    return n / design_effect * quantile_ratio**2


def rate_of(clusters: Clusters) -> Estimate | None:
    """A rate with its Wilson interval at the effective number of requests.

    Returns:
        None without requests.
    """
    rate = clusters.mean
    if rate is None:
        return None
    n = effective_size(clusters)
    return Estimate(rate, wilson(rate * n, n))


def rate_difference(first: Clusters, second: Clusters) -> Difference | None:
    """The second rate less the first.

    The interval is Newcombe's, made of two Wilson intervals (Statistics in Medicine 17 (1998) 873,
    method 10); p is of the two-sided z test with the pooled rate (Fleiss, Levin and Paik,
    Statistical Methods for Rates and Proportions, 3rd ed. 2003, section 3.1, without continuity
    correction). Both at the effective numbers of requests.

    Returns:
        None where one has no requests.
    """
    one, other = rate_of(first), rate_of(second)
    if one is None or other is None or one.interval is None or other.interval is None:
        return None
    n1, n2 = effective_size(first), effective_size(second)
    value = other.value - one.value
    low = math.hypot(other.value - other.interval.low, one.interval.high - one.value)
    high = math.hypot(other.interval.high - other.value, one.value - one.interval.low)
    pooled = (one.value * n1 + other.value * n2) / (n1 + n2)
    variance = pooled * (1 - pooled) * (1 / n1 + 1 / n2)
    p_value = (
        2 * float(_special().ndtr(-abs(value) / math.sqrt(variance))) if variance > 0 else None
    )
    apart = one.value * (1 - one.value) / n1 + other.value * (1 - other.value) / n2
    interval = Interval(max(-1.0, value - low), min(1.0, value + high))
    return Difference(value, interval, p_value, math.sqrt(max(0.0, apart)))


def mean_of(clusters: Clusters) -> Estimate | None:
    """A mean with its t interval, at one degree of freedom fewer than there are units.

    Student's interval with the robust variance of `Clusters.variance_of_mean`.

    Returns:
        None without requests; no interval with one unit or no spread.
    """
    mean, variance = clusters.mean, clusters.variance_of_mean
    if mean is None:
        return None
    if not variance:
        return Estimate(mean, None)
    half = _t(clusters.units - 1) * math.sqrt(variance)
    return Estimate(mean, Interval(mean - half, mean + half))


def mean_difference(first: Clusters, second: Clusters) -> Difference | None:
    """The second mean less the first, by Welch's test.

    B. L. Welch, Biometrika 34 (1947) 28, degrees of freedom by Satterthwaite, Biometrics Bulletin
    2 (1946) 110; the variances are the robust ones and the degrees of freedom count units.

    Returns:
        None where one has no requests; no interval and p value where one has a single unit, or
        neither has spread.
    """
    one, other = first.mean, second.mean
    if one is None or other is None:
        return None
    value = other - one
    v1, v2 = first.variance_of_mean, second.variance_of_mean
    if v1 is None or v2 is None or not v1 + v2 > 0:
        return Difference(value, None, None, None)
    a, b = v1 / (v1 + v2), v2 / (v1 + v2)  # as shares: squares of tiny variances are 0
    freedom = 1 / (a * a / (first.units - 1) + b * b / (second.units - 1))
    error = math.sqrt(v1 + v2)
    half = _t(freedom) * error
    p_value = min(1.0, 2 * float(_special().stdtr(freedom, -abs(value) / error)))
    return Difference(value, Interval(value - half, value + half), p_value, error)


def sample_ratio_p(observed: Sequence[int], weights: Sequence[float]) -> float | None:
    """The p value of "the units are split as configured".

    Pearson's chi-square test of goodness of fit (Philosophical Magazine 50 (1900) 157), as used for
    sample ratio mismatch by Fabijan et al., KDD 2019. Units, not requests: it is units that were
    assigned, each once.

    Args:
        observed: Units of each variant.
        weights: Configured, in the same order, relative. Variants of weight 0 are left out.

    Returns:
        None with fewer than two variants, or where fewer than five units are expected of one: too
        few to tell.

    >>> f"{sample_ratio_p([821588, 815482], [1, 1]):.2g}"
    '1.8e-06'
    """
    pairs = [(n, w) for n, w in zip(observed, weights, strict=True) if w > 0]
    units, weight = sum(n for n, _ in pairs), math.fsum(w for _, w in pairs)
    if len(pairs) < 2 or not math.isfinite(weight):
        return None
    expected = [units * w / weight for _, w in pairs]
    if min(expected) < MIN_EXPECTED_UNITS:
        return None
    statistic = sum((n - e) ** 2 / e for (n, _), e in zip(pairs, expected, strict=True))
    return float(_special().chdtrc(len(pairs) - 1, statistic))


def size_factor(difference: Difference) -> float | None:
    """How many times the data would show a difference as large as the one seen.

    ((z of 97.5 % + z of 80 %) · standard error / difference)²: the sample size for a two-sided test
    at 5 % with 80 % power (Cohen, Statistical Power Analysis, 2nd ed. 1988), over the one there is.

    Returns:
        None where there is no difference, or its error isn't known.
    """
    if not difference.value or not difference.standard_error:
        return None
    wanted = Z + float(_special().ndtri(POWER))
    factor = (wanted * difference.standard_error / difference.value) ** 2
    return factor if math.isfinite(factor) else None


def _t(freedom: float) -> float:
    return float(_special().stdtrit(freedom, (1 + CONFIDENCE) / 2))


def _special() -> ModuleType:
    """The distributions: memory that a router needs only when somebody asks for results."""
    return import_module("scipy.special")
