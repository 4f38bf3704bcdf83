"""Scorers by name: faults of problems, options, and any text at all."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.evaluation.scoring.grading import CHOICES, graded
from vllm_rvec.errors import ConfigError
from vllm_rvec.evaluation.records import Problem
from vllm_rvec.evaluation.scoring import SCORERS, checked_options, scorer_named

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic import JsonValue


def fault(
    scorer: str, answer: JsonValue, facts: Mapping[str, JsonValue] = {}, **options: Any
) -> str:
    checked = checked_options(scorer, options)
    return scorer_named(scorer).fault(Problem("1", answer, facts=facts), checked) or ""


@pytest.mark.parametrize(
    ("scorer", "answer", "facts", "said"),
    [
        ("exact", {"a": 1}, {}, "should be a text or a number"),
        ("exact", [], {}, "should be a text or a number"),
        ("exact", True, {}, "should be a text or a number"),
        ("exact", " ", {}, "empty"),
        ("numeric", "none", {}, "holds no number"),
        ("choice", "Q", CHOICES, "from A to D"),
        ("choice", 1, {}, "from A to J"),
        ("choice", "A", {"choices": ["same", "same"]}, "the same"),
        ("choice", "A", {"choices": ["one"]}, "2 to 26"),
        ("bbh", "", {}, "should be a text"),
        ("python", 5, {}, "unit tests"),
        ("python", "assert (", {}, "no Python"),
    ],
)
def test_a_problem_that_cannot_be_graded_is_told(
    scorer: str, answer: JsonValue, facts: dict[str, JsonValue], said: str
) -> None:
    """Before anything is asked, not as a wrong answer afterwards."""
    assert said in fault(scorer, answer, facts)


def test_good_problems_have_no_fault() -> None:
    """What each scorer is made for."""
    assert fault("exact", "x") == fault("exact", ["x", 5]) == ""
    assert fault("numeric", 0.5) == fault("numeric", "#### 1,000") == ""
    assert fault("choice", "the Moon", CHOICES) == fault("choice", "(D)", CHOICES) == ""
    assert fault("python", ["assert f() == 1"]) == ""
    assert fault("regex", "1", pattern="x", compare="number") == ""
    assert fault("regex", "x", pattern="x", compare="number") == "`answer` holds no number"


def test_an_unknown_scorer_is_refused_with_the_nearest() -> None:
    """A slip of the pen is met with a proposal."""
    with pytest.raises(ConfigError, match="did you mean numeric"):
        scorer_named("numerical")
    with pytest.raises(ConfigError, match="take one of exact, regex"):
        scorer_named("llm")


@pytest.mark.parametrize("scorer", SCORERS)
def test_unknown_options_are_refused_all_at_once(scorer: str) -> None:
    """An option that no scorer has is named, and so is the next."""
    with pytest.raises(ConfigError) as caught:
        checked_options(scorer, {"tolerence": 1, "paterns": 2})
    assert {"tolerence", "paterns"} <= {p.split("`")[1] for p in caught.value.problems}


@pytest.mark.parametrize("scorer", SCORERS)
def test_every_option_is_documented(scorer: str) -> None:
    """A docstring under each field becomes its description."""
    fields = SCORERS[scorer].options.model_fields
    assert all(field.description for field in fields.values())


@given(st.text(max_size=300), st.sampled_from(["exact", "numeric", "choice", "bbh"]))
def test_any_text_gets_a_grade(text: str, scorer: str) -> None:
    """No text makes a scorer fail, and one where nothing is found is never right."""
    found = graded(scorer, text, "A" if scorer in {"choice", "exact"} else "5")
    assert found.found is not None or not found.is_correct


@pytest.mark.parametrize("scorer", ["exact", "numeric", "choice", "bbh"])
@pytest.mark.parametrize("piece", ["(A) ", "answer: ", "A", "\n", "1 ", "* ", "answer is\n("])
def test_long_repetitions_take_no_time(scorer: str, piece: str) -> None:
    """A model in collapse repeats itself to the last token. Of this process's own time."""
    began = time.process_time()
    graded(scorer, piece * 10_000, "A" if scorer != "numeric" else "1")
    assert time.process_time() - began < 2
