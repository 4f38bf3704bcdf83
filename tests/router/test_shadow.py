"""A copy of an alias's traffic: that it is right, and that it never costs the live request."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import stat
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from aiohttp import web
from multidict import CIMultiDict
from pydantic import ValidationError

from vllm_rvec.errors import UpstreamError
from vllm_rvec.router import create_client, shadow_pairs
from vllm_rvec.router.shadow import (
    ShadowConfig,
    ShadowRequest,
    ShadowResult,
    ShadowTraffic,
    Ticket,
)

from .conftest import wait_for_ever

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from contextlib import AsyncExitStack
    from pathlib import Path

    from .conftest import StandInEngine

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"

REPLY = b'{"choices": [{"text": "shadow"}]}'


class Shadow:
    """What a router brings: a way to an engine, and counters."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, bytes, Mapping[str, str]]] = []
        self.results: Counter[ShadowResult] = Counter()
        self.told: list[tuple[str, str, ShadowResult]] = []
        self.reply: tuple[int, bytes] | Exception = (200, REPLY)
        self.open = asyncio.Event()
        self.open.set()
        self.under_way = 0
        self.cancelled = 0

    async def send(
        self, variant: str, path: str, body: bytes, headers: Mapping[str, str]
    ) -> tuple[int, bytes]:
        """Answer as `reply` says, once `open` is set."""
        self.asked.append((variant, path, body, headers))
        self.under_way += 1
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.under_way -= 1
        if isinstance(self.reply, Exception):
            raise self.reply
        return self.reply

    def count(self, alias: str, variant: str, result: ShadowResult) -> None:
        """Note what became of a copy."""
        self.results[result] += 1
        self.told.append((alias, variant, result))

    @property
    def bodies(self) -> list[Any]:
        """What was asked, read."""
        return [json.loads(body) for _, _, body, _ in self.asked]


@pytest.fixture
async def fake() -> Shadow:
    return Shadow()


@pytest.fixture
async def traffic(fake: Shadow) -> AsyncIterator[ShadowTraffic]:
    made = ShadowTraffic(fake.send, fake.count, rng=random.Random(7))  # noqa: S311 - no secret
    yield made
    await made.aclose()


def answer(ticket: Ticket, body: bytes, status: int = 200) -> None:
    """Hand in a whole live reply."""
    ticket.chunk(body)
    ticket.done(status, is_complete=True)


def request(
    body: Mapping[str, object] | bytes = b'{"model": "assistant"}',
    *,
    path: str = CHAT,
    request_id: str = "r1",
    headers: Mapping[str, str] | None = None,
) -> ShadowRequest:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return ShadowRequest(request_id, "base", path, raw, CIMultiDict(headers or {}))


def config(**values: Any) -> ShadowConfig:
    return ShadowConfig(variant="enhanced@0.5", **values)


async def until(is_so: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not is_so():  # noqa: ASYNC110 - what tests wait for has no event
            await asyncio.sleep(0.001)


def total(fake: Shadow) -> int:
    return sum(fake.results.values())


# --- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"variant": ""},
        {"variant": "a", "share": 0},
        {"variant": "a", "share": 1.1},
        {"variant": "a", "share": float("nan")},
        {"variant": "a", "queue": 0},
        {"variant": "a", "concurrency": 0},
        {"variant": "a", "timeout_seconds": 0},
        {"variant": "a", "record": ""},
        {"variant": "a", "max_record_mib": 0},
        {"variant": "a", "percent": 10},
    ],
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, Any]) -> None:
    """Ranges are checked, and unknown keys too."""
    with pytest.raises(ValidationError):
        ShadowConfig.model_validate(values)


def test_a_variant_is_all_that_must_be_said() -> None:
    """Everything is copied then, and nothing kept; whole numbers will do for shares and seconds."""
    made = ShadowConfig.model_validate({"variant": "a", "share": 1, "timeout_seconds": 5})
    assert (made.share, made.queue, made.concurrency, made.record) == (1.0, 64, 4, None)


# --- the copy ---------------------------------------------------------------------------------


