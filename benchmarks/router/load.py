"""The load: requests one after another, many in flight, streams as fast as they go, slow streams.

Each server gets the same bytes over the same kind of connection, and each answer is looked at: a
status other than 200, a stream with other than its chunks, a connection that closes early is an
error, never a fast answer. In a run that measures time the first one ends it.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from benchmarks.router.wire import (
    CONTENT,
    HEAD_END,
    body_length,
    chat_request,
    is_whole_chunked,
    joined,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

__all__ = ["LoadError", "Server", "Streams", "ask", "hold_streams", "latencies", "rate"]

ANSWER_SECONDS = 120.0
"""How long answers may take beyond what the load itself takes, before that is an error."""

LATE = f"no whole answer within {ANSWER_SECONDS:g} s"

CONNECTS_AT_ONCE = 128
"""A kernel drops connections that a server is slow to take."""


class LoadError(RuntimeError):
    """A server did not answer as it must."""


@dataclass(frozen=True, slots=True)
class Server:
    """What is asked: an engine, or a router before it."""

    name: str
    port: int

    @property
    def host(self) -> str:
        """With its port."""
        return f"127.0.0.1:{self.port}"


@dataclass(slots=True)
class Streams:
    """What became of streams that were all asked for at once."""

    errors: list[str] = field(default_factory=list)
    open_now: int = 0
    open_at_peak: int = 0
    ended: int = 0
    """Well or not."""

    def begin(self) -> None:
        """A stream's first bytes have come."""
        self.open_now += 1
        self.open_at_peak = max(self.open_at_peak, self.open_now)


class Connection(asyncio.Protocol):
    """One connection that is kept: a request, its whole answer, the next request."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._body_at = 0
        self._length: int | None = None
        self._whole: asyncio.Future[bytes] | None = None
        self._streams: Streams | None = None

    @property
    def has_begun(self) -> bool:
        """Whether something of the answer has come."""
        return self._body_at > 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep what is written to."""
        # uvloop's are not of asyncio's class.
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, error: Exception | None) -> None:
        """An answer that has not ended never will."""
        self._transport = None
        self._fail(f"the connection was closed early ({error or 'a plain end'})")

    def data_received(self, data: bytes) -> None:
        """Collect the answer, and say when it is whole."""
        self._received += data
        if not self._body_at and not self._read_head():
            return
        if self._length is None:
            is_whole = is_whole_chunked(self._received)
        else:
            is_whole = len(self._received) - self._body_at >= self._length
        if is_whole and self._whole is not None and not self._whole.done():
            self._whole.set_result(self._take())

    def ask(self, request: bytes, streams: Streams | None = None) -> asyncio.Future[bytes]:
        """Send a request.

        Args:
            request: The whole of it.
            streams: Told when the answer begins.

        Returns:
            Done when the answer is whole: its body, of chunks still in chunks.
        """
        self._received.clear()
        self._body_at, self._length, self._streams = 0, None, streams
        self._whole = asyncio.get_running_loop().create_future()
        if self._transport is None:
            self._fail("the connection is closed")
        else:
            self._transport.write(request)
        return self._whole

    def close(self) -> None:
        """Let go."""
        self._whole = None
        if self._transport is not None:
            self._transport.abort()

    def _read_head(self) -> bool:
        if (end := self._received.find(HEAD_END)) < 0:
            return False
        self._body_at = end + len(HEAD_END)
        head = bytes(self._received[:end])
        self._length = body_length(head)
        if head.split(b" ", 2)[1] != b"200":
            self._fail(f"answered {bytes(self._received[:300])!r}")
        if self._streams is not None:
            self._streams.begin()
        return True

    def _take(self) -> bytes:
        body = bytes(self._received[self._body_at :])
        return joined(body) if self._length is None else body

    def _fail(self, why: str) -> None:
        if self._whole is not None and not self._whole.done():
            self._whole.set_exception(LoadError(why))


