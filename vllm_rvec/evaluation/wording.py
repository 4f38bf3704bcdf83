"""Numbers in words, the same in every report."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_rvec.evaluation.results import Comparison
    from vllm_rvec.intervals import Interval

__all__ = ["between", "difference", "p_number", "p_text", "points", "share", "times"]


def points(value: float) -> str:
    """A difference of shares, with its sign, in points.

    >>> points(0.025), points(-0.0001)
    ('+2.5', '0.0')
    """
    text = f"{value * 100:+.1f}"
    return "0.0" if text in {"+0.0", "-0.0"} else text


def between(interval: Interval | None) -> str:
    """An interval of a difference, in points."""
    return "" if interval is None else f"[{points(interval.low)}, {points(interval.high)}]"


def difference(comparison: Comparison) -> str:
    """A difference with its interval: `+6.0 points [+2.1, +9.9]`."""
    return f"{points(comparison.difference)} points {between(comparison.interval)}".rstrip()


def share(value: float | None) -> str:
    """A share in per cent."""
    return "-" if value is None else f"{value * 100:.1f} %"


def times(value: float) -> str:
    """A ratio."""
    return f"{value:.1f} times" if value < 10 else f"{value:.0f} times"


def p_number(p_value: float | None) -> str:
    """A p value for a table."""
    if p_value is None:
        return "-"
    return "< 0.0001" if p_value < 0.0001 else f"{p_value:.2g}"


def p_text(p_value: float) -> str:
    """A p value with its sign: `p = 0.012`.

    >>> p_text(0.0123), p_text(0.00001)
    ('p = 0.012', 'p < 0.0001')
    """
    number = p_number(p_value)
    return f"p {number}" if number.startswith("<") else f"p = {number}"
