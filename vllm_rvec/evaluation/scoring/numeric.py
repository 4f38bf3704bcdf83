r"""The number that an answer comes to, wherever it stands.

Looked for in this order: the last `\boxed{}`; behind the last `####`, as GSM8K's answers have it;
behind the last `Answer:` or `answer is`; the last number of all.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from vllm_rvec.evaluation.records import Grade, Problem
from vllm_rvec.evaluation.scoring.marked import after_marker, boxed, marked
from vllm_rvec.evaluation.scoring.number_text import Number, numbers_in, value_of
from vllm_rvec.evaluation.scoring.scorer import Scorer, ScorerOptions

if TYPE_CHECKING:
    from pydantic import JsonValue

__all__ = ["NUMERIC", "NumericOptions", "Place", "is_near"]

Place = Literal["boxed", "####", "answer", "last"]
Tolerance = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class NumericOptions(ScorerOptions):
    """Where the number stands, and how near is near enough."""

    places: Annotated[tuple[Place, ...], Field(min_length=1, strict=False)] = (
        "boxed",
        "####",
        "answer",
        "last",
    )
    """Where to look, the first that has a number counts. `["####"]` is what lm-evaluation-harness
    calls `strict-match` for GSM8K, `["last"]` its `flexible-extract`."""

    tolerance: Tolerance = 0.0
    """How far it may be off, absolutely. 0 compares exactly: 18.00 is 18, and 0.33 is not 1/3."""

    relative_tolerance: Tolerance = 0.0
    """How far it may be off, as a share of the right answer."""


def is_near(
    found: Fraction, wanted: Fraction, tolerance: float, relative_tolerance: float = 0.0
) -> bool:
    """Whether two numbers are within a tolerance of each other; computed exactly.

    >>> is_near(Fraction(33, 100), Fraction(1, 3), 0.01)
    True
    """
    # As they are written: 0.1 is a tenth.
    allowed = max(Fraction(str(tolerance)), Fraction(str(relative_tolerance)) * abs(wanted))
    return abs(found - wanted) <= allowed


def _number(text: str, place: Place) -> Number | None:
    match place:
        case "boxed":
            where = boxed(text)
        case "####":
            where = after_marker(text, "####")
        case "answer":
            where = marked(text)
            # `Answer: 5 + 3 = 8`
            where = where.rpartition("=")[2] if where is not None else None
        case "last":
            return numbers[-1] if (numbers := numbers_in(text)) else None
    return numbers[0] if where is not None and (numbers := numbers_in(where)) else None


def _grade(problem: Problem, text: str, options: NumericOptions) -> Grade:
    for place in options.places:
        if (found := _number(text, place)) is not None:
            return Grade(_is_right(found.value, problem.answer, options), found.text)
    return Grade(False, None)


def _is_right(found: Fraction, answer: JsonValue, options: NumericOptions) -> bool:
    wanted = value_of(answer)
    if wanted is None:
        return False
    return is_near(found, wanted, options.tolerance, options.relative_tolerance)


def _fault(problem: Problem, _: NumericOptions) -> str | None:
    return "`answer` holds no number" if value_of(problem.answer) is None else None


NUMERIC = Scorer(NumericOptions, _grade, _fault)