async def test_the_copy_asks_the_shadow_for_a_plain_answer(
    traffic: ShadowTraffic, fake: Shadow
) -> None:
    """Model and streaming are changed, everything else is what the client sent."""
    body = {
        "model": "assistant",
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [{"role": "user", "content": "h\u00e9 \U0001f600"}],
        "temperature": 0.5,
        "seed": 2**63,
    }
    assert traffic.offer("assistant", config(), request(body, path=CHAT + "?a=b")) is None
    await until(lambda: total(fake))
    (variant, path, _, _) = fake.asked[0]
    assert (variant, path) == ("enhanced@0.5", CHAT + "?a=b")
    expected = body | {"model": "enhanced@0.5", "stream": False}
    del expected["stream_options"]
    assert fake.bodies == [expected]
    assert fake.told == [("assistant", "enhanced@0.5", ShadowResult.SENT)]


async def test_the_copy_carries_nothing_of_the_clients_headers(
    traffic: ShadowTraffic, fake: Shadow
) -> None:
    """No key, no cookie, nothing that bills; only what the body is, and its trace."""
    headers = {
        "authorization": "Bearer secret",
        "Cookie": "a=b",
        "X-Rvec-Alpha": "1",
        "content-type": "application/json; charset=utf-8",
        "Traceparent": "00-1-2-01",
    }
    traffic.offer("assistant", config(), request(headers=headers))
    traffic.offer("assistant", config(), request())
    await until(lambda: total(fake) == 2)
    assert [dict(headers) for *_, headers in fake.asked] == [
        {
            "X-Request-Id": "r1-shadow",
            "Content-Type": "application/json; charset=utf-8",
            "traceparent": "00-1-2-01",
        },
        {"X-Request-Id": "r1-shadow", "Content-Type": "application/json"},
    ]


async def test_the_shadows_name_says_its_alpha(traffic: ShadowTraffic, fake: Shadow) -> None:
    """A dial engine would heed the live request's alpha before the name."""
    body = {"model": "assistant", "alpha": 1, "vllm_xargs": {"alpha": [1], "other": 2}}
    traffic.offer("assistant", config(), request(body))
    await until(lambda: total(fake))
    assert fake.bodies[0] == {
        "model": "enhanced@0.5",
        "stream": False,
        "vllm_xargs": {"other": 2},
    }


@pytest.mark.parametrize(
    "path", ["/v1/embeddings", "/tokenize", "/v1/responses/resp_1/cancel", "/v1/audio/speech"]
)
async def test_only_paths_that_generate_are_copied(
    traffic: ShadowTraffic, fake: Shadow, path: str
) -> None:
    """There is nothing to compare in the others."""
    traffic.offer("assistant", config(), request(path=path))
    await traffic.aclose()
    assert (fake.asked, total(fake)) == ([], 0)


@pytest.mark.parametrize(
    "more", [{"store": True}, {"previous_response_id": "resp_1"}, {"background": True}]
)
async def test_a_response_that_leans_on_an_engines_state_is_not_copied(
    traffic: ShadowTraffic, fake: Shadow, more: dict[str, object], tmp_path: Path
) -> None:
    """Another engine has no such state, and must not be left with any. It is not counted."""
    stateful = request({"model": "assistant", "input": "hi"} | more, path="/v1/responses")
    ticket = traffic.offer("assistant", config(record=str(tmp_path / "p.jsonl")), stateful)
    assert ticket is not None
    await until(lambda: not ticket.is_wanted)
    assert (fake.asked, total(fake)) == ([], 0)


async def test_a_copied_response_is_not_stored(traffic: ShadowTraffic, fake: Shadow) -> None:
    """Where the client says nothing, engines store it."""
    body = {"model": "assistant", "input": "hi", "previous_response_id": None}
    traffic.offer("assistant", config(), request(body, path="/v1/responses"))
    await until(lambda: total(fake))
    assert fake.bodies[0]["store"] is False


