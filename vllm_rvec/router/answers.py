"""One request over one of aiohttp's pooled connections, and the answer to it.

`aiohttp.ClientSession.request` does for every request what no router needs: cookies, redirects,
authentication, compression, payload classes, a task that writes. That is half of what a request
costs here. So its connector (pool, connect, TLS), writer and parser are used without it. Not here:
which upstream that is, and what happens when it can't be reached (`sending`).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import aiohttp
from aiohttp.http import StreamWriter
from yarl import URL

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiohttp.client_proto import ResponseHandler
    from aiohttp.connector import Connection
    from multidict import CIMultiDict, CIMultiDictProxy

__all__ = ["TIMEOUT", "Answer", "Origin"]

CONNECT_SECONDS = 5.0

TIMEOUT = aiohttp.ClientTimeout(total=None, connect=CONNECT_SECONDS)
"""An answer may take as long as it takes."""

PIECES_BYTES = 64 * 2**10
"""A larger body goes out in pieces: 64 MiB in one would hold up the event loop."""


class Answer:
    """An answer whose head is here; its body is read from `content`.

    Args:
        connection: What it comes over; back in its pool at the body's end, closed by `close`.
    """

    __slots__ = (
        "_connection",
        "content",
        "content_length",
        "content_type",
        "headers",
        "reason",
        "status",
        "writing",
    )

    def __init__(self, connection: Connection) -> None:
        self._connection: Connection | None = connection
        self.writing: asyncio.Task[None] | None = None
        """What still sends the request's body."""

    async def begin(self, protocol: ResponseHandler) -> None:
        """Wait for the answer's head.

        Args:
            protocol: The connection's.

        Raises:
            ClientConnectionError: The connection ended before it.
            HttpProcessingError: It is not HTTP.
        """
        message, content = await protocol.read()
        while 100 <= message.code < 200 and message.code != 101:
            message, content = await protocol.read()
        self.status: int = message.code
        self.reason: str = message.reason
        self.headers: CIMultiDictProxy[str] = message.headers
        kind = self.headers.get("Content-Type", "application/octet-stream")
        self.content_type: str = kind.partition(";")[0].strip().lower()
        length = self.headers.get("Content-Length")
        self.content_length: int | None = None if length is None else int(length)
        self.content: aiohttp.StreamReader = content
        content.on_eof(self._release)

    async def read(self) -> bytes:
        """The whole body.

        Raises:
            ClientError: It breaks off.
        """
        return await self.content.read()

    def close(self) -> None:
        """Have done with it. What has not ended is aborted, which ends the engine's work too."""
        if self.writing is not None:
            self.writing.cancel()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _release(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if self.writing is not None and not self.writing.done():
            # It was answered before it was read, so what comes next would be read as its rest.
            self.writing.cancel()
            connection.close()
        else:
            connection.release()


class Origin:
    """One upstream's address, ready to be asked. Use it in one event loop.

    Args:
        base_url: `http://host:8000`, perhaps with a path in front of `/v1`.
        session: Only to satisfy aiohttp; what connects is each request's own connector.
    """

    def __init__(self, base_url: str, session: aiohttp.ClientSession) -> None:
        url, self._loop = URL(base_url), asyncio.get_running_loop()
        # Connectors take a whole request, of which they look only at where it goes.
        self._goes_to = aiohttp.ClientRequest("GET", url, loop=self._loop, session=session)
        self._path = url.raw_path.rstrip("/")
        self._host = self._goes_to.headers["Host"]

    async def ask(
        self,
        connector: aiohttp.BaseConnector,
        method: str,
        path: str,
        headers: CIMultiDict[str],
        body: bytes,
    ) -> Answer:
        """Send a request and wait for the head of its answer.

        Args:
            connector: Where the connection comes from.
            method: As it came.
            path: Raw, with its query.
            headers: Those of the request; `Host` and `Content-Length` are added here.
            body: Perhaps empty.

        Returns:
            The answer; the caller closes it.

        Raises:
            ClientConnectionError: It can't be reached, or closed the connection before it answered.
            HttpProcessingError: It answers with something that is not HTTP.
        """
        headers["Host"] = self._host
        if body or method not in {"GET", "HEAD", "DELETE"}:
            headers["Content-Length"] = str(len(body))
        try:
            connection = await connector.connect(self._goes_to, traces=[], timeout=TIMEOUT)
        except TimeoutError as exc:
            raise aiohttp.ConnectionTimeoutError(f"no connection to {self._host}") from exc
        if (protocol := connection.protocol) is None:
            raise aiohttp.ClientConnectionError("the connection closed as it was taken")
        answer = Answer(connection)
        try:
            protocol.set_response_params(
                skip_payload=method == "HEAD", read_until_eof=True, auto_decompress=False
            )
            writer = StreamWriter(protocol, self._loop)
            await writer.write_headers(f"{method} {self._path}{path} HTTP/1.1", headers)
            if len(body) <= PIECES_BYTES:
                await writer.write_eof(body)
            else:
                answer.writing = asyncio.create_task(_send_pieces(protocol, writer, body))
            await answer.begin(protocol)
        except BaseException:
            answer.close()
            raise
        return answer


async def _send_pieces(protocol: ResponseHandler, writer: StreamWriter, body: bytes) -> None:
    """Send a large body while its answer is waited for already: it may be a refusal."""
    try:
        for piece in _pieces(body):
            await writer.write(piece)
    except (OSError, aiohttp.ClientError) as exc:
        # Whoever waits for the answer must hear of it, unless it is here already.
        protocol.set_exception(aiohttp.ClientOSError(*exc.args))


def _pieces(body: bytes) -> Iterator[memoryview]:
    view = memoryview(body)
    return (view[at : at + PIECES_BYTES] for at in range(0, len(view), PIECES_BYTES))
