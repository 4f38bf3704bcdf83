"""BIG-Bench Hard's answers: letters and short texts."""

from __future__ import annotations

import pytest

from tests.evaluation.scoring.grading import graded
from vllm_rvec.evaluation.records import Grade


@pytest.mark.parametrize(
    ("text", "target", "is_right"),
    [
        ("So the answer is (B).", "(B)", True),
        ("The answer is B", "(B)", True),
        ("The answer is (A).", "(B)", False),
        ("not ( True ) is False. The answer is False.", "False", True),
        ("false", "False", True),
        ("Let me think.\nvalid", "valid", True),
        ("the answer is: invalid", "valid", False),
        ("The answer is ] ) }", "] ) }", True),
        ("The answer is apple bee cat", "apple bee cat", True),
        ("The answer is 24.", "24", True),
        ("**Answer:** Yes", "Yes", True),
    ],
)
def test_bbh_compares_letters_and_texts(text: str, target: str, is_right: bool) -> None:
    """Both kinds of subtasks, marked or said alone."""
    assert graded("bbh", text, target).is_correct is is_right


def test_bbh_finds_nothing_in_a_long_text_without_a_mark() -> None:
    """Thinking that never comes to an answer is a failure of format."""
    assert graded("bbh", "and so on " * 50, "Yes") == Grade(False, None)
