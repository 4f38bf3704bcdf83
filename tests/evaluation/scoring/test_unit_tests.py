"""Code in answers: found in its Markdown, put behind its prompt, run when it is allowed."""

from __future__ import annotations

import doctest

import pytest

from vllm_rvec.errors import ConfigError
from vllm_rvec.evaluation.records import Grade, Problem, Task
from vllm_rvec.evaluation.scoring import grade, unit_tests
from vllm_rvec.evaluation.scoring.unit_tests import code_in, program_of

PROMPT = 'from typing import List\n\n\ndef total(xs: List[int]) -> int:\n    """Add them up."""\n'
BODY = "    return sum(xs)\n"
WHOLE = f"def total(xs):\n{BODY}"
TESTS = "def check(f):\n    assert f([1, 2]) == 3\n    assert f([]) == 0\ncheck(total)\n"
PROBLEM = Problem("HumanEval/0", TESTS, facts={"entry_point": "total", "prompt": PROMPT})


def graded(text: str, problem: Problem = PROBLEM) -> Grade:
    options = {"allow_code": True, "wall_seconds": 5}
    return grade(Task("code", (problem,), "python", options), problem, text)


def test_documented_examples_hold() -> None:
    """The docstrings' doctests pass."""
    assert doctest.testmod(unit_tests).failed == 0


def test_code_is_refused_unless_allowed() -> None:
    """Without `allow_code` nothing is run, and the error says how to allow it."""
    task = Task("code", (PROBLEM,), "python")
    with pytest.raises(ConfigError, match="allow_code: true"):
        grade(task, PROBLEM, BODY)


@pytest.mark.parametrize(
    "text",
    [
        BODY,
        WHOLE,
        f"Sure, here it is:\n\n```python\n{WHOLE}```\nIt adds.",
        f"```py\n{PROMPT}{BODY}```",
        f"```\n{WHOLE}```",
        f"```python\n{WHOLE}",
        f"```python\n{BODY}```",
        f"```python\n{WHOLE}```\nUse it so:\n```python\nprint(total([1]))\n```",
    ],
)
def test_right_code_passes_however_it_is_written(text: str) -> None:
    """As the body that follows, as the whole function, in Markdown, cut off at the end."""
    assert graded(text).is_correct


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("    return 0\n", "AssertionError"),
        ("I would use the function sum.", "SyntaxError: "),
        ("    import sys\n    sys.exit(0)\n", "SystemExit"),
        ("    import os\n    os._exit(0)\n", "ended before its tests did"),
        ("    while True: pass\n", "timed out"),
    ],
)
def test_wrong_code_fails_with_a_note(text: str, note: str) -> None:
    """The note says why."""
    problem = PROBLEM
    options = {"allow_code": True, "wall_seconds": 0.5}
    found = grade(Task("code", (problem,), "python", options), problem, text)
    assert not found.is_correct
    assert found.note.startswith(note)


def test_an_empty_answer_is_a_failure_of_format() -> None:
    """Nothing is run for nothing."""
    assert graded("  \n") == Grade(False, None)


def test_tests_may_be_a_list_of_statements() -> None:
    """As MBPP has them; then no prompt is needed."""
    problem = Problem("1", ["assert total([1]) == 1", "assert total([]) == 0"])
    assert graded(WHOLE, problem).is_correct
    assert not graded("def total(xs): return 1", problem).is_correct


def test_a_signature_alone_is_closed_before_it_is_defined_again() -> None:
    """A prompt without a docstring is no Python until it has a body."""
    facts = {"entry_point": "total", "prompt": "import math\ndef total(xs):\n"}
    problem = Problem("1", TESTS, facts=dict(facts))
    assert graded(WHOLE, problem).is_correct
    assert program_of(problem, WHOLE).startswith("import math\ndef total(xs):\n    pass\n")


def test_the_last_block_that_defines_the_function_counts() -> None:
    """A first try and a better one: the better; without any that defines it, the last Python."""
    two = f"```python\ndef total(xs): return 0\n```\nNo:\n```python\n{WHOLE}```"
    assert code_in(two, "total") == WHOLE
    assert code_in("```python\na\n```\n```text\nb\n```") == "a\n"
    assert code_in("plain") == "plain"
