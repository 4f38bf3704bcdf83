"""benchmarks.router: the stand-in and the load agree, wrong answers are found, the table judges."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from benchmarks.frame import Verdict
from benchmarks.router import proxies
from benchmarks.router.__main__ import main, report
from benchmarks.router.load import LoadError, Server, ask, hold_streams, latencies, rate
from benchmarks.router.measure import TINY, Figures, Question, measure, questions
from benchmarks.router.proxies import (
    OURS,
    PROXIES,
    STRAIGHT,
    Proxy,
    ProxyError,
    Running,
    started,
    started_engine,
)
from benchmarks.router.wire import body_length, chat_request, chunk, is_whole_chunked, joined

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

OUR_ROUTER = next(proxy for proxy in PROXIES if proxy.name == OURS)
NOTHING = Proxy("nothing", lambda _: [sys.executable, "-c", "print('no thanks'); exit(3)"])


@pytest.fixture(scope="module")
def engine() -> Iterator[Server]:
    with started_engine() as server:
        yield server


@pytest.fixture(scope="module")
def ours(engine: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A process of its own before the engine."""
    with started(OUR_ROUTER, engine, tmp_path_factory.mktemp("ours")) as running:
        yield running


async def ask_one_that_answers(answer: bytes, *, chunks: int = 0) -> bytes:
    """Ask a server that always says the same and then closes the connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        return await asyncio.wait_for(ask(Server("fake", port), chunks), 10)


def test_chunks_are_joined_wherever_they_are_cut() -> None:
    """A proxy may cut a stream anew; the data is the same. The end is seen only at the end."""
    body = chunk(b"data: 1\n") + chunk(b"\ndata: 0\r\n\r\n"[:9]) + b"0\r\n\r\n"
    assert joined(body) == b"data: 1\n\ndata: 0\r"
    assert is_whole_chunked(body)
    assert is_whole_chunked(b"0\r\n\r\n")
    assert not any(is_whole_chunked(body[:end]) for end in range(len(body)))
    assert not is_whole_chunked(b"10\r\n\r\n")


def test_a_request_says_how_long_its_body_is() -> None:
    """By its bytes, whatever the case of the header."""
    head, _, body = chat_request("h:1", chunks=3, pause_ms=7).partition(b"\r\n\r\n")
    assert body_length(head) == body_length(head.lower()) == len(body)
    asked = json.loads(body)
    assert asked["stream"] is True
    assert asked["messages"][0]["content"] == "3 chunks, 7 ms apart"
    assert b"stream" not in chat_request("h:1")


def test_the_stand_in_answers_in_one_piece_and_in_chunks(engine: Server) -> None:
    """The answer is a chat completion; a stream has its chunks, an end, and `[DONE]`."""
    whole = json.loads(asyncio.run(ask(engine)))
    assert whole["choices"][0]["finish_reason"] == "stop"
    assert whole["usage"]["completion_tokens"] == 8
    stream = asyncio.run(ask(engine, 5))
    events = [event.removeprefix(b"data: ") for event in stream.split(b"\n\n")[:-1]]
    assert events[-1] == b"[DONE]"
    assert [json.loads(e)["choices"][0]["finish_reason"] for e in events[:-1]] == [None] * 5 + [
        "stop"
    ]


def test_the_load_measures_the_straight_way(engine: Server) -> None:
    """Each load does what it says, and the engine alone makes no errors."""
    first, second = asyncio.run(latencies([engine, engine], 5))
    assert len(first) == len(second) == 5
    assert asyncio.run(rate(engine, 4, 0.05)) > 0
    assert asyncio.run(rate(engine, 4, 0.05, chunks=10)) > 0
    streams = asyncio.run(hold_streams(engine, 150, 3, 100))
    assert (streams.errors, streams.open_at_peak, streams.open_now) == ([], 150, 0)


@pytest.mark.parametrize(
    ("answer", "chunks", "what"),
    [
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", 0, "503 Busy"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort", 0, "closed early"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", 1, "closed early"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\n tok\r\n0\r\n\r\n",
            2,
            "1 chunks came, not 2",
        ),
        (b"", 0, "closed early"),
    ],
)
def test_a_wrong_answer_is_no_fast_answer(answer: bytes, chunks: int, what: str) -> None:
    """Errors, short bodies, streams without end and missing chunks all count as errors."""
    with pytest.raises(LoadError, match=what):
        asyncio.run(ask_one_that_answers(answer, chunks=chunks))


def test_ours_is_measured_beside_the_straight_way(engine: Server, ours: Running) -> None:
    """In the tiny form, as a process of its own: every row has a figure of ours."""
    figures, failed = measure(engine, [ours], TINY, lambda _: None)
    assert failed == {}
    rows = questions(figures, TINY)
    assert all(row.rounds[OURS] for row in rows)
    assert figures.errors[OURS] == [0]
    assert figures.open_streams[OURS] == [TINY.streams]
    assert 10 < figures.resident_mb[OURS][0] < 150
    assert set(figures.requests_per_second) == {STRAIGHT, OURS}


def test_a_competitor_that_fails_under_load_loses_only_its_own_figures(
    engine: Server, ours: Running
) -> None:
    """The others are measured to the end; what failed is said."""
    gone = replace(ours, server=Server("gone", 1))
    figures, failed = measure(engine, [gone, ours], TINY, lambda _: None)
    assert list(failed) == ["gone"]
    assert "gone" not in figures.p50_ms
    assert figures.errors[OURS] == [0]


def test_what_does_not_start_says_why(engine: Server, tmp_path: Path) -> None:
    """With the end of its log; what is not installed, with the command that installs it."""
    with (
        pytest.raises(ProxyError, match="it ended with 3: no thanks"),
        started(NOTHING, engine, tmp_path),
    ):
        pass
    absent = replace(NOTHING, environment=tmp_path / ".venv-nothing")
    with (
        pytest.raises(ProxyError, match=r"make \.venv-nothing/\.made"),
        started(absent, engine, tmp_path),
    ):
        pass


def test_children_see_no_variables_of_this_process(
    engine: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Competitors are other people's code: what may be secret is not theirs."""
    monkeypatch.setenv("SECRET", "very")
    show = "import os, sys; sys.exit(' '.join(sorted(os.environ)))"
    proxy = Proxy("shows", lambda _: [sys.executable, "-c", show])
    with pytest.raises(ProxyError) as raised, started(proxy, engine, tmp_path):
        pass
    assert "HOME" in str(raised.value)
    assert "SECRET" not in str(raised.value)