async def test_a_large_body_is_dropped_and_counted(traffic: ShadowTraffic, fake: Shadow) -> None:
    """1 MiB is copied, one byte more is not."""
    frame = len(json.dumps({"model": ""}))
    for size in (2**20, 2**20 + 1):
        traffic.offer("assistant", config(), request({"model": "x" * (size - frame)}))
    await until(lambda: total(fake) == 2)
    assert fake.results == {ShadowResult.SENT: 1, ShadowResult.DROPPED: 1}


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"a":' * 1000 + b"1" + b"}" * 1000])
async def test_a_body_that_cannot_be_read_is_a_failed_copy(
    traffic: ShadowTraffic, fake: Shadow, body: bytes
) -> None:
    """And the next one goes on as usual."""
    traffic.offer("assistant", config(concurrency=1), request(body))
    traffic.offer("assistant", config(concurrency=1), request())
    await until(lambda: total(fake) == 2)
    assert fake.results == {ShadowResult.FAILED: 1, ShadowResult.SENT: 1}


# --- how many ---------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
async def test_the_share_is_within_binomial_bounds(fake: Shadow, share: float) -> None:
    """Five standard deviations over 20,000 requests."""
    traffic = ShadowTraffic(fake.send, fake.count, rng=random.Random(1))  # noqa: S311 - no secret
    count = 20_000
    sampled = config(share=share, queue=count)
    for _ in range(count):
        traffic.offer("assistant", sampled, request())
    await until(lambda: not traffic._lanes["assistant"].held)
    assert abs(total(fake) - count * share) < 5 * (count * share * (1 - share)) ** 0.5
    await traffic.aclose()
    assert fake.results[ShadowResult.DROPPED] == 0


async def test_a_full_queue_drops_and_counts(traffic: ShadowTraffic, fake: Shadow) -> None:
    """Waiting and running ones both fill it, each alias its own; room comes back."""
    fake.open.clear()
    small = config(queue=5, concurrency=2)
    for _ in range(12):
        traffic.offer("assistant", small, request())
    traffic.offer("other", small, request())
    assert fake.results == {ShadowResult.DROPPED: 7}
    await until(lambda: fake.under_way == 3)
    for _ in range(10):
        await asyncio.sleep(0)
    assert fake.under_way == 3, "two of the one alias, one of the other"
    fake.open.set()
    await until(lambda: total(fake) == 13)
    assert fake.results == {ShadowResult.DROPPED: 7, ShadowResult.SENT: 6}
    for _ in range(5):
        traffic.offer("assistant", small, request())
    await until(lambda: total(fake) == 18)
    assert fake.results[ShadowResult.SENT] == 11


async def test_a_hung_shadow_holds_no_more_than_its_queue(
    traffic: ShadowTraffic, fake: Shadow, tmp_path: Path
) -> None:
    """However long it hangs: bodies, and the pairs that wait for its replies."""
    fake.open.clear()
    hung = config(queue=8, record=str(tmp_path / "pairs.jsonl"))
    tickets = []
    for _ in range(200):
        ticket = traffic.offer("assistant", hung, request({"model": "x" * 1000_000}))
        if ticket is not None:
            answer(ticket, b"y" * 1000_000)
            tickets.append(ticket)
        await asyncio.sleep(0)
    assert len(tickets) == 8
    assert fake.results == {ShadowResult.DROPPED: 192}
    assert sum(ticket._held_bytes for ticket in tickets) < 8 * 2.01e6
    lane = traffic._lanes["assistant"]
    assert len(lane.waiting) + fake.under_way == lane.held == 8


