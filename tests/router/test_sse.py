"""Complete events pass at once; a begun one waits."""

from __future__ import annotations

import doctest
import itertools
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from vllm_rvec.router import sse
from vllm_rvec.router.sse import EventGate

if TYPE_CHECKING:
    import pytest

TEXT = st.lists(st.sampled_from([b"data: x", b": ping", b"\n", b"\r\n", b"\r"]), max_size=30)


def cut(text: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(edges)]


@given(TEXT.map(b"".join), st.lists(st.integers(0, 400), max_size=10))
def test_the_bytes_are_the_same_however_they_are_cut(text: bytes, places: list[int]) -> None:
    """What passes, and what is held at the end, is what came."""
    gate = EventGate()
    passed = b"".join(gate.feed(chunk) for chunk in cut(text, places))
    assert passed + gate.held == text


@given(st.lists(st.integers(0, 400), max_size=10), st.sampled_from(sse.BLANK_LINES))
def test_whatever_passes_ends_with_a_complete_event(places: list[int], blank: bytes) -> None:
    """So an error event may follow at any time."""
    gate = EventGate()
    text = b"event: a\ndata: 1" + blank + b"data: 2" + blank + b"data: 3"
    passed = [events for chunk in cut(text, places) if (events := gate.feed(chunk))]
    assert all(events.endswith(blank) for events in passed)
    assert gate.held == b"data: 3"
    assert gate.is_between_events


def test_a_complete_event_never_waits() -> None:
    """It passes with the chunk that ends it, even when another has begun."""
    gate = EventGate()
    assert gate.feed(b"data: 1\n\n") == b"data: 1\n\n"
    assert gate.feed(b"data: 2\n\ndata:") == b"data: 2\n\n"
    assert gate.feed(b" 3\n") == b""
    assert gate.feed(b"\n") == b"data: 3\n\n"


def test_an_event_beyond_the_limit_passes_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory stays bounded, and the gate says that an event can't follow before this one ends."""
    monkeypatch.setattr(sse, "HELD_BYTES", 8)
    gate = EventGate()
    steps = [
        (gate.feed(chunk), gate.is_between_events)
        for chunk in (b"data: 1", b"23456", b"7", b"8\n\nd")
    ]
    assert steps == [(b"", True), (b"data: 123456", False), (b"7", False), (b"8\n\n", True)]
    assert gate.held == b"d"


def test_the_example_in_the_docstring_holds() -> None:
    """Documentation that runs."""
    assert doctest.testmod(sse).failed == 0
