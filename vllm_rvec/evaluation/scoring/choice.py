r"""One of several options, named by its letter or by its text.

Looked for in this order: a letter, or an option's text, in `\boxed{}`, then behind the last
`Answer:` or `answer is`; where the text, its first or its last line is nothing but a letter; where
one of these lines begins as `B)`, `B.` or `(B)`; where one is an option's text; the last `(B)`.
"""

from __future__ import annotations

import re
from typing import Annotated, Final

from pydantic import Field

from vllm_rvec.evaluation.records import Grade, Problem
from vllm_rvec.evaluation.scoring.exact import ExactOptions, smoothed
from vllm_rvec.evaluation.scoring.marked import boxed, last_line, marked
from vllm_rvec.evaluation.scoring.scorer import Scorer, ScorerOptions

__all__ = ["CHOICE", "LETTERS", "ChoiceOptions", "chosen_letter"]

LETTERS: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

STANDS_ALONE: Final = re.compile(r"[\s*_\"'$`]*\(?([A-Za-z])\)?[\s*_\"'$`.:,)]*")
"""All of a line: `B`, `(b).`, `**B**`."""
BEGINS: Final = re.compile(r"[\s*_]*(?:\(([A-Za-z])\)|([A-Z])[).:])(?=[\s*_]|$)")
"""The beginning of a line: `(B) the moon`, `B. the moon`, `B: the moon`."""
BEHIND_MARKER: Final = re.compile(
    r"(?:(?i:option|choice|letter)\s)?[\s*_\"'$`]*(?:\(([A-Za-z])\)|([A-Z])(?![^\W_]|['’]))"  # noqa: RUF001 - what models write
)
"""Behind `the answer is`: `option (B)`, `B`. Not `a mammal`, not `I'd`."""
IN_BRACKETS: Final = re.compile(r"\(([A-Z])\)")
SMOOTHING: Final = ExactOptions(ignore_case=True, ignore_decoration=True)


class ChoiceOptions(ScorerOptions):
    """How many options there are, where the problems don't list them."""

    options: Annotated[int, Field(ge=2, le=26)] = 10
    """Letters beyond are none. Counts for problems without `choices`."""


def chosen_letter(text: str, choices: list[str], count: int) -> str | None:
    """Find the letter that a text settles on.

    Args:
        text: What the model said.
        choices: The options' texts, in the order of their letters; empty where they aren't known.
        count: How many there are.

    >>> chosen_letter("It can't be (A). The answer is **(C)**.", [], 4)
    'C'
    """
    letters = LETTERS[:count]
    behind, box = marked(text), boxed(text)
    lines = [text, text.strip().partition("\n")[0], last_line(text)]
    candidates = (
        *([_all_of(STANDS_ALONE, box), _text_of(box, choices)] if box is not None else ()),
        *([_at_start(BEHIND_MARKER, behind), _text_of(behind, choices)] if behind else ()),
        *(_all_of(STANDS_ALONE, line) for line in lines),
        *(_at_start(BEGINS, line) for line in lines[1:]),
        *(_text_of(line, choices) for line in lines),
        *reversed(IN_BRACKETS.findall(text)),
    )
    named = (letter.upper() for letter in candidates if letter is not None)
    return next((letter for letter in named if letter in letters), None)


def _all_of(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.fullmatch(text)
    return _letter(found)


def _at_start(pattern: re.Pattern[str], text: str) -> str | None:
    return _letter(pattern.match(text))


def _letter(found: re.Match[str] | None) -> str | None:
    return next((group for group in found.groups() if group), None) if found else None


def _text_of(text: str, choices: list[str]) -> str | None:
    """Name the one option whose text this is."""
    said = smoothed(text, SMOOTHING)
    named = [LETTERS[n] for n, choice in enumerate(choices) if smoothed(choice, SMOOTHING) == said]
    return named[0] if len(named) == 1 else None


def _choices(problem: Problem) -> list[str]:
    choices = problem.facts.get("choices")
    return [str(choice) for choice in choices] if isinstance(choices, list) else []


def _wanted(problem: Problem, choices: list[str], count: int) -> str | None:
    """Read the right letter: given as a letter in any form, or as the option's text."""
    answer = problem.answer
    if not isinstance(answer, str):
        return None
    if answer in choices:
        return LETTERS[choices.index(answer)]
    letter = _all_of(STANDS_ALONE, answer)
    return letter.upper() if letter is not None and letter.upper() in LETTERS[:count] else None


def _count(choices: list[str], options: ChoiceOptions) -> int:
    return min(len(choices), len(LETTERS)) or options.options


def _grade(problem: Problem, text: str, options: ChoiceOptions) -> Grade:
    choices = _choices(problem)
    count = _count(choices, options)
    letter = chosen_letter(text, choices, count)
    return Grade(letter is not None and letter == _wanted(problem, choices, count), letter)


def _fault(problem: Problem, options: ChoiceOptions) -> str | None:
    choices = _choices(problem)
    given = problem.facts.get("choices")
    if given is not None and (not isinstance(given, list) or not 2 <= len(given) <= 26):
        return "`choices` should be a list of 2 to 26 texts"
    if len(set(choices)) < len(choices):
        return "`choices` has two options that are the same"
    count = _count(choices, options)
    if _wanted(problem, choices, count) is None:
        return f"`answer` should be a letter from A to {LETTERS[count - 1]}, or an option's text"
    return None


CHOICE = Scorer(ChoiceOptions, _grade, _fault)