async def test_pairs_hold_a_bounded_memory_together(
    traffic: ShadowTraffic,
    fake: Shadow,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where live streams outlast their copies, further pairs are left out, and said so once."""
    monkeypatch.setattr(shadow_pairs, "PAIR_MEMORY_BYTES", 100_000)
    bounded = ShadowTraffic(fake.send, fake.count)
    kept = config(record=str(tmp_path / "pairs.jsonl"), queue=1000)
    tickets = [bounded.offer("assistant", kept, request()) for _ in range(100)]
    assert 40 < sum(ticket is not None for ticket in tickets) < 49
    await until(lambda: total(fake) == 100)
    assert caplog.text.count("some pairs are not kept") == 1
    del tickets
    assert bounded.offer("assistant", kept, request()) is not None, "their memory came back"
    await bounded.aclose()


async def test_less_concurrency_holds_at_once(traffic: ShadowTraffic, fake: Shadow) -> None:
    """The number is taken from the newest configuration."""
    fake.open.clear()
    for _ in range(8):
        traffic.offer("assistant", config(concurrency=4), request())
    await until(lambda: fake.under_way == 4)
    traffic.offer("assistant", config(concurrency=1), request())
    fake.open.set()
    await until(lambda: total(fake) == 9)
    assert traffic._lanes["assistant"].workers == 0


# --- what goes wrong --------------------------------------------------------------------------


async def test_a_copy_that_takes_too_long_is_ended_and_counted(
    traffic: ShadowTraffic, fake: Shadow
) -> None:
    """The engine's generation is ended with it, and the next copy gets its turn."""
    fake.open.clear()
    for _ in range(2):
        traffic.offer("assistant", config(timeout_seconds=0.02, concurrency=1), request())
    await until(lambda: total(fake) == 2)
    assert fake.results == {ShadowResult.TIMED_OUT: 2}
    assert fake.cancelled == 2


@pytest.mark.parametrize(
    ("reply", "result"),
    [
        (UpstreamError("can't be reached"), ShadowResult.FAILED),
        (aiohttp.ClientPayloadError("broke off"), ShadowResult.FAILED),
        (ConnectionResetError(), ShadowResult.FAILED),
        (TimeoutError(), ShadowResult.TIMED_OUT),
        (ZeroDivisionError(), ShadowResult.FAILED),
        ((404, b"{}"), ShadowResult.FAILED),
        ((500, b"oops"), ShadowResult.FAILED),
    ],
)
async def test_what_fails_is_counted_and_the_next_copy_goes_on(
    traffic: ShadowTraffic,
    fake: Shadow,
    caplog: pytest.LogCaptureFixture,
    reply: tuple[int, bytes] | Exception,
    result: ShadowResult,
) -> None:
    """Only what nobody expected is worth a traceback."""
    fake.reply = reply
    traffic.offer("assistant", config(), request())
    await until(lambda: total(fake))
    assert fake.results == {result: 1}
    assert ("Traceback" in caplog.text) is isinstance(reply, ZeroDivisionError)
    fake.reply = (200, REPLY)
    traffic.offer("assistant", config(), request())
    await until(lambda: total(fake) == 2)
    assert fake.results[ShadowResult.SENT] == 1


async def test_a_shadow_taken_away_drops_what_waits_and_lets_run_what_runs(
    traffic: ShadowTraffic, fake: Shadow
) -> None:
    """Copies for a variant that is still the shadow stay."""
    fake.open.clear()
    for alias in ("one", "two"):
        for _ in range(3):
            traffic.offer(alias, config(concurrency=1), request())
    await until(lambda: fake.under_way == 2)
    traffic.reconfigure({"two": config(queue=7), "three": config()})
    assert fake.told == [("one", "enhanced@0.5", ShadowResult.DROPPED)] * 2
    traffic.reconfigure({"two": ShadowConfig(variant="base")})
    assert fake.results == {ShadowResult.DROPPED: 4}
    fake.open.set()
    await until(lambda: total(fake) == 6)
    assert fake.results[ShadowResult.SENT] == 2


async def test_closing_cancels_what_runs_and_takes_nothing_more(
    traffic: ShadowTraffic, fake: Shadow
) -> None:
    """Without waiting for any answer."""
    fake.open.clear()
    for _ in range(20):
        traffic.offer("assistant", config(), request())
    await until(lambda: fake.under_way == 4)
    async with asyncio.timeout(1):
        await traffic.aclose()
    assert (fake.under_way, fake.cancelled) == (0, 4)
    assert traffic.offer("assistant", config(), request()) is None
    assert len(fake.asked) == 4
    await traffic.aclose()


# --- what it costs ----------------------------------------------------------------------------


async def test_offering_costs_microseconds_whatever_the_size(
    traffic: ShadowTraffic, tmp_path: Path
) -> None:
    """The body is read later. Most of a thousand offers of 1 MB take less than 0.1 ms."""
    large = request({"model": "x" * 1000_000})
    kept = config(queue=10_000, record=str(tmp_path / "pairs.jsonl"))
    took = []
    for _ in range(1000):
        started = time.perf_counter()
        traffic.offer("assistant", kept, large)
        took.append(time.perf_counter() - started)
    assert sorted(took)[500] < 1e-4
    for task in traffic._tasks:
        task.cancel()


@pytest.mark.parametrize("hangs", [True, False])
async def test_the_live_answer_does_not_wait_for_the_shadow(
    engine: StandInEngine, resources: AsyncExitStack, hangs: bool
) -> None:
    """Over real connections: the shadow's engine hangs, or is not there at all."""
    client = await resources.enter_async_context(create_client())
    engine.answer = wait_for_ever
    url = engine.url if hangs else "http://127.0.0.1:9"
    results: Counter[ShadowResult] = Counter()

    async def send(
        _variant: str, path: str, body: bytes, headers: Mapping[str, str]
    ) -> tuple[int, bytes]:
        async with client.post(url + path, data=body, headers=headers) as response:
            return response.status, await response.read()

    def count(_alias: str, _variant: str, result: ShadowResult) -> None:
        results[result] += 1

    traffic = ShadowTraffic(send, count)

    async def handle(live: web.Request) -> web.StreamResponse:
        body = await live.read()
        traffic.offer(
            "assistant",
            config(queue=8),
            ShadowRequest("r", "base", live.path_qs, body, live.headers),
        )
        return web.Response(text="live")

    app = web.Application()
    app.router.add_post(CHAT, handle)
    runner = web.AppRunner(app)
    await runner.setup()
    resources.push_async_callback(runner.cleanup)
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    address = f"http://127.0.0.1:{runner.addresses[0][1]}{CHAT}"
    async with asyncio.timeout(10):
        for _ in range(50):
            async with client.post(address, data=b'{"model": "assistant"}') as response:
                assert await response.text() == "live"
    if hangs:
        assert results == {ShadowResult.DROPPED: 42}
        await traffic.aclose()
        async with asyncio.timeout(5):
            await engine.aborted.wait()
    else:
        await until(lambda: results.total() == 50)
        assert results[ShadowResult.FAILED] > 0
        await traffic.aclose()


# --- pairs ------------------------------------------------------------------------------------


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    return tmp_path / "pairs.jsonl"


def read_pairs(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def take(ticket: Ticket | None) -> Ticket:
    assert ticket is not None
    return ticket


async def test_a_pair_holds_the_request_and_both_answers(
    traffic: ShadowTraffic, fake: Shadow, pairs_file: Path
) -> None:
    """One line, whichever answer comes first; only its owner can read the file."""
    kept = config(record=str(pairs_file))
    asked = {"model": "assistant", "messages": []}
    early = take(traffic.offer("assistant", kept, request(asked, request_id="early")))
    answer(early, b'{"text": "live"}')
    await until(lambda: total(fake))
    late = take(traffic.offer("assistant", kept, request(asked, request_id="late")))
    await until(lambda: total(fake) == 2)
    answer(late, b'{"text": "live"}')
    answer(late, b"again")
    await traffic.aclose()
    pairs = read_pairs(pairs_file)
    assert [pair["request_id"] for pair in pairs] == ["early", "late"]
    for pair in pairs:
        assert set(pair) == {"request_id", "alias", "at", "request", "live", "shadow"}
        assert (pair["alias"], pair["request"]) == ("assistant", asked)
        assert pair["at"].endswith("+00:00")
        assert pair["live"] == {"variant": "base", "status": 200, "body": {"text": "live"}}
        assert pair["shadow"].pop("seconds") >= 0
        assert pair["shadow"] == {
            "variant": "enhanced@0.5",
            "status": 200,
            "body": json.loads(REPLY),
        }
    assert mode_of(pairs_file) == 0o600


async def test_a_streamed_answer_is_kept_as_its_events(
    traffic: ShadowTraffic, pairs_file: Path
) -> None:
    """Cut anywhere, with names, comments and either line ending; without the mark at the end."""
    text = (
        b': ping\n\nevent: a\ndata: {"n": 1}\n\ndata:{"n":\ndata: 2}\r\n\r\n'
        b"data: \xf0\x9f\x98\x80 text\n\ndata: [DONE]\n\n"
    )
    asked = {"model": "assistant", "stream": True}
    ticket = take(traffic.offer("assistant", config(record=str(pairs_file)), request(asked)))
    for start in range(0, len(text), 3):
        ticket.chunk(text[start : start + 3])
    ticket.done(200, is_complete=True)
    await until(lambda: not ticket.is_wanted)
    await traffic.aclose()
    (pair,) = read_pairs(pairs_file)
    assert pair["live"]["body"] == [{"n": 1}, {"n": 2}, "\U0001f600 text"]
    assert pair["request"] == asked


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        (b"plain \xff", "plain \ufffd"),
        (b'{"x": NaN}', '{"x": NaN}'),
        (b"[" * 10_000, "[" * 10_000),
        (b"", ""),
        (b"x" * (2**20 + 1), None),
    ],
    ids=["text", "NaN", "nested", "empty", "large"],
)
async def test_an_answer_that_is_no_json_is_kept_as_text(
    traffic: ShadowTraffic, pairs_file: Path, body: bytes, kept: str | None
) -> None:
    """And not at all beyond 1 MiB, on either side."""
    ticket = take(traffic.offer("assistant", config(record=str(pairs_file)), request()))
    answer(ticket, body, status=500)
    await until(lambda: not ticket.is_wanted)
    await traffic.aclose()
    (pair,) = read_pairs(pairs_file)
    assert pair["live"] == {"variant": "base", "status": 500, "body": kept}


