"""Scorers by name, and the one way to grade an answer."""

from __future__ import annotations

import difflib
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from pydantic import ValidationError

from vllm_rvec.errors import ConfigError
from vllm_rvec.evaluation.scoring.big_bench import BIG_BENCH
from vllm_rvec.evaluation.scoring.choice import CHOICE
from vllm_rvec.evaluation.scoring.exact import EXACT
from vllm_rvec.evaluation.scoring.extraction import REGEX
from vllm_rvec.evaluation.scoring.numeric import NUMERIC
from vllm_rvec.evaluation.scoring.unit_tests import UNIT_TESTS
from vllm_rvec.vector.settings_file import problems_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic import JsonValue

    from vllm_rvec.evaluation.records import Grade, Problem, Task
    from vllm_rvec.evaluation.scoring.scorer import Scorer, ScorerOptions

__all__ = ["SCORERS", "checked_options", "grade", "scorer_named"]

SCORERS: Final[Mapping[str, Scorer]] = MappingProxyType(
    {
        "exact": EXACT,
        "regex": REGEX,
        "numeric": NUMERIC,
        "choice": CHOICE,
        "python": UNIT_TESTS,
        "bbh": BIG_BENCH,
    }
)
"""By the name that a task's file says."""


def scorer_named(name: str) -> Scorer:
    """Find a scorer.

    Raises:
        ConfigError: There is none of that name.
    """
    if (scorer := SCORERS.get(name)) is not None:
        return scorer
    close = difflib.get_close_matches(name, SCORERS, n=1)
    raise ConfigError(
        f"there is no scorer {name}",
        fix=f"did you mean {close[0]}?" if close else f"take one of {', '.join(SCORERS)}",
    )


def checked_options(name: str, options: Mapping[str, JsonValue]) -> ScorerOptions:
    """Check a scorer's options.

    Raises:
        ConfigError: There is no such scorer, or it has no such options.
    """
    scorer = scorer_named(name)
    try:
        return scorer.options.model_validate(dict(options))
    except ValidationError as exc:
        raise ConfigError(
            f"the scorer {name} can't take these options",
            problems=problems_of(exc, scorer.options),
            fix="see the README's table of scorers",
        ) from None


def grade(task: Task, problem: Problem, text: str) -> Grade:
    """Say whether an answer to a problem is right.

    Takes microseconds, but for the scorer `python`, which takes as long as the code runs, and at
    least a tenth of a second: call it in a thread of its own. From any thread.

    Args:
        task: Says the scorer and its options.
        problem: One of the task's.
        text: What the model said, without its reasoning where that came apart.

    Raises:
        ConfigError: The task's scorer or options are wrong, or it may not run code.
    """
    return scorer_named(task.scorer).grade(
        problem, text, checked_options(task.scorer, task.scorer_options)
    )
