"""The answer itself, or one of several, compared as text; smoothed as far as is asked for."""

from __future__ import annotations

import unicodedata
from typing import Annotated

from pydantic import Field

from vllm_rvec.evaluation.records import Grade, Problem
from vllm_rvec.evaluation.scoring.marked import after_marker, last_line, shorn
from vllm_rvec.evaluation.scoring.scorer import Scorer, ScorerOptions, accepted_texts

__all__ = ["EXACT", "ExactOptions", "smoothed"]


class ExactOptions(ScorerOptions):
    """How alike is the same. White space never counts, nor how an accent is composed."""

    after: Annotated[str, Field(min_length=1)] | None = None
    """A text such as `Answer:`. What stands behind its last occurrence, to the end of the line, is
    the answer; without it nothing is found."""

    take_last_line: bool = False
    """Take the last line that isn't blank, instead of the whole text."""

    ignore_case: bool = False
    """`paris` is `Paris`."""

    ignore_punctuation: bool = False
    """Only letters, digits and signs of arithmetic count."""

    ignore_decoration: bool = False
    """Quotation marks and Markdown's stars around it, and a final dot, don't count."""


def smoothed(text: str, options: ExactOptions) -> str:
    """Return a text as it is compared.

    >>> smoothed(" The  **Answer**.", ExactOptions(ignore_case=True, ignore_punctuation=True))
    'the answer'
    """
    text = unicodedata.normalize("NFC", text)
    if options.ignore_decoration:
        text = shorn(text)
    if options.ignore_case:
        text = text.casefold()
    if options.ignore_punctuation:
        text = "".join(" " if unicodedata.category(c).startswith("P") else c for c in text)
    return " ".join(text.split())


def _taken(text: str, options: ExactOptions) -> str | None:
    if options.after is not None:
        return after_marker(text, options.after)
    return last_line(text) if options.take_last_line else text


def _grade(problem: Problem, text: str, options: ExactOptions) -> Grade:
    taken = _taken(text, options)
    found = smoothed(taken, options) if taken is not None else ""
    if not found:
        return Grade(False, None)
    wanted = {smoothed(answer, options) for answer in accepted_texts(problem) or ()}
    return Grade(found in wanted, found)


def _fault(problem: Problem, options: ExactOptions) -> str | None:
    answers = accepted_texts(problem)
    if answers is None:
        return "`answer` should be a text or a number, or a list of them"
    if not all(smoothed(answer, options) for answer in answers):
        return "`answer` is empty, and so is equal to nothing"
    return None


EXACT = Scorer(ExactOptions, _grade, _fault)