async def test_chunks_beyond_a_mebibyte_are_let_go(
    traffic: ShadowTraffic, pairs_file: Path
) -> None:
    """The pair tells the status then, and holds no memory for the text."""
    ticket = take(traffic.offer("assistant", config(record=str(pairs_file)), request()))
    for _ in range(100):
        ticket.chunk(b"x" * 2**16)
    assert ticket._held_bytes < 10_000
    ticket.done(200, is_complete=True)
    await until(lambda: not ticket.is_wanted)
    await traffic.aclose()
    assert read_pairs(pairs_file)[0]["live"]["body"] is None


async def test_half_an_answer_makes_no_pair(
    traffic: ShadowTraffic, fake: Shadow, pairs_file: Path
) -> None:
    """Of the live one, when it broke off or the client left; of the shadow, when it failed."""
    kept = config(record=str(pairs_file))
    broken = take(traffic.offer("assistant", kept, request()))
    broken.chunk(b"data: 1\n\n")
    broken.done(200, is_complete=False)
    forgotten = traffic.offer("assistant", kept, request())
    del forgotten
    await until(lambda: total(fake) == 2)
    fake.reply = UpstreamError("gone")
    failed = take(traffic.offer("assistant", kept, request()))
    answer(failed, b"{}")
    await until(lambda: total(fake) == 3)
    failed.chunk(b"late")
    failed.done(200, is_complete=True)
    await traffic.aclose()
    assert not names_in(pairs_file.parent)


