"""The number that an answer comes to."""

from __future__ import annotations

import doctest

import pytest

from tests.evaluation.scoring.grading import graded
from vllm_rvec.evaluation.records import Grade
from vllm_rvec.evaluation.scoring import numeric


def test_documented_examples_hold() -> None:
    """The docstrings' doctests pass."""
    assert doctest.testmod(numeric).failed == 0


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("7 * 6 = 42\n#### 42", "42"),
        ("The answer is $42.00.", "$42.00"),
        ("Answer: 40 + 2 = 42 of 50", "42"),
        ("Answer: 42 of 50", "42"),
        (r"hence \boxed{42}, not 43", "42"),
        ("first 41, at last 42 pens.", "42"),
        ("**42**", "42"),
        ("Answer: forty-two (42)", "42"),
        ("#### \n42", "42"),
        ("= 84/2", "84/2"),
    ],
)
def test_numeric_finds_the_answer(text: str, found: str) -> None:
    """In a box, behind a mark, or as the last number."""
    assert graded("numeric", text, "6 * 7 = <<6*7=42>>42\n#### 42") == Grade(True, found)


def test_numeric_finds_nothing_without_a_number() -> None:
    """A text without numbers is a failure of format; a wrong number isn't."""
    assert graded("numeric", "I don't know", 42) == Grade(False, None)
    assert graded("numeric", "41", 42) == Grade(False, "41")


def test_numeric_looks_only_where_it_is_told() -> None:
    """`places` makes it as strict as lm-evaluation-harness's filters."""
    assert graded("numeric", "42", 42, places=["####"]) == Grade(False, None)
    assert graded("numeric", "#### 42\nor 43", 42, places=["last"]) == Grade(False, "43")


def test_numeric_compares_exactly_unless_told() -> None:
    """0.33 is a third within a tolerance only."""
    assert not graded("numeric", "0.33", "1/3").is_correct
    assert graded("numeric", "0.33", "1/3", tolerance=0.01).is_correct
    assert graded("numeric", "99", 100, relative_tolerance=0.01).is_correct
    assert not graded("numeric", "98.9", 100, relative_tolerance=0.01).is_correct
    assert graded("numeric", "18.00", 18.0).is_correct
