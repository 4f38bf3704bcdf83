"""Where the final answer stands in a text."""

from __future__ import annotations

import doctest
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_rvec.evaluation.scoring import marked as module
from vllm_rvec.evaluation.scoring.marked import after_marker, boxed, last_line, marked, shorn


def test_documented_examples_hold() -> None:
    """The docstrings' doctests pass."""
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("Answer: 5", "5"),
        ("**Final answer:** 5 pens", "5 pens"),
        ("**Answer**: 5", "5"),
        ("ANSWER = 5", "5"),
        ("So the answer is 5.\nThank you.", "5."),
        ("The answers are many", None),
        ("Answer:\n\n5", "5"),
        ("Answer: 4. Wait. Answer: 5", "5"),
        ("Answer: 5\nAnswer:", "5"),
        ("unanswered: 5", None),
        ("", None),
    ],
)
def test_the_last_marked_answer_is_found(text: str, rest: str | None) -> None:
    """Models mark answers in these ways; the last that says something counts."""
    assert marked(text) == rest


def test_boxes_are_closed_by_their_own_brace() -> None:
    r"""Braces within a box belong to it; a box that is cut off is none."""
    assert boxed(r"\boxed{1} or \boxed{\frac{a}{b}} then") == r"\frac{a}{b}"
    assert boxed(r"\boxed{1") is None
    assert boxed("1") is None


def test_a_marker_of_ones_own_is_taken_literally() -> None:
    """Behind the last occurrence, to the line's end."""
    assert after_marker("#### 1\n#### 2 \nend", "####") == "2"
    assert after_marker("a.b", ".") == "b"
    assert after_marker("none", "####") is None


@given(st.text(alphabet=" \nanswer:is*#{}\\boxed()1A.", max_size=300))
def test_any_text_is_read(text: str) -> None:
    """No text makes any of these fail."""
    for read in (marked, boxed, last_line, shorn):
        read(text)


@pytest.mark.parametrize(
    "piece", ["answer", "answer:", "answer: \n", "*", " ", r"\boxed{", r"\text{", "}"]
)
def test_long_repetitions_take_no_time(piece: str) -> None:
    """A model in collapse repeats itself; reading it is linear."""
    began = time.monotonic()
    for read in (marked, boxed, last_line, shorn):
        read(piece * 20_000)
    assert time.monotonic() - began < 2