async def test_a_shadows_error_answer_is_part_of_the_pair(
    traffic: ShadowTraffic, fake: Shadow, pairs_file: Path
) -> None:
    """That it refuses what the live one takes is worth knowing."""
    fake.reply = (400, b'{"error": {}}')
    ticket = take(traffic.offer("assistant", config(record=str(pairs_file)), request()))
    answer(ticket, b"{}")
    await until(lambda: total(fake))
    await traffic.aclose()
    assert read_pairs(pairs_file)[0]["shadow"]["status"] == 400
    assert fake.results == {ShadowResult.FAILED: 1}


async def test_an_id_that_is_no_unicode_is_kept_readable(
    traffic: ShadowTraffic, pairs_file: Path
) -> None:
    """Such bytes of a header come from aiohttp as lone surrogates."""
    asked = request(request_id="a\udcff")
    ticket = take(traffic.offer("assistant", config(record=str(pairs_file)), asked))
    answer(ticket, b"{}")
    await until(lambda: not ticket.is_wanted)
    await traffic.aclose()
    assert read_pairs(pairs_file)[0]["request_id"] == "a?"


async def until_whole(ticket: Ticket) -> None:
    await until(lambda: not ticket.is_wanted)


async def write_pairs(traffic: ShadowTraffic, kept: ShadowConfig, count: int, text: str) -> None:
    for number in range(count):
        asked = request(request_id=str(number))
        ticket = take(traffic.offer("assistant", kept, asked))
        answer(ticket, json.dumps(text).encode())
        await until_whole(ticket)


