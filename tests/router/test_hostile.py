"""Clients and engines that mean harm, or are merely broken: the router lives, and holds little.

What a well-behaved pair does is in `test_proxy` and `test_relay`. Memory is measured in a router of
its own process.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from yarl import URL

from vllm_rvec.router import Upstream, VariantTable
from vllm_rvec.router.request import MAX_BODY_BYTES

from .conftest import BODY, begin_events, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from contextlib import AsyncExitStack

    import aiohttp
    from aiohttp import web

    from .conftest import StandInEngine, StartRouter

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"

LOGGER = "vllm_rvec.router"

MIB = 2**20

ROUTER = """
import asyncio, sys
from vllm_rvec import router

async def main():
    table = router.VariantTable(["base"])
    table.set_ready("base", router.Upstream(sys.argv[1], None))
    listener = router.bind_socket("127.0.0.1", 0)
    async with router.create_client() as client:
        app = router.create_app(router.Services.make(table, client), is_watching=False)
        await router.start_server(app, listener)
        print(listener.getsockname()[1], flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""
"""A router in a process of its own, in front of the engine that it is told."""

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture
async def connect(resources: AsyncExitStack) -> Callable[[str], Awaitable[Connection]]:
    """Open plain connections, which are reset at the end."""

    async def open_one(url: str) -> Connection:
        address = URL(url)
        reader, writer = await asyncio.open_connection(address.host, address.port)
        resources.callback(reset, writer.transport)
        return reader, writer

    return open_one


def reset(transport: asyncio.WriteTransport) -> None:
    """Not one that is closing: where that had something left to send, `abort` fails (CPython)."""
    if not transport.is_closing():
        transport.abort()


def head(*headers: bytes, length: int | None = None) -> bytes:
    """The beginning of a request."""
    lines = [b"POST " + CHAT.encode() + b" HTTP/1.1", b"Host: x", *headers]
    lines += [] if length is None else [b"Content-Length: %d" % length]
    return b"\r\n".join([*lines, b"", b""])


async def status_of(connection: Connection) -> int:
    """What the router answers; 0 where it closes without a word."""
    async with asyncio.timeout(10):
        with suppress(ConnectionError):
            line = await connection[0].readline()
            return int(line.split()[1]) if line else 0
    return 0


async def assert_answers(http: aiohttp.ClientSession, url: str) -> None:
    """Others are served as usual."""
    async with http.post(url, data=BODY) as response:
        assert response.status == 200
        await response.read()


class RawEngine:
    """Takes connections and does as a test says with each."""

    def __init__(self) -> None:
        self.opened = 0
        self.closed = 0
        self.url = ""

    @asynccontextmanager
    async def serve(
        self, answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
    ) -> AsyncIterator[VariantTable]:
        """Listen, and be the engine of `base`."""

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.opened += 1
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                await answer(reader, writer)
            self.closed += 1
            writer.close()

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        table = VariantTable(["base"])
        table.set_ready("base", Upstream(self.url, None))
        try:
            yield table
        finally:
            server.close()


async def read_to_the_end(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    """Accept, and never answer."""
    while await reader.read(2**16):
        pass


# --- half a request ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "begun",
    [
        head(length=1000) + BODY,
        head(b"Transfer-Encoding: chunked") + b"%x\r\n%b" % (2 * len(BODY), BODY),
        head(b"Transfer-Encoding: chunked") + b"%x\r\n%b\r\n" % (len(BODY), BODY),
        head(b"Expect: 100-continue", length=len(BODY)),
        head(length=len(BODY))[:-2],
    ],
    ids=["sized", "in a chunk", "between chunks", "100-continue", "in the head"],
)
async def test_a_half_sent_request_holds_no_upstream(
    http: aiohttp.ClientSession,
    start_router: StartRouter,
    connect: Callable[[str], Awaitable[Connection]],
    caplog: pytest.LogCaptureFixture,
    begun: bytes,
) -> None:
    """Twenty clients begin and stop.

    No connection to the engine is opened for them, others are served, and when they leave the log
    has no traceback.
    """
    caplog.set_level("INFO", LOGGER)
    engine = RawEngine()
    async with engine.serve(answer_then_close_after(lambda: 5.0)) as table:
        url = await start_router(table)
        clients = [await connect(url) for _ in range(20)]
        for _, writer in clients:
            writer.write(begun)
            await writer.drain()
        await assert_answers(http, url + CHAT)
        assert engine.opened == 1
        for _, writer in clients:
            writer.transport.abort()
        await assert_answers(http, url + CHAT)
        assert engine.opened == 1
    assert "Traceback" not in caplog.text


async def test_a_body_that_ends_early_is_no_request(
    url: str,
    engine: StandInEngine,
    connect: Callable[[str], Awaitable[Connection]],
) -> None:
    """A client closes its side before it has sent what it promised, though it would parse."""
    client = await connect(url)
    client[1].write(head(length=len(BODY) + 1) + BODY)
    client[1].write_eof()
    assert await status_of(client) in {0, 400}
    assert not engine.seen


# --- large ones -------------------------------------------------------------------------------


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_64_mib_pass_and_one_byte_more_is_413(
    http: aiohttp.ClientSession, url: str, engine: StandInEngine, is_chunked: bool
) -> None:
    """To the byte, however it is sent; the client hears why."""
    frame = b'{"model": "base", "image": "%b"}'
    fits = frame % (b"A" * (MAX_BODY_BYTES - len(frame) + 2))
    assert len(fits) == MAX_BODY_BYTES

    async def chunks(body: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(body), MIB):
            yield body[start : start + MIB]

    async def ask(body: bytes) -> int:
        async with http.post(url, data=chunks(body) if is_chunked else body) as response:
            await response.read()
            return response.status

    assert await ask(fits) == 200
    assert engine.seen[0].body == fits
    assert await ask(fits + b" ") == 413
    assert len(engine.seen) == 1


# --- heads ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_bytes",
    [
        head(b"X-Bomb: " + b"a" * MIB, length=len(BODY)) + BODY,
        head(b"X" * MIB + b": a", length=len(BODY)) + BODY,
        head(*[b"X-%d: a" % n for n in range(10_000)], length=len(BODY)) + BODY,
        head(*[b"X-%d: %b" % (n, b"a" * 8000) for n in range(1000)], length=len(BODY)) + BODY,
        head(b"Cookie: " + b"a=b; " * 100_000, length=len(BODY)) + BODY,
        head(b"X-Endless: ")[:-4] + b"a" * MIB,
        b"POST /" + b"a" * MIB + b" HTTP/1.1\r\n\r\n",
        b"A" * MIB,
        b"\0" * MIB,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 100,
    ],
    ids=[
        "one value",
        "one name",
        "many",
        "many large",
        "cookie",
        "no end",
        "path",
        "method",
        "zeros",
        "TLS",
    ],
)
async def test_a_bomb_of_a_head_is_refused(
    http: aiohttp.ClientSession,
    url: str,
    engine: StandInEngine,
    connect: Callable[[str], Awaitable[Connection]],
    request_bytes: bytes,
) -> None:
    """With a status of 400 to 499, or a closed connection; no engine hears of it."""
    client = await connect(url)
    client[1].write(request_bytes)
    status = await status_of(client)
    assert status == 0 or 400 <= status < 500
    assert not engine.seen
    await assert_answers(http, url)


