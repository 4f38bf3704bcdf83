"""Numbers in texts."""

from __future__ import annotations

import doctest
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_rvec.evaluation.scoring import number_text
from vllm_rvec.evaluation.scoring.number_text import numbers_in, value_of


def test_documented_examples_hold() -> None:
    """The docstrings' doctests pass."""
    assert doctest.testmod(number_text).failed == 0


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("42", ["42"]),
        ("42.", ["42"]),
        ("1,234,567.50", ["2469135/2"]),
        ("1,2,3", ["1", "2", "3"]),
        ("12,34", ["12", "34"]),
        ("-5", ["-5"]),
        ("−5", ["-5"]),  # noqa: RUF001 - a minus sign
        ("-$5.00", ["-5"]),
        ("$-5", ["-5"]),
        (r"\$18", ["18"]),
        ("€18", ["18"]),
        ("18€", ["18"]),
        ("50%", ["50"]),
        ("18km", ["18"]),
        ("10-8", ["10", "8"]),
        ("(3)-2", ["3", "2"]),
        ("46 +5=51 -8=43", ["46", "5", "51", "-8", "43"]),
        ("x2, H2O", []),
        (".5", ["1/2"]),
        ("3/4", ["3/4"]),
        ("1 1/2", ["3/2"]),
        ("-1 1/2", ["-3/2"]),
        ("5/0", ["5"]),
        (r"\frac{3}{4}", ["3/4"]),
        (r"-\dfrac{3}{4}", ["-3/4"]),
        (r"\frac{-3}{4}", ["-3/4"]),
        (r"2\frac{1}{3}", ["7/3"]),
        (r"1{,}234", ["1234"]),
        ("2e3", ["2000"]),
        ("2E-3", ["1/500"]),
        ("**7**", ["7"]),
        ("", []),
        ("9" * 200, []),
    ],
)
def test_numbers_are_read_as_they_are_written(text: str, values: list[str]) -> None:
    """Each form of a number has its exact value."""
    assert [str(number.value) for number in numbers_in(text)] == values


@given(st.integers(-(10**15), 10**15))
def test_every_integer_is_read_back(number: int) -> None:
    """Plain, with commas, with a dot behind, and after words."""
    for text in (f"{number}", f"{number:,}", f"It is {number}.", f"= {number:,} pens"):
        assert value_of(text) == number


@given(st.decimals(-(10**9), 10**9, places=3))
def test_every_decimal_is_read_exactly(number: object) -> None:
    """No digit is lost to binary fractions."""
    assert value_of(f"about ${number}!") == Fraction(str(number))


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_of_json_are_read_as_written(number: float) -> None:
    """A JSON number is what its digits say."""
    assert value_of(number) == Fraction(str(number))


@given(st.text(alphabet="0123456789.,-+/$ eE\\frac{}", max_size=200))
def test_any_text_is_read(text: str) -> None:
    """No text makes it fail."""
    numbers_in(text)


@pytest.mark.parametrize("answer", [None, True, [], {}, "none"])
def test_what_is_no_number_has_no_value(answer: None) -> None:
    """Neither true nor a list is a number."""
    assert value_of(answer) is None


@pytest.mark.parametrize("piece", ["9", "1,", "123,", "1 ", "-", ".", "1/", "$", "e1", r"\frac{1"])
def test_long_repetitions_take_no_time(piece: str) -> None:
    """A model in collapse repeats itself; reading it is linear."""
    began = time.monotonic()
    numbers_in(piece * 10_000)
    assert time.monotonic() - began < 2
