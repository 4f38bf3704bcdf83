"""What a scorer is: options, a check of the problems, and the comparison itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_rvec.evaluation.records import Grade, Problem

__all__ = ["Scorer", "ScorerOptions", "accepted_texts"]


class ScorerOptions(BaseModel):
    """What people write under `options`: frozen, unknown keys refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )


@dataclass(frozen=True, slots=True)
class Scorer:
    """A way to tell whether an answer is right. Knows nothing of arms and models."""

    options: type[ScorerOptions]
    grade: Callable[[Problem, str, Any], Grade]
    """Compares a text with a problem's answer, by checked options of the type above."""
    fault: Callable[[Problem, Any], str | None]
    """Says what is wrong with a problem for this scorer, before anything is asked."""
    runs_code: bool = False
    """Whether it executes what the model wrote."""


def accepted_texts(problem: Problem) -> tuple[str, ...] | None:
    """Read a problem's answer as a text, or several that are as good; None where it is neither."""
    answers = problem.answer if isinstance(problem.answer, list) else [problem.answer]
    if not answers or any(isinstance(answer, dict | list | bool | None) for answer in answers):
        return None
    return tuple(str(answer) for answer in answers)
