"""One answer graded, for tests of the scorers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_rvec.evaluation.records import Grade, Problem, Task
from vllm_rvec.evaluation.scoring import grade

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic import JsonValue

__all__ = ["CHOICES", "graded"]

CHOICES: dict[str, JsonValue] = {"choices": ["iron", "the Moon", "a mammal", "none of these"]}


def graded(
    scorer: str, text: str, answer: JsonValue, facts: Mapping[str, JsonValue] = {}, **options: Any
) -> Grade:
    return grade(Task("task", (), scorer, options), Problem("1", answer, facts=facts), text)
