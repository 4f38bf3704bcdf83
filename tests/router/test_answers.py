"""vllm_rvec.router.answers: one request over a pooled connection, against servers made of bytes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import aiohttp
import pytest
from aiohttp.http import HttpProcessingError
from multidict import CIMultiDict

from vllm_rvec.router import create_client
from vllm_rvec.router.answers import PIECES_BYTES, Origin

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

pytestmark = pytest.mark.anyio

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Type: Text/Plain; charset=utf-8\r\n\r\nok"


class Scripted:
    """A server that says what a test has it say."""

    def __init__(self) -> None:
        self.connections = 0
        self.heads: list[bytes] = []
        self.answer = OK
        self.bodies_read = True

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer requests until the client leaves."""
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.heads.append(head)
                length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
                if self.bodies_read:
                    await reader.readexactly(int(length or 0))
                writer.write(self.answer)
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
            writer.close()


@pytest.fixture
async def server() -> AsyncIterator[tuple[Scripted, str]]:
    scripted = Scripted()
    listening = await asyncio.start_server(scripted.talk, "127.0.0.1", 0)
    yield scripted, f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    listening.close()


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with create_client() as session:
        yield session


def connector_of(session: aiohttp.ClientSession) -> aiohttp.BaseConnector:
    assert session.connector is not None
    return session.connector


async def test_a_connection_is_used_again_once_its_answer_is_read(
    server: tuple[Scripted, str], client: aiohttp.ClientSession
) -> None:
    """And the request is what was asked for, behind the path of the upstream's address."""
    scripted, url = server
    origin = Origin(f"{url}/engine%20one/", client)
    for _ in range(3):
        headers = CIMultiDict({"X-Request-Id": "1"})
        answer = await origin.ask(connector_of(client), "POST", "/v1/x?y=%41", headers, b"{}")
        assert (answer.status, answer.reason, answer.content_length) == (200, "OK", 2)
        assert answer.content_type == "text/plain"
        assert await answer.read() == b"ok"
        answer.close()
    assert scripted.connections == 1
    line, *headers_sent = scripted.heads[0].decode().split("\r\n")
    assert line == "POST /engine%20one/v1/x?y=%41 HTTP/1.1"
    named = {
        header.partition(":")[0]: header.partition(": ")[2] for header in headers_sent if header
    }
    assert named == {
        "X-Request-Id": "1",
        "Host": url.removeprefix("http://"),
        "Content-Length": "2",
    }


async def test_an_answer_that_is_closed_unread_takes_its_connection_with_it(
    server: tuple[Scripted, str], client: aiohttp.ClientSession
) -> None:
    """That is how the engine hears that nobody waits."""
    scripted, url = server
    scripted.answer = b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nbegun"
    origin = Origin(url, client)
    for _ in range(2):
        answer = await origin.ask(connector_of(client), "GET", "/", CIMultiDict(), b"")
        answer.close()
    assert scripted.connections == 2
    assert b"Content-Length" not in scripted.heads[0]


async def test_interim_answers_are_passed_over(
    server: tuple[Scripted, str], client: aiohttp.ClientSession
) -> None:
    """103 Early Hints, say."""
    scripted, url = server
    scripted.answer = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + OK
    answer = await Origin(url, client).ask(connector_of(client), "GET", "/", CIMultiDict(), b"")
    assert (answer.status, await answer.read()) == (200, b"ok")


async def test_a_large_body_that_is_refused_unread(
    server: tuple[Scripted, str], client: aiohttp.ClientSession
) -> None:
    """The refusal arrives; the connection, which the rest would follow, is not used again."""
    scripted, url = server
    scripted.bodies_read = False
    scripted.answer = OK.replace(b"200 OK", b"413 No")
    origin = Origin(url, client)
    body = b"x" * (64 * PIECES_BYTES)
    answer = await origin.ask(connector_of(client), "POST", "/", CIMultiDict(), body)
    assert (answer.status, await answer.read()) == (413, b"ok")
    answer.close()
    scripted.bodies_read, scripted.answer = True, OK
    answer = await origin.ask(connector_of(client), "POST", "/", CIMultiDict(), body)
    assert (answer.status, await answer.read()) == (200, b"ok")
    assert scripted.connections == 2


async def test_what_is_not_http_is_told_apart_from_a_closed_connection(
    server: tuple[Scripted, str], client: aiohttp.ClientSession
) -> None:
    """Only the second is tried again elsewhere."""
    scripted, url = server
    scripted.answer = b"SSH-2.0-OpenSSH_9.2\r\n\r\n"
    origin = Origin(url, client)
    with pytest.raises(HttpProcessingError):
        await origin.ask(connector_of(client), "POST", "/", CIMultiDict(), b"{}")
    closed = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    port = closed.sockets[0].getsockname()[1]
    with pytest.raises(aiohttp.ClientConnectionError):
        await Origin(f"http://127.0.0.1:{port}", client).ask(
            connector_of(client), "POST", "/", CIMultiDict(), b"{}"
        )
    closed.close()


async def test_a_header_can_not_bring_another_request_along(
    server: tuple[Scripted, str], client: aiohttp.ClientSession
) -> None:
    """Aiohttp's writer refuses line breaks, wherever they came from."""
    _, url = server
    headers = CIMultiDict({"X-Request-Id": "1\r\nX-Evil: 1"})
    with pytest.raises(ValueError, match="header injection"):
        await Origin(url, client).ask(connector_of(client), "GET", "/", headers, b"")
