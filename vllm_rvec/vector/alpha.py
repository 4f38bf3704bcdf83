"""Which numbers can be an alpha, how one is written, and what a change of it was. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["AlphaChange", "AlphaNumber", "alpha_problem", "alpha_text", "alphas_text"]

LARGEST_FLOAT32 = 3.4028234663852886e38
SMALLEST_FLOAT32 = 1.1754943508222875e-38
"""Smallest normal number: below it a float32 loses digits, and at last becomes zero."""


def alpha_problem(alpha: float) -> str:
    """Say why a number can't be an alpha; empty if it can.

    The formula takes alpha in float32, so it must be one that float32 holds.

    >>> alpha_problem(0.3), alpha_problem(float("nan")), alpha_problem(1e39)
    ('', 'is not finite', 'is beyond the range of float32')
    """
    if not math.isfinite(alpha):
        return "is not finite"
    if abs(alpha) > LARGEST_FLOAT32 or 0 < abs(alpha) < SMALLEST_FLOAT32:
        return "is beyond the range of float32"
    return ""


def alpha_text(alpha: float) -> str:
    """Write an alpha in the shortest way that reads back as it.

    >>> [alpha_text(alpha) for alpha in (0.5, 1.0, -1.0)]
    ['0.5', '1', '-1']
    """
    return repr(float(alpha)).removesuffix(".0")


def alphas_text(alphas: Mapping[str, float]) -> str:
    """Write alphas of several vectors, as headers have them.

    >>> alphas_text({"reasoning": 0.5, "style": -1.0})
    'reasoning=0.5, style=-1'
    """
    return ", ".join(f"{name}={alpha_text(alpha)}" for name, alpha in alphas.items())


def _checked(alpha: float) -> float:
    if problem := alpha_problem(alpha):
        raise ValueError(problem)
    return alpha


AlphaNumber = Annotated[float, AfterValidator(_checked)]
"""An alpha in something that people write."""


@dataclass(frozen=True, slots=True)
class AlphaChange:
    """A change of an engine's alpha that came about."""

    old_alpha: float
    """What was served before."""
    alpha: float
    """What is served now."""
    reload_seconds: float
    """How long the engine took over its weights."""
    ranks: int
    """How many of its workers reloaded them."""
    copies: int
    """Sums that they computed straight into parameters; none at alpha 0."""
