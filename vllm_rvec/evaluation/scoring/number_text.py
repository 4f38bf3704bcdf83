r"""Numbers as people and models write them: `-$1,234.50`, `3/4`, `1 1/2`, `\frac{3}{4}`, `2e-3`.

Exact: a number is a fraction, so that `18.00` is 18 and 0.1 is a tenth. English notation: a comma
parts thousands and a dot the decimals. A percent sign, a currency and a unit don't count.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pydantic import JsonValue

__all__ = ["Number", "numbers_in", "value_of"]

MAX_DIGITS: Final = 100
"""Longer is no number but a repetition; and arithmetic with it takes its time."""

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
NUMBER: Final = re.compile(
    # A minus behind a letter, a digit or a bracket is a hyphen or a subtraction.
    r"(?:(?<![^\W_])(?<![)\]}])(?P<sign>[-−–+]))?\\?[$€£¥]?"  # noqa: RUF001 - what models write
    # Not within a word, and not the second part of `3.14.15`.
    r"(?<![^\W_])(?<![0-9][.])"
    rf"(?P<value>{_DIGITS})(?P<power>[eE][-+]?[0-9]{{1,3}}(?![0-9]))?"
    r"(?:(?: (?P<over>[0-9]{1,9}))?/(?P<under>[0-9]{1,9})(?![0-9/.]))?"
)
"""No part of it can match in two ways at more than a bounded number of places: linear time."""

FRACTION: Final = re.compile(r"\\[dt]?frac\{(-?[0-9.,]{1,100})\}\{([0-9]{1,9})\}")
MIXED: Final = re.compile(r"(?<=[0-9]) ?(?=\\[dt]?frac\{)")
"""Before the fraction of `2\\frac{1}{3}`."""
LATEX: Final = (("{,}", ","), ("\\,", ""), ("\\!", ""), ("\\%", "%"))


@dataclass(frozen=True, slots=True)
class Number:
    """A number in a text."""

    text: str
    """As it was written, but for LaTeX."""
    value: Fraction
    start: int
    """Where it begins in the text without LaTeX."""


def numbers_in(text: str) -> list[Number]:
    r"""Find the numbers in a text, in order.

    >>> [str(n.value) for n in numbers_in(r"x2 is -$1,234.50, or 3/4 of 10-8, or \frac{1}{3}")]
    ['-2469/2', '3/4', '10', '8', '1/3']
    """
    text = FRACTION.sub(r"\1/\2", MIXED.sub(" ", text))
    for written, plain in LATEX:
        text = text.replace(written, plain)
    found = (_number(match) for match in NUMBER.finditer(text))
    return [number for number in found if number is not None]


def value_of(answer: JsonValue) -> Fraction | None:
    r"""Read a number from what a task's file holds: a number, or a text with one, the last counts.

    >>> value_of("6 * 7 = 42\n#### 42"), value_of(0.1), value_of("none")
    (Fraction(42, 1), Fraction(1, 10), None)
    """
    if isinstance(answer, bool) or not isinstance(answer, int | float | str):
        return None
    found = numbers_in(str(answer))
    return found[-1].value if found else None


def _number(match: re.Match[str]) -> Number | None:
    digits = match["value"].replace(",", "")
    if len(digits) > MAX_DIGITS:
        return None
    value = Fraction(digits + (match["power"] or ""))
    if match["under"] is not None:
        value = _with_fraction(value, match["over"], int(match["under"]))
    sign = -1 if match["sign"] in {"-", "−", "–"} else 1  # noqa: RUF001 - what models write
    return Number(match[0].strip(), sign * value, match.start())


def _with_fraction(value: Fraction, over: str | None, under: int) -> Fraction:
    if under == 0:
        return value
    return value / under if over is None else value + Fraction(int(over), under)