async def test_a_full_file_is_rotated_between_lines(
    traffic: ShadowTraffic, pairs_file: Path
) -> None:
    """The one before is kept, an older one is not: the disk's share is twice the limit."""
    kept = config(record=str(pairs_file), max_record_mib=1)
    await write_pairs(traffic, kept, 6, "x" * 400_000)
    await traffic.aclose()
    earlier = pairs_file.with_name("pairs.jsonl.1")
    assert [pair["request_id"] for pair in read_pairs(earlier)] == ["2", "3"]
    assert [pair["request_id"] for pair in read_pairs(pairs_file)] == ["4", "5"]
    assert mode_of(earlier) == 0o600
    assert names_in(pairs_file.parent) == {"pairs.jsonl", "pairs.jsonl.1"}


@pytest.mark.parametrize("path", ["/dev/full", "/no/such/folder/pairs.jsonl", "/dev"])
async def test_pairs_that_cannot_be_written_are_said_once_and_the_traffic_goes_on(
    traffic: ShadowTraffic, fake: Shadow, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    """Disk full, folder missing, no file at all. Memory is not held either."""
    await write_pairs(traffic, config(record=path), 5, "x")
    await traffic.aclose()
    assert fake.results == {ShadowResult.SENT: 5}
    assert caplog.text.count("can't be written") == 1
    assert "Traceback" not in caplog.text
    assert traffic._pairs._memory.take(shadow_pairs.PAIR_MEMORY_BYTES)


async def test_half_a_line_is_taken_back(
    traffic: ShadowTraffic, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk runs full in the middle of a line, and has room again later."""
    kept = config(record=str(pairs_file))
    write = os.write
    calls = 0

    def write_some(descriptor: int, data: memoryview) -> int:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[:10] if calls == 1 else data)

    monkeypatch.setattr(os, "write", write_some)
    await write_pairs(traffic, kept, 2, "x")
    await traffic.aclose()
    assert [pair["request_id"] for pair in read_pairs(pairs_file)] == ["1"]


async def test_a_slow_disk_does_not_hold_up_the_event_loop(
    traffic: ShadowTraffic,
    fake: Shadow,
    pairs_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor, for more than a moment, the router's end."""
    released = threading.Event()
    monkeypatch.setattr(shadow_pairs, "_append", lambda *_: released.wait(10))
    monkeypatch.setattr(shadow_pairs, "CLOSE_SECONDS", 0.05)
    started = time.monotonic()
    await write_pairs(traffic, config(record=str(pairs_file)), 5, "x")
    await traffic.aclose()
    assert time.monotonic() - started < 5
    assert fake.results == {ShadowResult.SENT: 5}
    released.set()


async def test_a_mistake_of_ours_in_a_pair_does_not_end_the_writing(
    traffic: ShadowTraffic,
    pairs_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The traceback is logged, and the next pair written."""
    line, calls = shadow_pairs._line, 0

    def fail_once(pair: Any) -> bytes:
        nonlocal calls
        calls += 1
        return line(pair) if calls > 1 else b"%d" % (1 // 0)

    monkeypatch.setattr(shadow_pairs, "_line", fail_once)
    caplog.set_level(logging.ERROR)
    await write_pairs(traffic, config(record=str(pairs_file)), 2, "x")
    await traffic.aclose()
    assert len(read_pairs(pairs_file)) == 1
    assert "ZeroDivisionError" in caplog.text


def test_a_request_shows_neither_prompt_nor_key() -> None:
    """What is printed of it may end in a log."""
    shown = repr(request(b"private", headers={"Authorization": "Bearer secret"}))
    assert "private" not in shown
    assert "secret" not in shown
