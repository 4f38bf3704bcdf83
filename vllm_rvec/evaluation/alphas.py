"""Alphas as people write them for a sweep: a list, or `-1:1.5:0.25`, counted in exact decimals."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Final

from pydantic import BeforeValidator

from vllm_rvec.vector.alpha import alpha_problem, alpha_text

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["MAX_ALPHAS", "Alphas", "parse_sweep_alphas"]

MAX_ALPHAS: Final = 100
"""A slip in the step must not become a week of questions."""

NUMBER = re.compile(r"[+-]?(?:\d{1,9}\.?\d{0,9}|\.\d{1,9})")
"""Without an exponent: nobody steps by 1e-30."""


def parse_sweep_alphas(text: str) -> tuple[float, ...]:
    """Read `-1:1.5:0.25` (both ends meant, if the steps meet the second) or `0.5,1`; or both.

    Raises:
        ValueError: It is neither, names an alpha twice, or more than `MAX_ALPHAS`.

    >>> parse_sweep_alphas("0:0.3:0.1")
    (0.0, 0.1, 0.2, 0.3)
    >>> parse_sweep_alphas("-1,0.5:1:0.25")
    (-1.0, 0.5, 0.75, 1.0)
    """
    return _checked([alpha for part in text.split(",") for alpha in _part(part.strip())])


def _part(text: str) -> list[float]:
    numbers = [_number(piece.strip()) for piece in text.split(":")]
    if len(numbers) == 1:
        return [float(numbers[0])]
    if len(numbers) != 3:
        msg = f"{text!r} is no range: first, last and step make one, such as -1:1.5:0.25"
        raise ValueError(msg)
    first, last, step = numbers
    if step <= 0 or first > last:
        msg = f"the range {text} is empty: its first end is the lower one, its step above 0"
        raise ValueError(msg)
    count = int((last - first) / step) + 1
    if count > MAX_ALPHAS:
        raise _too_many(count)
    return [float(first + step * at) for at in range(count)]


def _number(text: str) -> Decimal:
    if not NUMBER.fullmatch(text):
        msg = f"{text[:40]!r} is not a number; write 0.5,1 or -1:1.5:0.25"
        raise ValueError(msg)
    return Decimal(text)


def _checked(alphas: Sequence[float]) -> tuple[float, ...]:
    if not alphas:
        msg = "should have at least one alpha"
        raise ValueError(msg)
    if len(alphas) > MAX_ALPHAS:
        raise _too_many(len(alphas))
    for alpha in alphas:
        if problem := alpha_problem(alpha):
            msg = f"{alpha} {problem}"
            raise ValueError(msg)
    if twice := sorted({alpha for alpha in alphas if alphas.count(alpha) > 1}):
        msg = f"{', '.join(map(alpha_text, twice))} is there twice"
        raise ValueError(msg)
    return tuple(alpha + 0.0 for alpha in alphas)  # -0.0 is 0.0


def _too_many(count: int) -> ValueError:
    return ValueError(f"{count} alphas are more than a sweep takes: {MAX_ALPHAS}")


def _read(value: object) -> tuple[float, ...]:
    """Take text, one number, or a list of numbers."""
    if isinstance(value, str):
        return parse_sweep_alphas(value)
    return _checked([_plain_number(one) for one in _listed(value)])


def _listed(value: object) -> Sequence[object]:
    return value if isinstance(value, list | tuple) else [value]


def _plain_number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        msg = "should be numbers, or text such as -1:1.5:0.25"
        raise ValueError(msg)  # noqa: TRY004 - pydantic collects ValueError, not TypeError
    return float(value)


Alphas = Annotated[
    tuple[float, ...],
    BeforeValidator(_read, json_schema_input_type=str | float | list[float]),
]
"""For pydantic."""
