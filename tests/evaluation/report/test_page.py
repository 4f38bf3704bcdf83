"""vllm_rvec.evaluation.report.page: one page that loads nothing and runs nothing."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from tests.evaluation.report.conftest import HOSTILE
from tests.evaluation.simulation import BASE, VECTORS, Truth, sweep, task
from vllm_rvec.evaluation.analysis import analyse
from vllm_rvec.evaluation.report import as_html
from vllm_rvec.evaluation.report.svg import CHARACTER

if TYPE_CHECKING:
    from vllm_rvec.evaluation.results import SweepResults

VOID = {"meta"}
ELEMENTS = {
    *("html", "head", "meta", "title", "style", "body", "main", "section", "h1", "h2", "h3", "p"),
    *("ul", "li", "div", "table", "caption", "thead", "tbody", "tr", "th", "td", "bdi", "figure"),
    *("figcaption", "svg", "g", "line", "rect", "circle", "polygon", "polyline", "text"),
    *("details", "summary", "article", "dl", "dt", "dd", "pre"),
}


class Reader(HTMLParser):
    """Which elements and attributes there are, and whether each that opens is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.attributes: set[str] = set()
        self.ids: list[str] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element opens."""
        self.elements.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element without content."""
        self.elements.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        """An element closes: the one that opened last."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Text between."""
        self.texts.append(data)


def pictures(html: str) -> list[ET.Element]:
    return [ET.fromstring(one) for one in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]  # noqa: S314


def test_the_page_loads_and_runs_nothing(results: SweepResults, hostile: SweepResults) -> None:
    """No script, no link, no image, no event, no address but the name of SVG; and a policy."""
    for each in (results, hostile):
        html = as_html(each)
        reader = Reader(html)
        assert reader.elements <= ELEMENTS
        assert not {name for name in reader.attributes if name.startswith(("on", "style"))}
        assert not reader.attributes & {"src", "href", "srcset", "action", "xlink:href"}
        assert set(re.findall(r"https?://[^\"\s<]*", html)) <= {"http://www.w3.org/2000/svg"}
        assert "url(" not in html
        assert "@import" not in html
        assert "default-src 'none'" in html


def test_every_element_is_closed_and_every_id_unique(
    results: SweepResults, hostile: SweepResults
) -> None:
    """Whatever the names are."""
    for each in (results, hostile):
        reader = Reader(as_html(each))
        assert reader.open == []
        assert len(reader.ids) == len(set(reader.ids)) > 0


def test_nothing_of_others_becomes_markup(hostile: SweepResults) -> None:
    """Names, questions, answers, facts: shown as they are, with control characters spelled out."""
    html = as_html(hostile)
    assert "<script" not in html
    assert "\x1b" not in html
    assert "\u202e" not in html
    assert html.encode()
    shown = HOSTILE.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    assert shown.replace("\udc80", "\\udc80") in "".join(Reader(html).texts)


def test_pictures_are_well_formed_and_say_what_they_show(
    results: SweepResults, hostile: SweepResults
) -> None:
    """XML that parses; a title that the picture is labelled by; a table in the same section."""
    for each, count in ((results, 17), (hostile, 5)):
        drawn = pictures(as_html(each))
        assert len(drawn) == count
        for picture in drawn:
            title = picture[0]
            assert title.tag.endswith("title")
            assert title.text
            assert picture.get("aria-labelledby") == title.get("id")
            assert picture.get("role") == "img"


def test_pictures_stay_inside_their_frame(results: SweepResults, hostile: SweepResults) -> None:
    """No coordinate outside the view, none that isn't a number."""
    for picture in (*pictures(as_html(results)), *pictures(as_html(hostile))):
        _, _, width, height = (float(one) for one in (picture.get("viewBox") or "").split())
        for element in picture.iter():
            for names, limit in (
                (("x", "x1", "x2", "cx"), width),
                (("y", "y1", "y2", "cy"), height),
            ):
                for value in (element.get(name) for name in names):
                    assert value is None or 0 <= float(value) <= limit


def test_light_and_dark_come_from_the_reader(results: SweepResults) -> None:
    """Both palettes define the same colours, and every colour used is defined."""
    html = as_html(results)
    style = html[html.index("<style>") : html.index("</style>")]
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    defined = set(re.findall(r"(--[a-z]+):", light))
    assert set(re.findall(r"(--[a-z]+):", dark)) == defined
    assert set(re.findall(r"var\((--[a-z]+)\)", style)) == defined
    assert "prefers-color-scheme: dark" in style


def test_the_page_has_what_the_sweep_needs_to_be_believed(results: SweepResults) -> None:
    """Verdict, cautions, confirmation, losses, noise, cost, flips, repetition, methods."""
    html = as_html(results)
    for heading in (
        "Before you believe it",
        "Held-out confirmation",
        "Losses beside gains",
        "Noise and cost",
        "Problems that flip: a sample",
        "Repeat this",
        "How it was calculated",
    ):
        assert f"<h2>{heading}</h2>" in html
    assert f'class="verdict {results.verdict.code}"' in html
    assert html.count("<article") == len(results.flips)


def test_a_sweep_that_shows_nothing_has_a_page_too() -> None:
    """No answers, no tasks, one problem: a page, and no exception."""
    for results in (
        analyse([task("a", 5)], [BASE, *VECTORS], [], {}),
        analyse([], [BASE], [], {}),
        analyse([], [], [], {}),
        sweep(1, [task("a", 1)], {BASE: Truth(), VECTORS[0]: Truth()}),
    ):
        assert Reader(as_html(results)).open == []


def test_legends_fit_beside_each_other(results: SweepResults) -> None:
    """The last word of a legend, of all kinds of arms, ends inside the picture."""
    for picture in pictures(as_html(results)):
        width = float((picture.get("viewBox") or "").split()[2])
        for text in picture.iter("{http://www.w3.org/2000/svg}text"):
            if text.get("text-anchor") == "start":
                assert float(text.get("x") or 0) + CHARACTER * len(text.text or "") <= width