@pytest.mark.parametrize(
    "framing",
    [
        [b"Content-Length: 5", b"Content-Length: 67"],
        [b"Content-Length: 67", b"Transfer-Encoding: chunked"],
        [b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity"],
        [b"Transfer-Encoding: xchunked"],
        [b"Content-Length: +67"],
        [b"Content-Length: -1"],
        [b"Content-Length: 6_7"],
        [b"Content-Length: 99999999999999999999999"],
        [b"Content-Length : 67"],
    ],
)
async def test_a_length_that_two_could_read_differently_is_refused(
    http: aiohttp.ClientSession,
    url: str,
    engine: StandInEngine,
    connect: Callable[[str], Awaitable[Connection]],
    framing: list[bytes],
) -> None:
    """The rest of such a request would be a second one to somebody: request smuggling."""
    client = await connect(url)
    client[1].write(head(*framing) + BODY)
    status = await status_of(client)
    assert status == 0 or 400 <= status < 500
    assert not engine.seen
    await assert_answers(http, url)


async def test_a_chunk_with_a_bad_size_reaches_no_engine(
    http: aiohttp.ClientSession,
    url: str,
    engine: StandInEngine,
    connect: Callable[[str], Awaitable[Connection]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It comes when the request is under way already; that ends when the client leaves at last."""
    caplog.set_level("INFO", LOGGER)
    _, writer = await connect(url)
    writer.write(head(b"Transfer-Encoding: chunked") + b"1\r\n{\r\n")
    await asyncio.sleep(0.05)
    writer.write(b"-1\r\n" + BODY)
    await assert_answers(http, url)
    writer.transport.abort()
    await until(lambda: caplog.text.count(f"POST {CHAT}") == 2, 10)
    assert len(engine.seen) == 1
    assert "Traceback" not in caplog.text


# --- bodies -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "base", "x": "\xff\xfe"}',
        b'{"model": "base", "x": "\xc0\x80"}',
        b'{"model": "base", "x": "\xed\xa0\x80"}',
        b'{"model": "ba\xffse"}',
        b'{"model": "base", "x": ' + b"[" * MIB + b"]" * MIB + b"}",
        b'{"x":' * 100_000 + b"1" + b"}" * 100_000,
        b"[" * MIB,
        b'{"model": "base", "x": ' + b"9" * MIB + b"}",
        b'{"model": "base", "x": 1e999999999999}' + b"x",
        b'{"model": "base",}',
        b"{'model': 'base'}",
        b'{"model": "base", "x": "' + b"a" * MIB,
        json.dumps({"model": "base"}).encode("utf-16"),
        b"\x1f\x8b\x08" + bytes(100),
        b"model=base",
        bytes(MIB),
    ],
    ids=[
        "no UTF-8",
        "overlong UTF-8",
        "surrogate in UTF-8",
        "no UTF-8 in the name",
        "nested",
        "nested objects",
        "nested without end",
        "long number",
        "something behind",
        "comma",
        "quotes",
        "half a string",
        "UTF-16",
        "gzip",
        "form",
        "zeros",
    ],
)
async def test_a_body_that_is_no_json_is_400_at_once(
    http: aiohttp.ClientSession, url: str, engine: StandInEngine, body: bytes
) -> None:
    """In OpenAI's error body, short whatever was sent; no engine hears of it."""
    async with asyncio.timeout(5), http.post(url, data=body) as response:
        assert response.status == 400
        text = await response.read()
    assert json.loads(text)["error"]["code"] == "invalid_json"
    assert len(text) < 1000
    assert not engine.seen
    await assert_answers(http, url)


async def test_a_name_of_many_megabytes_is_cut_short_in_the_answer(
    http: aiohttp.ClientSession, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """And in the log; what could end a line there is escaped."""
    caplog.set_level("INFO", LOGGER)
    for name in ("a" * 16 * MIB, "\r\nX-Evil: 1\r\n\r\n", "\0", "\N{RIGHT-TO-LEFT OVERRIDE}"):
        async with http.post(url, data=json.dumps({"model": name})) as response:
            assert response.status == 404
            assert "X-Evil" not in response.headers
            assert len(await response.read()) < 2000
    assert len(caplog.text) < 4000
    assert "\nX-Evil" not in caplog.text


# --- engines ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 32 * MIB], ids=["waits for an answer", "sends a large body"])
async def test_a_hung_engine_is_let_go_with_its_client(
    start_router: StartRouter,
    connect: Callable[[str], Awaitable[Connection]],
    size: int,
) -> None:
    """It accepts and never answers, or does not even read, until the client leaves."""
    may_read = asyncio.Event()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if size:
            await may_read.wait()
        await read_to_the_end(reader, writer)

    engine = RawEngine()
    async with engine.serve(hang) as table:
        url = await start_router(table)
        body = b'{"model": "base", "x": "%b"}' % (b"a" * size)
        clients = [await connect(url) for _ in range(3)]
        for _, writer in clients:
            writer.write(head(length=len(body)) + body)
            await writer.drain()
        await until(lambda: engine.opened == 3, 10)
        for _, writer in clients:
            writer.transport.abort()
        await asyncio.sleep(0.1)
        may_read.set()
        await until(lambda: engine.closed == 3, 10)
        assert engine.opened == 3, "nothing was tried again"


def answer_then_close_after(
    seconds: Callable[[], float],
) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    """An engine that keeps a connection for a while after each answer, then closes it."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        patience = 5.0  # for a new connection's first request
        while True:
            async with asyncio.timeout(patience):
                request = await reader.readuntil(b"\r\n\r\n")
            patience = seconds()
            length = next(
                int(line.split(b":")[1])
                for line in request.split(b"\r\n")
                if line.lower().startswith(b"content-length")
            )
            await reader.readexactly(length)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    async def answer_until_idle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(TimeoutError):
            await answer(reader, writer)

    return answer_until_idle


async def test_no_client_sees_connections_that_the_engine_closes_early(
    http: aiohttp.ClientSession, start_router: StartRouter
) -> None:
    """It keeps idle ones for 0 to 4 ms, so many are closed just as a request is on its way.

    Twelve clients send 600 requests, and all are answered.
    """
    rng = random.Random(3)  # noqa: S311 - no secret
    engine = RawEngine()
    async with engine.serve(answer_then_close_after(lambda: rng.uniform(0.0005, 0.004))) as table:
        url = await start_router(table)

        async def ask_again_and_again() -> None:
            for _ in range(50):
                await asyncio.sleep(rng.uniform(0, 0.006))
                await assert_answers(http, url + CHAT)

        await asyncio.gather(*(ask_again_and_again() for _ in range(12)))
    assert engine.opened > 50, "connections were closed early"


# --- memory -----------------------------------------------------------------------------------


class OwnProcess:
    """A router in a process of its own."""

    def __init__(self, url: str, process: psutil.Process) -> None:
        self.url = url
        self._process = process

    @property
    def mib(self) -> float:
        """What it has resident."""
        rss: int = self._process.memory_info().rss
        return rss / MIB


@pytest.fixture
async def own_process(engine: StandInEngine, resources: AsyncExitStack) -> OwnProcess:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", ROUTER, engine.url, stdout=asyncio.subprocess.PIPE
    )
    resources.push_async_callback(child.wait)
    resources.callback(child.kill)
    assert child.stdout is not None
    async with asyncio.timeout(60):
        port = int(await child.stdout.readline())
    return OwnProcess(f"http://127.0.0.1:{port}", psutil.Process(child.pid))


@pytest.mark.parametrize("is_stream", [True, False], ids=["events", "bytes"])
async def test_clients_that_do_not_read_cost_little_memory(
    http: aiohttp.ClientSession,
    own_process: OwnProcess,
    engine: StandInEngine,
    connect: Callable[[str], Awaitable[Connection]],
    is_stream: bool,
) -> None:
    """Forty of them, with 256 MiB of answer for each.

    The router holds less than 2.5 MiB for each, the engine stands still, and others are served.
    """
    sent = 0
    piece = b"data: " + b"x" * 8000 + b"\n\n"

    async def pour(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        headers: dict[str, Any] = {} if is_stream else {"Content-Type": "text/plain"}
        response = await begin_events(request, **headers)
        for _ in range(256 * MIB // len(piece)):
            await response.write(piece)
            sent += len(piece)
        return response

    answer = engine.answer
    await assert_answers(http, own_process.url + CHAT)
    before = own_process.mib
    engine.answer = pour
    clients = [await connect(own_process.url) for _ in range(40)]
    for _, writer in clients:
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(head(length=len(BODY)) + BODY)
    seen = -1
    while sent != seen or not sent:  # until the engine has stood still for a while
        seen = sent
        await asyncio.sleep(0.5)
    assert own_process.mib - before < 40 * 2.5
    engine.answer = answer
    await assert_answers(http, own_process.url + CHAT)
    for _, writer in clients:
        writer.transport.abort()
    async with asyncio.timeout(5):
        await engine.aborted.wait()


@pytest.mark.parametrize(
    "flood",
    [
        (head(b"Transfer-Encoding: chunked") + b"1;", b"a" * 2**16),
        (head(b"Transfer-Encoding: chunked") + b"0\r\n", b"X-Trailer: a\r\n" * 4096),
        (b"POST ", b"/" * 2**16),
        (head(b"X: ")[:-4], b"a" * 2**16),
        (b"", b"\r\n" * 2**15),
        (b"GET /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n", bytes(2**16)),
    ],
    ids=["chunk extension", "trailers", "path", "header", "blank lines", "body nobody reads"],
)
async def test_a_flood_without_end_costs_little_memory(
    http: aiohttp.ClientSession,
    own_process: OwnProcess,
    connect: Callable[[str], Awaitable[Connection]],
    flood: tuple[bytes, bytes],
) -> None:
    """Up to 128 MiB of what a request should have little of; cut off early or thrown away."""
    await assert_answers(http, own_process.url + CHAT)
    before = own_process.mib
    beginning, more = flood
    _, writer = await connect(own_process.url)
    writer.write(beginning)
    with suppress(ConnectionError, TimeoutError):
        async with asyncio.timeout(10):
            for _ in range(128 * MIB // len(more)):
                writer.write(more)
                await writer.drain()
    assert own_process.mib - before < 20
    await assert_answers(http, own_process.url + CHAT)


async def test_large_bodies_are_let_go(
    http: aiohttp.ClientSession, own_process: OwnProcess, engine: StandInEngine
) -> None:
    """One of 64 MiB after the other: memory does not grow with their number."""
    body = b'{"model": "base", "x": "%b"}' % (b"a" * (MAX_BODY_BYTES - 100))

    async def ask() -> None:
        async with http.post(own_process.url + CHAT, data=body) as response:
            assert response.status == 200
            await response.read()
        engine.seen.clear()

    await ask()
    await ask()
    before = own_process.mib
    for _ in range(4):
        await ask()
    assert own_process.mib - before < 64
