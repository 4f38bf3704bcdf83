"""Answers compared as text, smoothed as far as is told."""

from __future__ import annotations

import doctest
from typing import Any

import pytest

from tests.evaluation.scoring.grading import graded
from vllm_rvec.evaluation.records import Grade
from vllm_rvec.evaluation.scoring import exact


def test_documented_examples_hold() -> None:
    """The docstrings' doctests pass."""
    assert doctest.testmod(exact).failed == 0


def test_exact_ignores_white_space_alone() -> None:
    """Without options, letters, case and signs all count."""
    assert graded("exact", " a  b\n", "a b") == Grade(True, "a b")
    assert not graded("exact", "A b", "a b").is_correct
    assert not graded("exact", "a b.", "a b").is_correct
    assert graded("exact", "e\u0301", "\u00e9").is_correct
    assert graded("exact", " \n", "a") == Grade(False, None)


def test_exact_takes_one_of_several_answers() -> None:
    """A list holds answers that are as good; a number is compared as it is written."""
    assert graded("exact", "b", ["a", "b"]).is_correct
    assert graded("exact", "5", 5).is_correct


@pytest.mark.parametrize(
    ("text", "answer", "options", "found"),
    [
        ("work 1+1=2. Answer: 65", "65", {"after": "Answer:"}, "65"),
        ("Answer: 4 Answer: 65 \nend", "65", {"after": "Answer:"}, "65"),
        ("so\n\n65\n", "65", {"take_last_line": True}, "65"),
        ("PARIS", "Paris", {"ignore_case": True}, "paris"),
        ("it's, well: so!", "it s well so", {"ignore_punctuation": True}, "it s well so"),
        ('**"Paris".**', "Paris", {"ignore_decoration": True}, "Paris"),
    ],
)
def test_exact_smooths_as_told(text: str, answer: str, options: dict[str, Any], found: str) -> None:
    """Each option makes more texts the same."""
    assert graded("exact", text, answer, **options) == Grade(True, found)


def test_exact_without_its_marker_finds_nothing() -> None:
    """An answer that isn't marked is a failure of format."""
    assert graded("exact", "65", "65", after="Answer:") == Grade(False, None)
