"""One of several options, however it is named."""

from __future__ import annotations

import doctest

import pytest

from tests.evaluation.scoring.grading import CHOICES, graded
from vllm_rvec.evaluation.records import Grade
from vllm_rvec.evaluation.scoring import choice


def test_documented_examples_hold() -> None:
    """The docstrings' doctests pass."""
    assert doctest.testmod(choice).failed == 0


@pytest.mark.parametrize(
    "text",
    [
        "B",
        "(B)",
        "b.",
        "B) the Moon",
        "B. the Moon",
        "B: the Moon",
        "(B) the Moon",
        "The answer is B",
        "The answer is (b).",
        "the answer is: **B**",
        "The correct answer is option B, since",
        "Answer: B",
        "**Answer:** (B) the Moon",
        "the moon",
        "Answer: the Moon.",
        r"\boxed{B}",
        r"$\boxed{(B)}$",
        r"\boxed{\text{B}}",
        r"\boxed{\text{the Moon}}",
        "It can't be (A), nor (C).\n(B)",
        "I think that (A) is wrong and take (B) here",
        "Answer: A? No. Answer: B",
        "B\nsince it circles us",
        "(C) is a trap.\nAnswer: B",
    ],
)
def test_choice_finds_the_letter(text: str) -> None:
    """The ways in which models name an option."""
    assert graded("choice", text, "B", CHOICES) == Grade(True, "B")


@pytest.mark.parametrize(
    "text",
    ["", "I don't know", "E", "(Z)", "A whale is large", "The answer is unclear", "Both fit"],
)
def test_choice_finds_no_letter_where_there_is_none(text: str) -> None:
    """An article is no option; a letter beyond the options is none."""
    assert graded("choice", text, "B", CHOICES) == Grade(False, None)


def test_choice_takes_the_text_of_an_article_option() -> None:
    """`The answer is a mammal` names the option whose text that is."""
    assert graded("choice", "The answer is a mammal.", "C", CHOICES) == Grade(True, "C")


def test_choice_is_right_by_letter_or_by_text() -> None:
    """A task may give the right option in both ways."""
    assert graded("choice", "(B)", "the Moon", CHOICES).is_correct
    assert graded("choice", "(B)", "(b)", CHOICES).is_correct
    assert not graded("choice", "(A)", "B", CHOICES).is_correct
    assert graded("choice", "(E)", "E").is_correct