def test_the_command_leaves_out_with_a_word_what_is_not_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on; the JSON says who was left out, and why."""
    monkeypatch.setattr(proxies, "START_SECONDS", 20.0)
    # The figures of a tiny run mean nothing, so neither does its exit status.
    assert main(["--tiny", "--json"], [OUR_ROUTER, NOTHING]) in {0, 1}
    told = json.loads(capsys.readouterr().out)
    assert told["left_out"].keys() == {"nothing"}
    assert {tuple(row["rounds"]) for row in told["rows"]} >= {(STRAIGHT, OURS)}


@pytest.mark.parametrize(
    ("question", "verdict"),
    [
        (Question("added", {OURS: [0.3, 0.35, 0.6]}, goal=0.35), Verdict.MET),
        (Question("added", {OURS: [0.3, 0.6, 0.6]}, goal=0.35), Verdict.MISS),
        (Question("added", {OURS: [0.5, 0.6, 0.6]}, goal=0.35), Verdict.REGRESSION),
        (Question("rate", {OURS: [2500, 2600]}, goal=2800, at_least=True), Verdict.MISS),
        (Question("rate", {OURS: [2000, 2100]}, goal=2800, at_least=True), Verdict.REGRESSION),
        (Question("errors", {OURS: [0, 0]}, goal=0), Verdict.MET),
        (Question("errors", {OURS: [0, 0, 1]}, goal=0), Verdict.REGRESSION),
        (Question("errors", {"LiteLLM": [9]}, goal=0), Verdict.INFORMATION),
        (Question("p50", {OURS: [9]}), Verdict.INFORMATION),
    ],
)
def test_only_ours_is_judged_and_no_error_is_forgiven(question: Question, verdict: Verdict) -> None:
    """Times as every benchmark's; a single failed stream fails the run."""
    assert question.verdict is verdict


def test_the_table_shows_each_goal_and_fails_with_a_regression(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Beside the figures of everybody who was measured."""
    figures = Figures(
        added_ms={OURS: [0.2], "vllm-router": [0.1]}, errors={OURS: [0], "vllm-router": [7]}
    )
    assert report(questions(figures, TINY), {"LiteLLM": "no wheel"}, as_json=False) == 0
    shown = capsys.readouterr().out
    assert "at most 0.35" in shown
    assert "left out: LiteLLM: no wheel" in shown
    figures.errors[OURS] = [1]
    assert report(questions(figures, TINY), {}, as_json=False) == 1
