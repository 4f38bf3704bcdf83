"""What is asked of each proxy, and the goals of ours.

A figure is the median of some rounds. In a round everything that is compared is measured in turn:
the straight way, ours, the others; all are up all the time. The generator, the engine and a proxy
share the machine's cores, so no figure means much without the straight one beside it.
"""

from __future__ import annotations

import asyncio
import statistics
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import uvloop

from benchmarks.frame import Row, Verdict
from benchmarks.router.load import LoadError, Streams, hold_streams, latencies, rate
from benchmarks.router.proxies import OURS, STRAIGHT

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from benchmarks.router.load import Server
    from benchmarks.router.proxies import Running

__all__ = ["FULL", "TINY", "Figures", "Question", "Size", "measure", "questions"]

Rounds = dict[str, list[float]]
"""By proxy."""

SAMPLE_SECONDS = 0.1
WARMING_SECONDS = 0.5
WARMING_REQUESTS = 100


@dataclass(frozen=True, slots=True)
class Size:
    """How much is asked."""

    repeats: int
    requests: int
    """One after another, of each server in a round."""
    in_flight: int
    seconds: float
    """Of each load that is kept up."""
    chunks: int
    """Of a fast stream."""
    streams: int
    """Slow ones, at once."""
    slow_chunks: int
    pause_ms: int


FULL = Size(5, 400, 32, 2.0, 200, 1000, 40, 250)
TINY = Size(1, 20, 4, 0.1, 10, 20, 4, 100)


