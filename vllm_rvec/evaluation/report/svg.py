"""Small charts as SVG texts: points with intervals against a number, and bars to both sides.

Colours are classes that the page's style sheet gives, for light and dark; every text is escaped.
Knows nothing of sweeps: that is for `pictures`.
"""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_rvec.errors import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    "Axis",
    "Bar",
    "Level",
    "Mark",
    "Series",
    "bar_chart",
    "escape",
    "interval_chart",
    "line_chart",
]

WIDTH = 560
HEIGHT = 320
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 48, 44
"""Room around the plot: the legend stands above it."""
LOW_TOP = 12
"""Room above a plot without a legend."""
ROW = 26
"""Height of a row in a chart of rows."""
LABEL_WIDTH = 190
MAX_LABEL = 28
"""Characters beside a row; the whole text is in its title."""
LEGEND_STEP = 22
CHARACTER = 6.4
"""Width of one, about, at the size of the legend."""
STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True, slots=True)
class Mark:
    """A value, perhaps with its interval."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    title: str = ""
    """What a pointer, or a screen reader, finds there."""


@dataclass(frozen=True, slots=True)
class Series:
    """Values of one kind."""

    name: str
    style: str
    """A class of the style sheet."""
    marks: tuple[Mark, ...]
    is_line: bool = True


@dataclass(frozen=True, slots=True)
class Level:
    """One value that holds for every x: a dashed line, with its interval as a band."""

    name: str
    style: str
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Bar:
    """A row with a bar to each side."""

    label: str
    left: int
    right: int


@dataclass(frozen=True, slots=True)
class Axis:
    """From where to where, and where it places a value.

    Args:
        low: The value at `start`.
        high: The value at `end`; above `low`.
        start: In the picture's units.
        end: In the picture's units.
    """

    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        """Where a value lies; never outside."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)

    def ticks(self, count: int = 6) -> list[float]:
        """Round values along it, about so many."""
        rough = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(one * power for one in STEPS if one * power >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def escape(text: str) -> str:
    r"""Make any text mean itself in HTML and SVG, control characters and all.

    >>> escape("<b>\x1b")
    '&lt;b&gt;\\x1b'
    """
    return html.escape(printable(text, keep="\n\t"))


def line_chart(
    key: str,
    title: str,
    series: Sequence[Series],
    levels: Sequence[Level] = (),
    *,
    x_label: str,
    is_share: bool,
    is_from_zero: bool,
) -> str:
    """Values against a number.

    Args:
        key: Unique in the page.
        title: What it shows: also its description for those who don't see it.
        series: At least one with a mark.
        levels: Drawn across.
        x_label: Under the axis.
        is_share: Whether values are shares, shown in per cent and never outside 0 to 1.
        is_from_zero: Whether the axis has to hold 0.
    """
    across = _padded([mark.x for one in series for mark in one.marks])
    heights = _heights(series, levels)
    x = Axis(*across, LEFT, WIDTH - RIGHT)
    y = Axis(*_range(heights, is_share=is_share, is_from_zero=is_from_zero), HEIGHT - BOTTOM, TOP)
    body = [
        *_grid(x, y, x_label, is_share=is_share),
        *(_level(level, x, y) for level in levels),
        *(_drawn(one, x, y) for one in series),
        *_legend([(one.name, one.style, False) for one in series if one.marks], levels),
    ]
    return _picture(key, title, HEIGHT, body)


def interval_chart(key: str, title: str, rows: Sequence[tuple[str, Mark]], x_label: str) -> str:
    """Rows of values with their intervals, and a line at 0: shares, shown in points.

    Args:
        key: Unique in the page.
        title: What it shows.
        rows: A label, and a mark of which only `x` and the interval, along x, are read.
        x_label: Under the axis.
    """
    values = [0.0]
    for _, mark in rows:
        values += [one for one in (mark.x, mark.low, mark.high) if one is not None]
    height = LOW_TOP + ROW * len(rows) + BOTTOM
    x = Axis(*_padded(values), LABEL_WIDTH, WIDTH - RIGHT)
    body = list(_vertical_grid(x, height, x_label))
    for index, (label, mark) in enumerate(rows):
        middle = LOW_TOP + ROW * (index + 0.5)
        body.append(_row_label(label, middle))
        body.append(f"<g><title>{escape(mark.title)}</title>")
        if mark.low is not None and mark.high is not None:
            body.append(_line(x.place(mark.low), middle, x.place(mark.high), middle, "bar vector"))
        style = "loss" if (mark.high or 0) < 0 else "vector"
        body.append(
            f'<circle class="mark {style}" cx="{_n(x.place(mark.x))}" cy="{middle}" r="5"/>'
        )
        body.append("</g>")
    return _picture(key, title, height, body)


def bar_chart(key: str, title: str, rows: Sequence[Bar], sides: tuple[str, str]) -> str:
    """Counts to both sides of a line.

    Args:
        key: Unique in the page.
        title: What it shows.
        rows: At least one.
        sides: What the left bars are called, and the right ones.
    """
    most = max(1, *(max(row.left, row.right) for row in rows))
    height = TOP + ROW * len(rows) + 16
    x = Axis(-most, most, LABEL_WIDTH + 40, WIDTH - RIGHT - 40)
    body = list(_legend([(sides[0], "loss", True), (sides[1], "gain", True)], ()))
    for index, row in enumerate(rows):
        top, middle = TOP + ROW * index + 4, TOP + ROW * (index + 0.5)
        body.append(_row_label(row.label, middle))
        for count, style, sign in ((row.left, "loss", -1), (row.right, "gain", 1)):
            end, zero = x.place(sign * count), x.place(0)
            body.append(
                f'<rect class="fill {style}" x="{_n(min(end, zero))}" y="{top}" '
                f'width="{_n(abs(end - zero))}" height="{ROW - 8}"/>'
            )
            anchor = "end" if sign < 0 else "start"
            body.append(_text(end + sign * 5, middle + 4, f"{count:,}", anchor=anchor))
    body.append(_line(x.place(0), TOP, x.place(0), height - 16, "axis"))
    return _picture(key, title, height, body)


def _picture(key: str, title: str, height: float, body: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {_n(height)}" role="img" aria-labelledby="{escape(key)}-title" '
        f'xmlns="http://www.w3.org/2000/svg"><title id="{escape(key)}-title">{escape(title)}'
        f"</title>{''.join(body)}</svg>"
    )


def _heights(series: Sequence[Series], levels: Sequence[Level]) -> list[float]:
    found: list[float] = []
    for one in series:
        for mark in one.marks:
            found += [value for value in (mark.y, mark.low, mark.high) if value is not None]
    for level in levels:
        found += [value for value in (level.y, level.low, level.high) if value is not None]
    return found


def _range(values: Sequence[float], is_share: bool, is_from_zero: bool) -> tuple[float, float]:
    low, high = _padded([*values, 0.0] if is_from_zero else values)
    if is_from_zero:
        low = 0.0
    if is_share:
        low, high = max(0.0, low), min(1.0, high)
        if high - low < 0.05:
            low, high = max(0.0, high - 0.05), min(1.0, low + 0.05)
    return low, high


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * 0.06 or max(abs(high), 1.0) * 0.1
    return low - room, high + room


def _grid(x: Axis, y: Axis, x_label: str, *, is_share: bool) -> Iterator[str]:
    for tick in y.ticks():
        yield _line(x.start, y.place(tick), x.end, y.place(tick), "grid")
        text = f"{_zero(tick * 100):g} %" if is_share else f"{_zero(tick):,g}"
        yield _text(x.start - 8, y.place(tick) + 4, text, anchor="end")
    for tick in x.ticks():
        yield _line(x.place(tick), y.start, x.place(tick), y.start + 5, "axis")
        yield _text(x.place(tick), y.start + 18, f"{_zero(tick):g}", anchor="middle")
    yield _line(x.start, y.start, x.end, y.start, "axis")
    yield _text((x.start + x.end) / 2, y.start + 36, x_label, anchor="middle")


def _vertical_grid(x: Axis, height: float, x_label: str) -> Iterator[str]:
    bottom = height - BOTTOM
    for tick in x.ticks():
        yield _line(x.place(tick), LOW_TOP, x.place(tick), bottom, "grid")
        text = f"{_zero(tick * 100):+g}" if _zero(tick) else "0"
        yield _text(x.place(tick), bottom + 18, text, anchor="middle")
    yield _line(x.place(0), LOW_TOP, x.place(0), bottom, "axis")
    yield _text((x.start + x.end) / 2, bottom + 36, x_label, anchor="middle")


def _drawn(series: Series, x: Axis, y: Axis) -> str:
    marks = sorted(series.marks, key=lambda mark: mark.x)
    parts = [f'<g class="series {series.style}">']
    if series.is_line and len(marks) > 1:
        points = " ".join(f"{_n(x.place(mark.x))},{_n(y.place(mark.y))}" for mark in marks)
        parts.append(f'<polyline class="line {series.style}" points="{points}"/>')
    for mark in marks:
        across, up = x.place(mark.x), y.place(mark.y)
        parts.append(f"<g><title>{escape(mark.title)}</title>")
        if mark.low is not None and mark.high is not None:
            low, high = y.place(mark.low), y.place(mark.high)
            parts.append(_line(across, low, across, high, f"bar {series.style}"))
        parts.append(_shape(series.style, across, up))
        parts.append("</g>")
    return "".join([*parts, "</g>"])


def _shape(style: str, x: float, y: float) -> str:
    """A shape for each style, so that it can be told without its colour."""
    corners = {
        "prompted": ((-5, -5), (5, -5), (5, 5), (-5, 5)),
        "random": ((0, -6), (6, 0), (0, 6), (-6, 0)),
        "minus": ((-6, -5), (6, -5), (0, 6)),
    }.get(style)
    if corners is None:
        return f'<circle class="mark {style}" cx="{_n(x)}" cy="{_n(y)}" r="5"/>'
    points = " ".join(f"{_n(x + across)},{_n(y + down)}" for across, down in corners)
    return f'<polygon class="mark {style}" points="{points}"/>'


def _level(level: Level, x: Axis, y: Axis) -> str:
    band = ""
    if level.low is not None and level.high is not None:
        top, bottom = y.place(level.high), y.place(level.low)
        band = (
            f'<rect class="band {level.style}" x="{_n(x.start)}" y="{_n(top)}" '
            f'width="{_n(x.end - x.start)}" height="{_n(bottom - top)}"/>'
        )
    line = _line(x.start, y.place(level.y), x.end, y.place(level.y), f"level {level.style}")
    return f"<g><title>{escape(level.name)}</title>{band}{line}</g>"


def _legend(series: Sequence[tuple[str, str, bool]], levels: Sequence[Level]) -> Iterator[str]:
    across = float(LEFT)
    for name, style, is_bar in series:
        if is_bar:
            yield f'<rect class="fill {style}" x="{_n(across)}" y="15" width="10" height="10"/>'
        else:
            yield _shape(style, across + 5, 20)
        yield _text(across + 16, 24, name)
        across += 16 + len(name) * CHARACTER + LEGEND_STEP
    for level in levels:
        yield _line(across - 2, 20, across + 14, 20, f"level {level.style}")
        yield _text(across + 20, 24, level.name)
        across += 20 + len(level.name) * CHARACTER + LEGEND_STEP


def _row_label(label: str, middle: float) -> str:
    shown = label if len(label) <= MAX_LABEL else f"{label[: MAX_LABEL - 1]}…"
    text = _text(LABEL_WIDTH - 10, middle + 4, shown, anchor="end")
    return f"<g><title>{escape(label)}</title>{text}</g>"


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line class="{style}" x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start") -> str:
    return f'<text x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}">{escape(text)}</text>'


def _n(value: float) -> str:
    """A coordinate, to a hundredth."""
    return f"{round(value, 2):g}"


def _zero(tick: float) -> float:
    """Without the dust of 0.1 + 0.2 - 0.3, and no -0."""
    return round(tick, 10) + 0.0