async def ask(server: Server, chunks: int = 0) -> bytes:
    """Ask once, over a connection of its own.

    Args:
        server: Whom.
        chunks: Of a stream; 0 for none.

    Returns:
        The answer's body.

    Raises:
        LoadError: It is not the answer that was asked for.
        OSError: There is no connection.
    """
    async with _connections([server]) as (connection,):
        return await _ask(connection, chat_request(server.host, chunks=chunks), chunks)


async def latencies(servers: Sequence[Server], count: int) -> list[list[float]]:
    """Ask servers in turn, one request at a time, so that noise falls on all of them.

    Args:
        servers: All over connections that are kept.
        count: Of requests to each.

    Returns:
        Of each server, the seconds of each request.

    Raises:
        LoadError: An answer did not come, or was wrong.
    """
    requests = [chat_request(server.host) for server in servers]
    seconds: list[list[float]] = [[] for _ in servers]
    async with _connections(servers) as connections, _in_time(ANSWER_SECONDS):
        turns = list(zip(connections, requests, seconds, strict=True))
        for number in range(count):
            # Who comes first changes: the first of a turn finds the caches as the last left them.
            for connection, request, taken in turns if number % 2 else reversed(turns):
                began = time.perf_counter()
                await connection.ask(request)
                taken.append(time.perf_counter() - began)
    return seconds


async def rate(server: Server, in_flight: int, seconds: float, chunks: int = 0) -> float:
    """Keep a number of requests in flight for a while.

    Args:
        server: Whom.
        in_flight: How many connections ask, each again as soon as it has its answer.
        seconds: How long new requests are sent.
        chunks: Of each stream; 0 for answers in one piece.

    Returns:
        Answers a second, until the last one has come.

    Raises:
        LoadError: One was not whole.
    """
    request = chat_request(server.host, chunks=chunks)
    async with _connections([server] * in_flight) as connections:
        began = time.perf_counter()
        stop = began + seconds

        async def repeat(connection: Connection) -> int:
            done = 0
            while time.perf_counter() < stop:
                await _ask(connection, request, chunks)
                done += 1
            return done

        async with _in_time(seconds + ANSWER_SECONDS):
            counts = await asyncio.gather(*map(repeat, connections))
        return sum(counts) / (time.perf_counter() - began)


async def hold_streams(server: Server, count: int, chunks: int, pause_ms: int) -> Streams:
    """Ask for slow streams, all at once, and read them to their ends.

    Args:
        server: Whom.
        count: Of streams, each over a connection of its own.
        chunks: Of each.
        pause_ms: Between its chunks.

    Returns:
        What went wrong, and how many there were at a time.
    """
    streams = Streams()
    request = chat_request(server.host, chunks=chunks, pause_ms=pause_ms)
    async with _connections([server] * count) as connections:

        async def read(connection: Connection) -> None:
            try:
                await _ask(connection, request, chunks, streams)
            except LoadError as exc:
                streams.errors.append(str(exc))
            streams.open_now -= connection.has_begun
            streams.ended += 1

        try:
            async with asyncio.timeout(ANSWER_SECONDS + chunks * pause_ms / 1000):
                await asyncio.gather(*map(read, connections))
        except TimeoutError:
            streams.errors += [LATE] * (count - streams.ended)
    return streams


async def _ask(
    connection: Connection, request: bytes, chunks: int, streams: Streams | None = None
) -> bytes:
    """Ask, and look whether the answer is what was asked for."""
    body = await connection.ask(request, streams)
    if chunks and (found := body.count(CONTENT)) != chunks:
        raise LoadError(f"{found} chunks came, not {chunks}")
    return body


@asynccontextmanager
async def _in_time(seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise LoadError(LATE) from None


@asynccontextmanager
async def _connections(servers: Sequence[Server]) -> AsyncIterator[list[Connection]]:
    """A connection to each of some servers, opened some at a time."""
    loop = asyncio.get_running_loop()
    connections: list[Connection] = []
    try:
        for at in range(0, len(servers), CONNECTS_AT_ONCE):
            opening = (
                loop.create_connection(Connection, "127.0.0.1", server.port)
                for server in servers[at : at + CONNECTS_AT_ONCE]
            )
            connections += [connection for _, connection in await asyncio.gather(*opening)]
        yield connections
    finally:
        for connection in connections:
            connection.close()
