"""Answers on their way back: streams, slow clients, and engines that break off in the middle."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import aiohttp
import openai
import pytest
from aiohttp import web
from yarl import URL

from vllm_rvec.router.sse import EventGate

from .conftest import BODY, USER, begin_events, busy_stream, chat_event, die, dies_after

if TYPE_CHECKING:
    from .conftest import Answer, StandInEngine

pytestmark = pytest.mark.anyio

# --- streams ----------------------------------------------------------------------------------


async def test_each_event_passes_before_the_next_is_made(
    http: aiohttp.ClientSession, url: str, engine: StandInEngine
) -> None:
    """The head too. The engine makes an event only once the client has the one before."""
    received = asyncio.Semaphore(0)

    async def answer(request: web.Request) -> web.StreamResponse:
        response = await begin_events(request)
        for number in range(3):
            await received.acquire()
            await response.write(b"data: %d\n\n" % number)
        return response

    engine.answer = answer
    async with http.post(url, data=BODY) as response:
        assert response.headers["X-Accel-Buffering"] == "no"
        assert response.headers["Transfer-Encoding"] == "chunked"
        for number in range(3):
            received.release()
            assert await response.content.readany() == b"data: %d\n\n" % number
        assert await response.content.read() == b""


async def test_a_stream_is_the_engines_bytes(
    http: aiohttp.ClientSession, url: str, engine: StandInEngine
) -> None:
    """However it is cut, and even without a blank line at its end."""
    text = b": ping\n\nevent: a\ndata: 1\n\ndata: \xf0\x9f\x98\x80\r\n\r\ndata: [DONE]\n\ndata: end"

    async def answer(request: web.Request) -> web.StreamResponse:
        response = await begin_events(request)
        for start in range(0, len(text), 3):
            await response.write(text[start : start + 3])
            await asyncio.sleep(0)
        return response

    engine.answer = answer
    async with http.post(url, data=BODY) as response:
        assert await response.read() == text


async def test_only_event_streams_are_marked_for_nginx(
    http: aiohttp.ClientSession, url: str
) -> None:
    """Other answers may be buffered."""
    async with http.post(url, data=BODY) as response:
        assert "X-Accel-Buffering" not in response.headers


async def test_a_slow_client_slows_the_engine(
    http: aiohttp.ClientSession, url: str, engine: StandInEngine
) -> None:
    """The router holds a bounded part of the answer, whoever does not read it."""
    piece, pieces, sent = b"x" * 2**16, 1024, 0

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(pieces):
            await response.write(piece)
            sent += 1
        return response

    engine.answer = answer
    async with http.post(url, data=BODY) as response:
        seen = -1
        while sent != seen:  # until the engine has stood still for a while
            seen = sent
            await asyncio.sleep(0.2)
        assert sent < pieces / 2
        assert len(await response.read()) == pieces * len(piece)


# --- the engine goes away in the middle -------------------------------------------------------

HELLO = chat_event("hello")


@pytest.mark.parametrize(
    ("chunks", "texts"),
    [
        ([], []),
        ([HELLO], ["hello"]),
        ([HELLO[:-1]], []),
        ([HELLO, HELLO[:40]], ["hello"]),
        ([HELLO + HELLO[:40]], ["hello"]),
        ([HELLO, b"dat"], ["hello"]),
        ([HELLO, b"event: x\nid: 1\n"], ["hello"]),
    ],
    ids=["at once", "between", "one byte early", "in JSON", "same chunk", "in a name", "no data"],
)
async def test_a_stream_that_breaks_off_is_an_error_for_openais_client(
    ask: openai.AsyncOpenAI, engine: StandInEngine, chunks: list[bytes], texts: list[str]
) -> None:
    """Every complete event arrives, then an APIError; never a clean end, never half an event."""
    engine.answer = dies_after(*chunks)
    stream = await ask.chat.completions.create(model="base", messages=USER, stream=True)
    received = [(await anext(stream)).choices[0].delta.content for _ in texts]
    assert received == texts
    with pytest.raises(openai.APIError, match="incomplete") as caught:
        await anext(stream)
    assert caught.value.code == "upstream_broke_off"
    assert len(engine.seen) == 1, "an answer that has begun is not asked for again"


async def test_a_stream_that_breaks_off_ends_without_done(
    http: aiohttp.ClientSession, url: str, engine: StandInEngine
) -> None:
    """The error is the last event."""
    engine.answer = dies_after(HELLO)
    async with http.post(url, data=BODY) as response:
        events = (await response.read()).split(b"\n\n")
    assert events[0] + b"\n\n" == HELLO
    assert json.loads(events[1].removeprefix(b"data: "))["error"]["type"] == "server_error"
    assert events[2:] == [b""]


async def test_anthropics_clients_get_a_named_error_event(
    http: aiohttp.ClientSession, router_url: str, engine: StandInEngine
) -> None:
    """They pass over events without a name."""
    engine.answer = dies_after(b"event: ping\ndata: {}\n\n")
    async with http.post(f"{router_url}/v1/messages", data=BODY) as response:
        assert b'\n\nevent: error\ndata: {"error": ' in await response.read()


async def begin_plain(request: web.Request, **headers: str) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/json"} | headers)
    await response.prepare(request)
    await response.write(b'{"begun": ')
    return response


async def chunked_dies(request: web.Request) -> web.StreamResponse:
    response = await begin_plain(request)
    die(request)
    return response


async def sized_dies(request: web.Request) -> web.StreamResponse:
    response = await begin_plain(request, **{"Content-Length": "100"})
    die(request)
    return response


async def large_dies(request: web.Request) -> web.StreamResponse:
    response = await begin_plain(request, **{"Content-Length": "100000"})
    die(request)
    return response


async def test_a_small_answer_that_breaks_off_is_an_error_in_openais_shape(
    http: aiohttp.ClientSession, url: str, engine: StandInEngine
) -> None:
    """It is sent when it is whole, so nothing of it has gone out."""
    engine.answer = sized_dies
    async with http.post(url, data=BODY) as response:
        assert response.status == 502
        assert (await response.json())["error"]["code"] == "upstream_broke_off"


@pytest.mark.parametrize(
    "answer",
    [
        chunked_dies,
        large_dies,
        dies_after(b"\x1f\x8b", headers={"Content-Encoding": "gzip"}),
        dies_after(HELLO, headers={"Content-Length": "100000"}),
    ],
    ids=["chunked", "sized", "compressed events", "sized events"],
)
async def test_any_other_answer_that_breaks_off_is_cut_off(
    http: aiohttp.ClientSession, url: str, engine: StandInEngine, answer: Answer
) -> None:
    """Where no event can be added the client sees an incomplete body, never a clean end."""
    engine.answer = answer
    with pytest.raises((aiohttp.ClientPayloadError, aiohttp.ClientOSError)):
        async with http.post(url, data=BODY) as response:
            await response.read()


async def test_an_oversized_event_that_breaks_off_is_cut_off(
    http: aiohttp.ClientSession,
    url: str,
    engine: StandInEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half of it has passed already, so no event can follow."""
    monkeypatch.setattr("vllm_rvec.router.sse.HELD_BYTES", 8)
    engine.answer = dies_after(b"data: 12345678")
    with pytest.raises((aiohttp.ClientPayloadError, aiohttp.ClientOSError)):
        async with http.post(url, data=BODY) as response:
            await response.read()


