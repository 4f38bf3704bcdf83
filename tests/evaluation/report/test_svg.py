"""vllm_rvec.evaluation.report.svg: charts whose coordinates mean the numbers."""

from __future__ import annotations

import doctest
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_rvec.evaluation.report import svg
from vllm_rvec.evaluation.report.svg import (
    Axis,
    Bar,
    Level,
    Mark,
    Series,
    bar_chart,
    interval_chart,
    line_chart,
)

NAMESPACE = "{http://www.w3.org/2000/svg}"
NUMBERS = st.floats(-1e6, 1e6).filter(lambda value: value == 0 or abs(value) > 1e-6)


def parsed(text: str) -> ET.Element:
    return ET.fromstring(text)  # noqa: S314 - our own


def numbers(element: ET.Element, *names: str) -> list[float]:
    return [float(element.get(name) or "nan") for name in names]


def test_examples_hold() -> None:
    """The doctests pass."""
    assert doctest.testmod(svg).failed == 0


@given(NUMBERS, st.floats(1e-3, 1e6))
def test_ticks_are_round_and_inside(low: float, width: float) -> None:
    """Two to a dozen, at equal steps, all between the ends."""
    axis = Axis(low, low + width, 0, 100)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 12
    room = width * 1e-6 + abs(low) * 1e-9
    assert all(low - room <= tick <= low + width + room for tick in ticks)


def test_a_mark_lies_where_its_numbers_say() -> None:
    """The middle of the axis for the middle value; its interval above and below."""
    series = Series(
        "v", "vector", (Mark(0.0, 0.2), Mark(0.5, 0.4, 0.3, 0.5, "half"), Mark(1.0, 0.6))
    )
    root = parsed(
        line_chart(
            "k",
            "t",
            [series],
            [Level("l", "prompted", 0.4)],
            x_label="alpha",
            is_share=True,
            is_from_zero=False,
        )
    )
    dots = [numbers(one, "cx", "cy") for one in root.iter(f"{NAMESPACE}circle")][:3]
    (left, low), (middle, half), (right, high) = dots
    assert middle == pytest.approx((left + right) / 2, abs=0.02)
    assert half == pytest.approx((low + high) / 2, abs=0.02)
    assert low > half > high
    bar = next(one for one in root.iter(f"{NAMESPACE}line") if one.get("class") == "bar vector")
    top, bottom = sorted(numbers(bar, "y1", "y2"))
    assert (half - top) == pytest.approx(bottom - half, abs=0.02)
    level = next(
        one for one in root.iter(f"{NAMESPACE}line") if one.get("class") == "level prompted"
    )
    assert numbers(level, "y1") == [half]
    assert "half" in [one.text for one in root.iter(f"{NAMESPACE}title")]


@given(
    st.lists(st.tuples(st.floats(-100, 100), st.floats(0, 1)), min_size=1, max_size=20),
    st.booleans(),
)
def test_any_values_give_a_picture(pairs: list[tuple[float, float]], is_from_zero: bool) -> None:
    """One point, all alike, far apart: XML without NaN, and nothing outside the frame."""
    series = Series("v", "vector", tuple(Mark(x, y) for x, y in pairs))
    text = line_chart("k", "t", [series], x_label="alpha", is_share=True, is_from_zero=is_from_zero)
    assert "nan" not in text
    assert "inf" not in text
    for dot in parsed(text).iter(f"{NAMESPACE}circle"):
        x, y = numbers(dot, "cx", "cy")
        assert 0 <= x <= svg.WIDTH
        assert 0 <= y <= svg.HEIGHT


def test_bars_are_as_long_as_their_counts() -> None:
    """To the left and right of one line; no discordant pair is no bar."""
    root = parsed(bar_chart("k", "t", [Bar("a", 10, 20), Bar("b", 0, 0)], ("lost", "gained")))
    widths = [numbers(one, "width")[0] for one in root.iter(f"{NAMESPACE}rect")][2:]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.05)
    assert widths[2:] == [0, 0]


def test_an_interval_below_zero_is_drawn_as_a_loss() -> None:
    """Left of the line, in the colour of losses; long labels are cut, and whole in the title."""
    long = "x" * 100
    rows = [(long, Mark(-0.1, 0, -0.2, -0.05)), ("gain", Mark(0.1, 0, -0.05, 0.2))]
    root = parsed(interval_chart("k", "t", rows, "points"))
    assert [one.get("class") for one in root.iter(f"{NAMESPACE}circle")] == [
        "mark loss",
        "mark vector",
    ]
    titles = [one.text for one in root.iter(f"{NAMESPACE}title")]
    assert long in titles
    assert max(len(one.text or "") for one in root.iter(f"{NAMESPACE}text")) <= svg.MAX_LABEL
