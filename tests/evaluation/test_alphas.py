"""vllm_rvec.evaluation.alphas: how alphas of a sweep are written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from vllm_rvec.evaluation.alphas import MAX_ALPHAS, Alphas, parse_sweep_alphas

ALPHAS = TypeAdapter(Alphas)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("-1:1.5:0.25", (-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1, 1.25, 1.5)),
        ("0:1:0.3", (0, 0.3, 0.6, 0.9)),
        ("0.5", (0.5,)),
        ("1, -1, 0.1:0.3:0.1", (1, -1, 0.1, 0.2, 0.3)),
        ([0.5, 1], (0.5, 1)),
        (1, (1,)),
        ("-0", (0,)),
    ],
)
def test_alphas_are_a_list_or_a_range(written: object, read: tuple[float, ...]) -> None:
    """In exact decimals: the third of 0.1 steps is 0.3."""
    assert ALPHAS.validate_python(written) == read


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("", "'' is not a number"),
        ("1:2", "is no range"),
        ("1:0:0.5", "is empty"),
        ("0:1:0", "is empty"),
        ("0:1:0.001", f"1001 alphas are more than a sweep takes: {MAX_ALPHAS}"),
        ("0:999999999:0.000000001", "more than a sweep takes"),
        ("nan", "is not a number"),
        ("1e9", "is not a number"),
        ("0.5,0.50", "0.5 is there twice"),
        ([], "at least one"),
        ([True], "should be numbers"),
        ([float("inf")], "not finite"),
        ({}, "should be numbers"),
    ],
)
def test_what_is_no_alpha_is_refused(written: object, problem: str) -> None:
    """In words that say what was wrong."""
    with pytest.raises(ValidationError, match=problem):
        ALPHAS.validate_python(written)


@given(st.integers(-200, 200), st.integers(0, 50), st.integers(1, 40))
def test_a_range_has_the_numbers_that_would_be_typed(first: int, steps: int, step: int) -> None:
    """Each is the float of its shortest decimal text, whatever the binary sum would be."""
    last = first + steps * step
    found = parse_sweep_alphas(f"{first / 100:.2f}:{last / 100:.2f}:{step / 100:.2f}")
    assert found == tuple(float(f"{(first + n * step) / 100:.2f}") for n in range(steps + 1))