@dataclass(frozen=True, slots=True)
class Question:
    """A row: what was measured of each proxy, and what ours shall reach."""

    name: str
    rounds: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Of each proxy that was measured."""
    form: str = "{:.2f}"
    goal: float | None = None
    at_least: bool = False
    """Whether more is better; else less is."""

    @property
    def verdict(self) -> Verdict:
        """Of ours. A goal of 0 is missed by one; the others as `benchmarks.frame` says."""
        ours = self.rounds.get(OURS)
        if ours is None or self.goal is None:
            return Verdict.INFORMATION
        if self.goal == 0:
            return Verdict.REGRESSION if any(ours) else Verdict.MET
        return Row(self.name, tuple(ours), self.goal, at_least=self.at_least).verdict

    def shown(self, proxy: str) -> str:
        """The figure of one proxy: the median, or of what must be 0 the worst."""
        if not (rounds := self.rounds.get(proxy)):
            return ""
        figure = max(rounds) if self.goal == 0 else statistics.median(rounds)
        return self.form.format(figure)

    @property
    def shown_goal(self) -> str:
        """As it reads in the table."""
        if self.goal is None:
            return ""
        word = "at least " if self.at_least else "at most " * bool(self.goal)
        return word + self.form.format(self.goal)


@dataclass(slots=True)
class Figures:
    """What has been measured, round by round."""

    p50_ms: Rounds = field(default_factory=dict)
    added_ms: Rounds = field(default_factory=dict)
    requests_per_second: Rounds = field(default_factory=dict)
    chunks_per_second: Rounds = field(default_factory=dict)
    chunk_share: Rounds = field(default_factory=dict)
    errors: Rounds = field(default_factory=dict)
    open_streams: Rounds = field(default_factory=dict)
    resident_mb: Rounds = field(default_factory=dict)


def measure(
    engine: Server, proxies: Sequence[Running], size: Size, say: Callable[[str], object]
) -> tuple[Figures, dict[str, str]]:
    """Ask everything of everybody.

    Args:
        engine: What answers.
        proxies: Before it.
        size: How much is asked.
        say: Told what is being measured.

    Returns:
        The figures, and why a proxy has none: another's failure ends its own part only.

    Raises:
        LoadError: The engine, or our router, answered wrongly.
    """
    figures, failed = Figures(), dict[str, str]()
    servers = [engine, *(proxy.server for proxy in proxies)]

    def attempt(server: Server, part: Callable[[], None]) -> None:
        if server.name in failed:
            return
        try:
            part()
        except (LoadError, OSError) as exc:
            if server.name in {STRAIGHT, OURS}:
                raise
            failed[server.name] = str(exc)

    for server in servers:
        attempt(server, partial(_warm, server, size))
    for number in range(1, size.repeats + 1):
        say(f"round {number} of {size.repeats}")
        for server in servers:
            attempt(server, partial(_round, engine, server, size, figures))
    say(f"{size.streams:,} streams at once")
    for proxy in proxies:
        attempt(proxy.server, partial(_streams, proxy, size, figures))
    return figures, failed


def questions(figures: Figures, size: Size) -> list[Question]:
    """Lay the figures out as rows, with their goals.

    Args:
        figures: From `measure`.
        size: As it was asked.
    """
    flight, streams = size.in_flight, f"{size.streams:,} streams at once"
    return [
        Question("a request, p50, ms", figures.p50_ms),
        Question("added to it, p50, ms", figures.added_ms, goal=0.35),
        Question(
            f"requests/s, {flight} in flight",
            figures.requests_per_second,
            "{:,.0f}",
            2800,
            at_least=True,
        ),
        Question(f"SSE chunks/s, {flight} streams", figures.chunks_per_second, "{:,.0f}"),
        Question("the same, share of straight", figures.chunk_share, goal=0.85, at_least=True),
        Question(f"{streams}: errors", figures.errors, "{:.0f}", 0),
        Question(
            f"{streams}: open at the peak",
            figures.open_streams,
            "{:,.0f}",
            size.streams,
            at_least=True,
        ),
        Question(f"{streams}: resident MB", figures.resident_mb, "{:.0f}", 150),
    ]


def _warm(server: Server, size: Size) -> None:
    """Have a server open its connections and do for the first time what it does once."""
    seconds = min(size.seconds, WARMING_SECONDS)
    uvloop.run(latencies([server], min(size.requests, WARMING_REQUESTS)))
    uvloop.run(rate(server, size.in_flight, seconds))
    uvloop.run(rate(server, size.in_flight, seconds, size.chunks))


def _round(engine: Server, server: Server, size: Size, figures: Figures) -> None:
    """Ask one server; straight is asked again beside each proxy where times are compared."""
    if server is not engine:
        straight, own = uvloop.run(latencies([engine, server], size.requests))
        p50 = statistics.median(own)
        _note(figures.p50_ms, engine, statistics.median(straight) * 1e3)
        _note(figures.p50_ms, server, p50 * 1e3)
        _note(figures.added_ms, server, (p50 - statistics.median(straight)) * 1e3)
    requests = uvloop.run(rate(server, size.in_flight, size.seconds))
    chunks = size.chunks * uvloop.run(rate(server, size.in_flight, size.seconds, size.chunks))
    _note(figures.requests_per_second, server, requests)
    _note(figures.chunks_per_second, server, chunks)
    _note(figures.chunk_share, server, chunks / figures.chunks_per_second[engine.name][-1])


def _streams(proxy: Running, size: Size, figures: Figures) -> None:
    streams, peak_bytes = uvloop.run(_watched_streams(proxy, size))
    _note(figures.errors, proxy.server, len(streams.errors))
    _note(figures.open_streams, proxy.server, streams.open_at_peak)
    _note(figures.resident_mb, proxy.server, peak_bytes / 1e6)


async def _watched_streams(proxy: Running, size: Size) -> tuple[Streams, int]:
    """Hold streams, and look at the proxy's memory meanwhile."""
    work = asyncio.create_task(
        hold_streams(proxy.server, size.streams, size.slow_chunks, size.pause_ms)
    )
    peak_bytes = 0
    while not work.done():
        peak_bytes = max(peak_bytes, proxy.resident_bytes())
        await asyncio.wait({work}, timeout=SAMPLE_SECONDS)
    return await work, peak_bytes


def _note(rounds: Rounds, server: Server, figure: float) -> None:
    rounds.setdefault(server.name, []).append(figure)
