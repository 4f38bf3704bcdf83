"""Patterns of the user's: what they take out, and that none hangs."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.evaluation.scoring.grading import graded
from vllm_rvec.errors import ConfigError
from vllm_rvec.evaluation.records import Grade
from vllm_rvec.evaluation.scoring import checked_options


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"pattern": r"\d+"}, "2"),
        ({"pattern": r"\d+", "which": "first"}, "1"),
        ({"pattern": r"(\w) is (\d)"}, "b"),
        ({"pattern": r"(\w) is (\d)", "group": 2}, "2"),
        ({"pattern": r"(\w) is (?P<it>\d)", "group": "it"}, "2"),
        ({"pattern": r"(\w) is (\d)", "group": 0}, "b is 2"),
        ({"pattern": r"(?s)a(.*)b"}, "is 1"),
        ({"pattern": r"(x)|b"}, None),
    ],
)
def test_regex_takes_the_group(options: dict[str, Any], found: str | None) -> None:
    """The first group, a group by number or name, or the whole; of the last match or the first."""
    assert graded("regex", "a is 1\nb is 2", "?", **options).found == found


def test_regex_compares_as_text_or_number() -> None:
    """As numbers, notation doesn't count."""
    assert graded("regex", "=1,000.0", "1000", pattern="=(.*)", compare="number").is_correct
    assert not graded("regex", "=1,000.0", "1000", pattern="=(.*)").is_correct
    assert graded("regex", "=ABC", "abc", pattern="=(.*)", ignore_case=True).is_correct
    assert graded("regex", "=x", "1", pattern="=(.*)", compare="number") == Grade(False, None)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"(a|aa)+$", "a" * 60 + "b"),
        (r"(a|b|ab)*c", "ab" * 5000),
        (r"(?:(?:a?){30}){30}b", "a" * 400),
        (r"a*", "b" * 2_000_000),
    ],
)
def test_regex_that_hangs_is_stopped(pattern: str, text: str) -> None:
    """Backtracking without end stops at the limit and is said; it's never a wrong answer unsaid."""
    began = time.monotonic()
    stopped = graded("regex", text, "x", pattern=pattern, time_limit_seconds=0.2)
    assert time.monotonic() - began < 2
    assert not stopped.is_correct
    assert stopped.found is None


def test_patterns_are_checked_before_anything_is_asked() -> None:
    """A pattern that is none, and a group that it hasn't."""
    with pytest.raises(ConfigError, match="is no pattern"):
        checked_options("regex", {"pattern": "("})
    with pytest.raises(ConfigError, match="no group 2"):
        checked_options("regex", {"pattern": "(a)", "group": 2})
    with pytest.raises(ConfigError, match="`pattern` is missing"):
        checked_options("regex", {})
