"""BIG-Bench Hard's answers: a letter `(B)` in most of its subtasks, a short text in the others.

The paper's own scripts (github.com/suzgunmirac/BIG-Bench-Hard) compare what stands behind `the
answer is` with the target. Here case, quotation marks and a final dot don't count either, and where
nothing is marked a last line that is short is the answer.
"""

from __future__ import annotations

import re
from typing import Final

from vllm_rvec.evaluation.records import Grade, Problem
from vllm_rvec.evaluation.scoring.choice import LETTERS, chosen_letter
from vllm_rvec.evaluation.scoring.exact import ExactOptions, smoothed
from vllm_rvec.evaluation.scoring.marked import boxed, last_line, marked
from vllm_rvec.evaluation.scoring.scorer import Scorer, ScorerOptions

__all__ = ["BIG_BENCH", "BigBenchOptions"]

LETTER: Final = re.compile(r"\(([A-Z])\)")
SMOOTHING: Final = ExactOptions(ignore_case=True, ignore_decoration=True)
MAX_LINE_CHARACTERS: Final = 200
"""Of a last line that is taken for the answer: word sorting has long ones."""


class BigBenchOptions(ScorerOptions):
    """There is nothing to choose."""


def _grade(problem: Problem, text: str, _: BigBenchOptions) -> Grade:
    target = str(problem.answer)
    if letter := LETTER.fullmatch(target):
        found = chosen_letter(text, [], len(LETTERS))
        return Grade(found == letter[1], found)
    taken = _taken(text)
    if not taken:
        return Grade(False, None)
    found = smoothed(taken, SMOOTHING)
    return Grade(found == smoothed(target, SMOOTHING), found)


def _taken(text: str) -> str | None:
    for place in (boxed(text), marked(text)):
        if place:
            return place
    line = last_line(text)
    return line if len(line) <= MAX_LINE_CHARACTERS else None


def _fault(problem: Problem, _: BigBenchOptions) -> str | None:
    is_text = isinstance(problem.answer, str) and bool(problem.answer.strip())
    return None if is_text else "`target` should be a text"


BIG_BENCH = Scorer(BigBenchOptions, _grade, _fault)
