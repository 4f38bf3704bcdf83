"""Code that a model wrote, run with the problem's unit tests: the scorer `python`.

How it is run, and what that keeps it from, stands in `evaluation.sandbox`.
"""

from __future__ import annotations

import re
from typing import Annotated, Final

from pydantic import Field

from vllm_rvec.errors import ConfigError
from vllm_rvec.evaluation.records import Grade, Problem
from vllm_rvec.evaluation.sandbox.running import Limits, run_tests
from vllm_rvec.evaluation.scoring.scorer import Scorer, ScorerOptions

__all__ = ["UNIT_TESTS", "UnitTestOptions", "code_in", "program_of"]

FENCE: Final = re.compile(r"^[ \t]*```([^\n`]*)\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
"""A block of Markdown; one that isn't closed goes to the end, where the answer was cut off."""
MAX_CODE_CHARACTERS: Final = 200_000

Seconds = Annotated[float, Field(gt=0, le=600, allow_inf_nan=False, strict=False)]


class UnitTestOptions(ScorerOptions):
    """Whether it may be run at all, and how much it may use."""

    allow_code: bool = False
    """Run what a model wrote on this machine. Off: the sandbox is no virtual machine."""

    wall_seconds: Seconds = 10.0
    """From the start to the end of the last test; then it is killed and counts as wrong."""

    cpu_seconds: Seconds = 10.0
    """Of each process."""

    memory_mb: Annotated[int, Field(ge=64, le=65_536)] = 512
    """Of addresses."""

    file_mb: Annotated[int, Field(ge=1, le=1024)] = 16
    """Of each file that it writes."""


def code_in(text: str, entry_point: str = "") -> str:
    r"""Take the code out of an answer: from its Markdown, where there is some.

    Args:
        text: What the model said.
        entry_point: The function that is tested; the last block that defines it counts, else the
            last that names Python, else the last.

    >>> code_in("Sure:\n```python\nx = 1\n```\nand more")
    'x = 1\n'
    """
    blocks = [(block[1].strip().lower(), block[2]) for block in FENCE.finditer(text)]
    if not blocks:
        return text
    defining = [code for _, code in blocks if entry_point and _defines(code, entry_point)]
    pythonic = [code for language, code in blocks if language in {"python", "py", "python3"}]
    return (defining or pythonic or [code for _, code in blocks])[-1]


def program_of(problem: Problem, text: str) -> str:
    """Put the program together that the tests are run with.

    The problem's `prompt` (a fact: imports, helpers, the signature to complete) goes first, and
    what the model wrote is either the body that follows, or the whole function again.
    """
    entry_point, prompt = _entry_point(problem), problem.facts.get("prompt")
    code = code_in(text, entry_point)
    if not isinstance(prompt, str) or not prompt:
        return code
    if entry_point and _defines(code, entry_point):
        return f"{_closed(prompt)}\n\n{code}"
    return prompt + code


def _defines(code: str, name: str) -> bool:
    return re.search(rf"^(?:async )?def {re.escape(name)}\b", code, re.MULTILINE) is not None


def _closed(prompt: str) -> str:
    """Give a signature without a body one: it's to be defined again."""
    last = prompt.rstrip().rpartition("\n")[2]
    indent = last[: len(last) - len(last.lstrip())]
    return (
        f"{prompt.rstrip()}\n{indent or '    '}pass\n" if indent or last.endswith(":") else prompt
    )


def _grade(problem: Problem, text: str, options: UnitTestOptions) -> Grade:
    if not options.allow_code:  # a task that was loaded has been asked for it, in more words
        raise ConfigError(
            "the scorer `python` runs code that the model writes",
            fix="set `allow_code: true` for the task",
        )
    if not text.strip() or len(text) > MAX_CODE_CHARACTERS:
        return Grade(False, None, "longer than any program" if text.strip() else "")
    limits = Limits(
        wall_seconds=options.wall_seconds,
        cpu_seconds=options.cpu_seconds,
        memory_bytes=options.memory_mb << 20,
        file_bytes=options.file_mb << 20,
    )
    outcome = run_tests(program_of(problem, text), _tests(problem), limits)
    return Grade(outcome.is_passed, code_in(text, _entry_point(problem)), outcome.note)


def _entry_point(problem: Problem) -> str:
    return str(problem.facts.get("entry_point", ""))


def _tests(problem: Problem) -> str:
    answer = problem.answer
    return "\n".join(map(str, answer)) if isinstance(answer, list) else str(answer)


def _fault(problem: Problem, _: UnitTestOptions) -> str | None:
    answer = problem.answer
    tests = answer if isinstance(answer, list) else [answer]
    if not tests or not all(isinstance(test, str) and test.strip() for test in tests):
        return "`answer` should be unit tests: Python code, or a list of statements"
    try:
        compile(_tests(problem), "<tests>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as exc:
        return f"`answer` is no Python: {exc}"
    return None


UNIT_TESTS = Scorer(UnitTestOptions, _grade, _fault, runs_code=True)
