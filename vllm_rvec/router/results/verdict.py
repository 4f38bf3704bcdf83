"""What an experiment's numbers mean, in words that nobody can misread.

Decides nothing that the numbers don't: better and worse need an interval without 0 and p < 0.05.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from vllm_rvec.router.results.statistics import effective_size, size_factor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_rvec.router.results.statistics import Clusters, Difference

__all__ = ["caution_of", "verdict_of"]

ALPHA = 0.05
MIN_OF_EACH_VOTE = 5
"""Effective votes up, and down, expected of each variant: below, the z test's p means little
(Cochran 1954)."""
REPEATED_LOOKS = (
    "Looking again and again, and stopping at the first p under 0.05, raises the rate of false "
    "alarms far above 5 %: settle beforehand how many rated requests to wait for."
)
MIN_UNITS = 10
"""Of each variant, for a mean of scores, which nobody promised to be normal."""


def verdict_of(
    names: Sequence[str],
    rated: Sequence[Clusters],
    differences: Sequence[Difference | None],
    measure: str | None,
    suspicious_p: float | None,
) -> str:
    """Say what the numbers show.

    Args:
        names: The variants; the first is the one that others are compared with.
        rated: Their rated requests.
        differences: To the first; that of the first itself isn't read.
        measure: "votes", "scores" or None: nobody has rated anything.
        suspicious_p: Of the test of the split, where it failed.
    """
    if suspicious_p is not None:
        return (
            f"don't trust it: the traffic is not split as configured ({_p(suspicious_p)}). "
            "Something loses or adds requests of one variant; find it before comparing"
        )
    if len(names) < 2:
        return "nothing to compare: there are not two variants"
    if measure is None:
        return "can't tell yet: no request has been rated"
    about = "" if len(names) == 2 else "{} against {}: "
    return "; ".join(
        _compare((names[0], name), (rated[0], clusters), difference, measure, about=about)
        for name, clusters, difference in list(zip(names, rated, differences, strict=True))[1:]
    )


def caution_of(variants: int, split_changes: int) -> str:
    """Say what to keep in mind when reading a verdict."""
    said = [REPEATED_LOOKS]
    if variants > 2:
        said.append(
            f"{variants - 1} comparisons are made here, each with its own 5 %: with so many, hold "
            f"out for p < {ALPHA / (variants - 1):.2g}."
        )
    if split_changes:
        said.append(
            "The split was changed meanwhile: all periods are counted together, which misleads if "
            "the questions changed too."
        )
    return " ".join(said)


def _compare(
    names: tuple[str, str],
    rated: tuple[Clusters, Clusters],
    difference: Difference | None,
    measure: str,
    *,
    about: str,
) -> str:
    first, other = names
    about = about.format(other, first)
    if few := _too_few(rated, names, measure):
        return f"{about}can't tell yet: {few}"
    if difference is None or difference.interval is None or difference.p_value is None:
        return f"{about}can't tell: all ratings are the same"
    low, high = difference.interval.low, difference.interval.high
    if low <= 0 <= high or difference.p_value >= ALPHA:
        return f"{about}can't tell yet: {_unclear(difference, rated, measure)}"
    word = "better" if difference.value > 0 else "worse"
    return (
        f"{other} is {word} than {first}: {_amount(difference.value, measure)} "
        f"(95 % interval {_range(low, high, measure)}, {_p(difference.p_value)})"
    )


def _too_few(rated: tuple[Clusters, Clusters], names: tuple[str, str], measure: str) -> str:
    if missing := [name for name, one in zip(names, rated, strict=True) if not one.requests]:
        return f"no rated request of {' and '.join(missing)}"
    counted = " and ".join(f"{one.requests:,.0f}" for one in rated)
    users = " and ".join(f"{one.units:,}" for one in rated)
    few = f"too few rated requests ({counted}, of {users} users or sessions)"
    if measure == "scores":
        return few if min(one.units for one in rated) < MIN_UNITS else ""
    sizes = [effective_size(one) for one in rated]
    ups = sum((one.mean or 0.0) * n for one, n in zip(rated, sizes, strict=True))
    rarer = min(ups, sum(sizes) - ups) / sum(sizes)
    return few if min(sizes) * rarer < MIN_OF_EACH_VOTE else ""


def _unclear(difference: Difference, rated: tuple[Clusters, Clusters], measure: str) -> str:
    interval = difference.interval
    said = f"{_p(difference.p_value or 0.0)}"
    if interval is not None and interval.low <= 0 <= interval.high:
        low, high = interval.low, interval.high
        said = f"the interval of the difference ({_range(low, high, measure)}) includes 0"
    more = _more_requests(difference, rated)
    if more is None:
        return f"{said}; no difference is seen"
    return (
        f"{said}; about {more:,} more rated requests, split as until now, would probably (4 of 5 "
        "times) show a difference as large as the one seen, if it is real"
    )


def _more_requests(difference: Difference, rated: tuple[Clusters, Clusters]) -> int | None:
    factor = size_factor(difference)
    if factor is None:
        return None
    more = max(0.0, (factor - 1) * sum(one.requests for one in rated))
    if not math.isfinite(more) or more > 1e12:
        return None
    digits = max(0, len(str(int(more))) - 2)
    return max(1, round(int(more), -digits))


def _amount(value: float, measure: str) -> str:
    if measure == "votes":
        return f"{value * 100:+.1f} points"
    return f"{value:+.3g}"


def _range(low: float, high: float, measure: str) -> str:
    if measure == "votes":
        return f"{low * 100:+.1f} to {high * 100:+.1f} points"
    return f"{low:+.3g} to {high:+.3g}"


def _p(p_value: float) -> str:
    return "p < 0.0001" if p_value < 0.0001 else f"p = {p_value:.2g}"
