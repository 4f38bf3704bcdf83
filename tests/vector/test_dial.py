"""vllm_rvec.vector.dial: names, alphas and ranges, as requests write them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vllm_rvec.errors import ConfigError
from vllm_rvec.vector.dial import AlphaRange, AlphaRequestError, Dial, vector_names
from vllm_rvec.vector.recipe import RecipeVector

ONE = Dial(("v",), {"base": (0.0,), "enhanced@1": (1.0,), "far": (9.0,)})
TWO = Dial(("reasoning", "style"), {"base": (0.0, 0.0)})
ALPHAS = st.floats(-1, 2, allow_nan=False).map(lambda x: 0.0 if abs(x) < 1e-30 else x)


@pytest.mark.parametrize(
    ("name", "alphas"),
    [
        ("base", (0.0,)),
        ("far", (9.0,)),
        ("enhanced@0.5", (0.5,)),
        ("enhanced@-1", (-1.0,)),
        ("enhanced@2e-1", (0.2,)),
        ("enhanced@.5", (0.5,)),
        ("enhanced@2.0000001", None),
        ("enhanced@nan", None),
        ("enhanced@inf", None),
        ("enhanced@", None),
        ("enhanced@1e-45", None),
        ("enhanced@0.5\n", None),
        ("enhanced@ 0.5", None),
        ("enhanced@1_0e-1", None),
        ("enhanced@\u0661", None),
        ("enhanced@0." + "0" * 100, None),
        ("Base", None),
    ],
)
def test_what_a_models_name_stands_for(name: str, alphas: tuple[float] | None) -> None:
    """Listed ones may be out of range; others are plain numbers in it, fit for a header."""
    assert ONE.of_model(name) == alphas


def test_a_listed_name_goes_before_the_number_in_it() -> None:
    """As a change of a variant's alpha leaves its name."""
    dial = ONE.with_variant("enhanced@1", (0.7,))
    assert dial.of_model("enhanced@1") == (0.7,)
    assert ONE.of_model("enhanced@1") == (1.0,)
    assert dial.is_misnamed("enhanced@1")
    assert not ONE.is_misnamed("enhanced@1")
    assert not ONE.is_misnamed("far")
    assert ONE.with_variant("base", (0.1,)).is_misnamed("base")


def test_each_form_of_a_body() -> None:
    """A number is for all vectors, a list goes in order, a mapping has 0 for those not named."""
    assert TWO.of_value(0.5) == (0.5, 0.5)
    assert TWO.of_value(1) == (1.0, 1.0)
    assert TWO.of_value([0.5, -1]) == (0.5, -1.0)
    assert TWO.of_value({"style": 0.25}) == (0.0, 0.25)
    assert math.copysign(1, ONE.of_value(-0.0)[0]) == 1


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("0.5", "must be a number"),
        (True, "must be a number"),
        (None, "must be a number"),
        ({"reasoning": "x"}, "must be a number"),
        ([0.5], "alpha has 1 numbers, one for each vector would be 2: reasoning, style"),
        ({"taste": 1}, "no vector is called taste; there are reasoning, style"),
        (2.5, "alpha 2.5 is outside of -1:2"),
        ([0, -1.5], "alpha -1.5 is outside of -1:2"),
        (math.nan, "alpha is not finite"),
        (10**400, "alpha is not finite"),
        (1e-40, "beyond the range of float32"),
    ],
)
def test_what_a_body_can_not_say(value: object, words: str) -> None:
    """The message is for the request's sender."""
    with pytest.raises(AlphaRequestError) as caught:
        TWO.of_value(value)
    assert words in str(caught.value)


def test_each_form_of_a_header() -> None:
    """One number, or pairs; spaces do not matter."""
    assert TWO.of_header(" 0.35 ") == (0.35, 0.35)
    assert TWO.of_header("reasoning=0.7, style = -0.2") == (0.7, -0.2)
    assert TWO.of_header("style=1") == (0.0, 1.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "alpha '' is not a number"),
        ("much", "alpha 'much' is not a number"),
        ("1_0", "is not a number"),
        ("reasoning=", "is not a number"),
        ("taste=1", "no vector is called taste"),
        ("style=3", "alpha 3 is outside of -1:2"),
        ("x" * 10_000, "alpha 'xxx"),
    ],
)
def test_what_a_header_can_not_say(text: str, words: str) -> None:
    """And what is said of it stays short."""
    with pytest.raises(AlphaRequestError) as caught:
        TWO.of_header(text)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 200


@given(st.tuples(ALPHAS, ALPHAS))
def test_a_headers_text_reads_back(alphas: tuple[float, float]) -> None:
    """Bit for bit, also where all are the same; and so does a body's."""
    assert TWO.of_header(TWO.text(alphas)) == alphas
    assert TWO.of_value(TWO.plain(alphas)) == alphas


@given(ALPHAS)
def test_a_name_reads_back(alpha: float) -> None:
    """Whatever is shown as a variant's name can be asked for."""
    assert ONE.of_model(f"enhanced@{ONE.text((alpha,))}") == (alpha,)


def test_a_range_is_two_numbers() -> None:
    """Both ends may be the same."""
    assert AlphaRange.parse("-0.5:1e1") == AlphaRange(-0.5, 10.0)
    assert str(AlphaRange.parse("1:1")) == "1:1"


@pytest.mark.parametrize("text", ["", "1", "2:1", "a:b", "0:nan", "0:1:2", "-inf:1", "0:1e39"])
def test_other_ranges_are_refused(text: str) -> None:
    """With how to write one."""
    with pytest.raises(ConfigError, match="such as -1:2"):
        AlphaRange.parse(text)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/a/reasoning"], ["reasoning"]),
        (["owner/vector@v1.2", "s3://bucket/vector"], ["vector", "vector-2"]),
        (["a/v", "b/v", "c/v-2", "d/v"], ["v", "v-2", "v-2-2", "v-3"]),
        (["/my vectors/a = b, c/"], ["a-b-c"]),
        (["/x/\u03b8\n"], ["-"]),
        (["/"], ["vector"]),
    ],
)
def test_vectors_are_called_as_their_folders(paths: list[str], names: list[str]) -> None:
    """Each in its own way, and so that a header can hold it."""
    assert vector_names([RecipeVector(path=path) for path in paths]) == tuple(names)


def test_a_name_of_ones_own_goes_first() -> None:
    """And two of the same are told apart all the same."""
    recipe = [RecipeVector(path="a/v", name="style"), RecipeVector(path="b/style")]
    assert vector_names(recipe) == ("style", "style-2")


@pytest.mark.parametrize("name", ["", "a b", "a,b", "a=b", "a\n", "\u00fc"])
def test_a_name_that_a_header_can_not_hold_is_refused(name: str) -> None:
    """Whoever writes it hears of it."""
    with pytest.raises(ValidationError, match="printable ASCII text"):
        RecipeVector(path="v", name=name)
