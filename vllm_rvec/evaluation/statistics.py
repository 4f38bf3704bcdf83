"""The statistics of a sweep: two arms on the same problems, many alphas, planned power.

Pure functions of counts. All comparisons are paired, because every arm is asked the same problems:
what counts is where two arms differ, not how hard the problems are. Intervals and tests are those
that Fagerland, Lydersen and Laake recommend for paired binary data (Statistics in Medicine 33
(2014) 2850): they hold their level at a few dozen problems, where the textbook's don't.
Reads no answers and finds no words: that is for `grid` and `verdict`.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
from scipy import special

from vllm_rvec.intervals import CONFIDENCE, Estimate, Interval, Z

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = [
    "POWER",
    "detectable_effect",
    "holm",
    "mcnemar_p",
    "needed_problems",
    "paired_interval",
    "power_of",
    "ratio_of_lengths",
]

POWER = 0.8
"""Found four times out of five: what a planned sweep should have (Cohen 1988)."""

ROUNDING = 1e-24
"""Of a squared logarithm: no spread, but what subtraction leaves."""

FEWEST = 5
"""Problems: with four, McNemar's p is never under 0.05."""

HALVINGS = 45
"""Of an interval of length 1: to 13 digits."""


def paired_interval(gained: int, lost: int, n: int) -> Interval | None:
    """Tango's score interval of the difference of two rates on the same problems.

    All differences that a score test at 5 % doesn't reject. T. Tango, Statistics in Medicine 17
    (1998) 891; in the notation of his letter, Statistics in Medicine 18 (1999) 3511. The interval
    excludes 0 where McNemar's asymptotic test has p < 0.05.

    Args:
        gained: Problems that only the arm gets right.
        lost: Problems that only the reference gets right.
        n: Problems in all.

    Returns:
        None without problems.

    >>> interval = paired_interval(1, 7, 21)  # Bentur et al. 2009, in Fagerland's table VI
    >>> f"{interval.low:.3f} {interval.high:.3f}"
    '-0.517 -0.026'
    """
    if n <= 0:
        return None
    seen = (gained - lost) / n
    high = _score_limit(gained, lost, n, seen)
    low = -_score_limit(lost, gained, n, -seen)
    return Interval(low, high)


def _score_limit(gained: int, lost: int, n: int, seen: float) -> float:
    """The largest difference that isn't rejected, between the one seen and 1."""
    low, high = seen, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if -_score(gained, lost, n, middle) < Z:
            low = middle
        else:
            high = middle
    return low


def _score(gained: int, lost: int, n: int, difference: float) -> float:
    """Tango's statistic: how far what is seen lies from a supposed difference."""
    distance = gained - lost - n * difference
    b = (2 * n - gained + lost) * difference - gained - lost
    c = -lost * difference * (1 - difference)
    root = math.sqrt(max(0.0, b * b - 8 * n * c))
    only_lost = max(0.0, (root - b) / (4 * n))
    variance = n * (2 * only_lost + difference * (1 - difference))
    if variance <= 0:
        return 0.0 if distance == 0 else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)


def mcnemar_p(gained: int, lost: int) -> float:
    """McNemar's test of "no difference", two-sided, mid-p.

    The exact conditional test is too shy at small numbers; its mid-p version has nearly the level
    it says (Fagerland, Lydersen and Laake, BMC Medical Research Methodology 13 (2013) 91).

    Args:
        gained: Problems that only the arm gets right.
        lost: Problems that only the reference gets right.

    >>> round(mcnemar_p(1, 7), 4)
    0.0391
    """
    n, fewer = gained + lost, min(gained, lost)
    if n == 0:
        return 1.0
    tail = float(special.bdtr(fewer, n, 0.5))
    at = tail - (float(special.bdtr(fewer - 1, n, 0.5)) if fewer else 0.0)
    if gained == lost:
        return 1 - at / 2
    return min(1.0, 2 * tail - at)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p values for how many there are.

    S. Holm, Scandinavian Journal of Statistics 6 (1979) 65: the chance of any false alarm stays
    under 5 % where those under 0.05 are believed, whatever depends on what.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def power_of(effect: float, discordance: float, n: int) -> float:
    """How often a true difference is found, by McNemar's test at 5 %.

    R. J. Connor, Biometrics 43 (1987) 207, equation 3.

    Args:
        effect: The true difference; its sign doesn't matter.
        discordance: Share of problems on which the arms differ; at least the effect.
        n: Problems.

    Returns:
        From 0 to 1.
    """
    effect = abs(effect)
    if n <= 0 or not 0 < effect <= discordance <= 1:
        return 0.0
    distance = effect * math.sqrt(n) - Z * math.sqrt(discordance)
    spread = math.sqrt(discordance - effect * effect)
    if spread == 0:
        return float(distance > 0)
    return NormalDist().cdf(distance / spread)


def needed_problems(effect: float, discordance: float, power: float = POWER) -> int:
    """How many problems it takes to find a true difference, by McNemar's test at 5 %.

    (z of 97.5 % · √ψ + z of the power · √(ψ - δ²))² / δ², with the difference δ and the discordance
    ψ: R. J. Connor, Biometrics 43 (1987) 207, equation 3.

    Args:
        effect: The true difference, such as 0.05 for five points; its sign doesn't matter.
        discordance: Share of problems on which the arms differ; at least the effect.
        power: How often it shall be found.

    Raises:
        ValueError: There is no such difference, discordance or power.

    >>> needed_problems(0.05, 0.2), needed_problems(0.1, 0.2)
    (626, 155)
    """
    effect = abs(effect)
    if not 0 < effect <= discordance <= 1:
        raise ValueError("an effect lies between 0 and the discordance, and that is at most 1")
    if not 0 < power < 1:
        raise ValueError("a power lies between 0 and 1")
    spread = math.sqrt(discordance - effect * effect)
    root = (Z * math.sqrt(discordance) + NormalDist().inv_cdf(power) * spread) / effect
    return max(1, math.ceil(root * root))


def detectable_effect(n: int, discordance: float, power: float = POWER) -> float | None:
    """Find the smallest true difference that n problems would show that often.

    `power_of`, solved for the effect. An effect larger than the discordance that was seen brings a
    larger discordance with it, so it is then the effect itself.

    Returns:
        None where not even a difference of 1 would be found so often.

    >>> f"{detectable_effect(200, 0.2):.3f}"
    '0.088'
    """
    if power_of(1.0, 1.0, n) < power or n < FEWEST:
        return None
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if power_of(middle, max(middle, discordance), n) < power:
            low = middle
        else:
            high = middle
    return high


def ratio_of_lengths(lengths: NDArray[np.float64], references: NDArray[np.float64]) -> Estimate:
    """How many times as long answers are, as a geometric mean over the same problems.

    Student's t interval of the mean logarithm. An answer of no tokens counts as one of one token.

    Args:
        lengths: In tokens, of one arm; at least one.
        references: Of the other, in the same order.

    Returns:
        No interval for a single problem, or where all ratios are alike.
    """
    logs = np.log(np.maximum(1.0, lengths)) - np.log(np.maximum(1.0, references))
    n, mean = logs.size, float(logs.mean())
    squares = float(((logs - mean) ** 2).sum())
    if n < 2 or squares <= ROUNDING * n:
        return Estimate(math.exp(mean), None)
    t = float(special.stdtrit(n - 1, (1 + CONFIDENCE) / 2))
    half = t * math.sqrt(squares / (n - 1) / n)
    return Estimate(math.exp(mean), Interval(math.exp(mean - half), math.exp(mean + half)))
