"""What a pattern of the user's takes out of an answer: the scorer `regex`.

Patterns are those of the `regex` package, which are `re`'s and more. It is used for what `re` has
not: a limit of time. A pattern such as `(a+)+b` takes longer than the sweep on a text that a model
in collapse writes.
"""

from __future__ import annotations

import time
from typing import Annotated, Literal

import regex
from pydantic import Field, field_validator, model_validator

from vllm_rvec.evaluation.records import Grade, Problem
from vllm_rvec.evaluation.scoring.exact import ExactOptions, smoothed
from vllm_rvec.evaluation.scoring.number_text import numbers_in, value_of
from vllm_rvec.evaluation.scoring.numeric import is_near
from vllm_rvec.evaluation.scoring.scorer import Scorer, ScorerOptions, accepted_texts

__all__ = ["REGEX", "RegexOptions"]


class RegexOptions(ScorerOptions):
    r"""What is taken out, and how it is compared."""

    pattern: Annotated[str, Field(min_length=1, max_length=10_000)]
    r"""Such as `Answer: (\S+)`. Flags stand in it: `(?is)...`."""

    group: int | str | None = None
    """The group that is the answer, by number or name; else the first, or the whole match where the
    pattern has no groups."""

    which: Literal["first", "last"] = "last"
    """Of several matches."""

    compare: Literal["text", "number"] = "text"
    """As numbers, `1,000.00` is 1000."""

    ignore_case: bool = False
    """As text: `paris` is `Paris`."""

    tolerance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """As numbers: how far it may be off, absolutely."""

    time_limit_seconds: Annotated[float, Field(gt=0, le=60)] = 1.0
    """For one answer. What takes longer counts as not found, and says so."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            regex.compile(pattern)
        except (regex.error, RecursionError, OverflowError) as exc:
            msg = f"is no pattern: {exc}"
            raise ValueError(msg) from exc
        return pattern

    @model_validator(mode="after")
    def _has_group(self) -> RegexOptions:
        compiled = regex.compile(self.pattern)
        known = {*range(compiled.groups + 1), *compiled.groupindex}
        if self.group is not None and self.group not in known:
            msg = f"the pattern has no group {self.group!r}"
            raise ValueError(msg)
        return self


def _grade(problem: Problem, text: str, options: RegexOptions) -> Grade:
    try:
        taken = _taken(text, options)
    except TimeoutError:
        return Grade(False, None, f"the pattern took longer than {options.time_limit_seconds:g} s")
    if taken is None:
        return Grade(False, None)
    return (
        _as_number(problem, taken, options)
        if options.compare == "number"
        else _as_text(problem, taken, options)
    )


def _taken(text: str, options: RegexOptions) -> str | None:
    """Find the group in the first or last match that has it, within the time limit."""
    compiled = regex.compile(options.pattern)  # kept by the package, as by `re`
    group = options.group if options.group is not None else min(compiled.groups, 1)
    deadline = time.monotonic() + options.time_limit_seconds
    taken: str | None = None
    # The package's own limit looks at the clock within one match; many quick ones need ours.
    for match in compiled.finditer(text, timeout=options.time_limit_seconds):
        taken = match[group] if match[group] is not None else taken
        if options.which == "first" and taken is not None:
            break
        if time.monotonic() > deadline:
            raise TimeoutError
    return taken


def _as_text(problem: Problem, taken: str, options: RegexOptions) -> Grade:
    smoothing = ExactOptions(ignore_case=options.ignore_case)
    found = smoothed(taken, smoothing)
    wanted = {smoothed(answer, smoothing) for answer in accepted_texts(problem) or ()}
    return Grade(found in wanted, found)


def _as_number(problem: Problem, taken: str, options: RegexOptions) -> Grade:
    numbers, wanted = numbers_in(taken), value_of(problem.answer)
    if not numbers or wanted is None:
        return Grade(False, None)
    return Grade(is_near(numbers[-1].value, wanted, options.tolerance), numbers[-1].text)


def _fault(problem: Problem, options: RegexOptions) -> str | None:
    if options.compare == "number":
        return "`answer` holds no number" if value_of(problem.answer) is None else None
    is_text = accepted_texts(problem) is not None
    return None if is_text else "`answer` should be a text or a number, or a list of them"


REGEX = Scorer(RegexOptions, _grade, _fault)