@pytest.mark.parametrize("fails", [False, True])
async def test_a_client_of_http_1_0_sees_a_reset(
    url: str, engine: StandInEngine, fails: bool
) -> None:
    """To it the end of the connection is the end of the body, so that must differ."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = await begin_plain(request)
        if fails:
            die(request)
        return response

    engine.answer = answer
    address = URL(url)
    reader, writer = await asyncio.open_connection(address.host, address.port)
    head = f"POST {address.path} HTTP/1.0\r\nContent-Length: {len(BODY)}\r\n\r\n"
    writer.write(head.encode() + BODY)
    async with asyncio.timeout(5):
        if fails:
            with pytest.raises(ConnectionResetError):
                await reader.read()
        else:
            assert (await reader.read()).endswith(b'\r\n\r\n{"begun": ')
    writer.close()


async def test_an_unexpected_exception_in_the_middle_cuts_the_answer_off(
    http: aiohttp.ClientSession,
    url: str,
    engine: StandInEngine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """No second answer is put behind half of the first; the traceback is logged."""

    def fail(_gate: EventGate, _chunk: bytes) -> bytes:
        raise ZeroDivisionError

    monkeypatch.setattr(EventGate, "feed", fail)
    engine.answer = busy_stream
    with pytest.raises((aiohttp.ClientPayloadError, aiohttp.ClientOSError)):
        async with http.post(url, data=BODY) as response:
            await response.read()
    assert "ZeroDivisionError" in caplog.text
    async with asyncio.timeout(5):
        await engine.aborted.wait()
