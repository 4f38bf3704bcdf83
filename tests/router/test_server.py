"""Taking the address early, refusing clearly, and draining at the end."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, cast

import aiohttp
import pytest
from aiohttp import web

from vllm_rvec.errors import ConfigError
from vllm_rvec.router import bind_socket, start_server

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Iterator

    from vllm_rvec.router.app import App

pytestmark = pytest.mark.anyio


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with bind_socket("127.0.0.1", 0) as bound:
        yield bound


def port_of(listener: socket.socket) -> int:
    port = listener.getsockname()[1]
    assert isinstance(port, int)
    return port


def test_port_0_takes_a_free_port(listener: socket.socket) -> None:
    """The socket knows which."""
    assert port_of(listener) > 0


def test_a_bound_port_is_held_before_the_server_starts(listener: socket.socket) -> None:
    """A second router fails at once, not after its engines have started."""
    with pytest.raises(ConfigError) as caught:
        bind_socket("127.0.0.1", port_of(listener))
    assert f"127.0.0.1 port {port_of(listener)}" in caught.value.what
    assert caught.value.why == "another process listens there"
    assert "another port" in caught.value.fix


def test_a_host_of_another_machine_is_refused() -> None:
    """192.0.2.1 is reserved for documentation: nobody has it."""
    with pytest.raises(ConfigError, match="no such address"):
        bind_socket("192.0.2.1", 0)


def test_a_host_that_nobody_knows_is_refused() -> None:
    """`.invalid` never resolves."""
    with pytest.raises(ConfigError, match="no address is known"):
        bind_socket("no-such-host.invalid", 0)


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_number_that_is_no_port_is_refused(port: int) -> None:
    """Ports go from 0 to 65535."""
    with pytest.raises(ConfigError, match="not a port"):
        bind_socket("127.0.0.1", port)


def test_localhost_is_the_ipv4_one() -> None:
    """It often has ::1 too, which clients of 127.0.0.1 would not reach."""
    with bind_socket("localhost", 0) as bound:
        assert bound.getsockname()[0] == "127.0.0.1"


class WaitingApp:
    """In place of a router: requests that take as long as the test has them."""

    def __init__(self, release: asyncio.Event, begun: asyncio.Event) -> None:
        self._release = release
        self._begun = begun
        self.is_running = False

    async def handle(self, _request: web.BaseRequest) -> web.StreamResponse:
        """Wait as long as the test has it."""
        self._begun.set()
        await self._release.wait()
        assert self.is_running, "what runs beside requests ends after them"
        return web.Response(text="done")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Note from when to when it runs."""
        self.is_running = True
        yield
        self.is_running = False


def waiting_app(release: asyncio.Event, begun: asyncio.Event) -> App:
    return cast("App", WaitingApp(release, begun))


async def fetch(port: int) -> str:
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/") as got:
        return await got.text()


async def test_what_connects_before_the_start_is_answered_after_it() -> None:
    """The kernel keeps early clients for the router."""
    release = asyncio.Event()
    release.set()
    listener = bind_socket("127.0.0.1", 0)
    early = asyncio.create_task(fetch(port_of(listener)))
    await asyncio.sleep(0.05)
    runner = await start_server(waiting_app(release, asyncio.Event()), listener)
    async with asyncio.timeout(5):
        assert await early == "done"
    await runner.cleanup()
    assert listener.fileno() == -1, "the socket is closed with the runner"


async def test_requests_under_way_end_before_the_server_does() -> None:
    """Cleaning up waits for them, and takes no new ones."""
    release, begun = asyncio.Event(), asyncio.Event()
    listener = bind_socket("127.0.0.1", 0)
    port = port_of(listener)
    runner = await start_server(waiting_app(release, begun), listener, shutdown_timeout=10)
    async with asyncio.timeout(5):
        under_way = asyncio.create_task(fetch(port))
        await begun.wait()
        cleaning = asyncio.create_task(runner.cleanup())
        await asyncio.sleep(0)  # cleanup's first step is to close the listener
        assert listener.fileno() == -1
        with pytest.raises(aiohttp.ClientConnectorError):
            await fetch(port)
        assert not cleaning.done()
        release.set()
        assert await under_way == "done"
        await cleaning


async def test_a_request_that_does_not_end_is_cut_off_in_time() -> None:
    """`shutdown_timeout` is the whole wait, not half of it."""
    begun = asyncio.Event()
    listener = bind_socket("127.0.0.1", 0)
    app = waiting_app(asyncio.Event(), begun)
    runner = await start_server(app, listener, shutdown_timeout=1.0)
    async with asyncio.timeout(5):
        under_way = asyncio.create_task(fetch(port_of(listener)))
        await begun.wait()
        started = time.monotonic()
        await runner.cleanup()
        assert 0.9 <= time.monotonic() - started < 1.8
        with pytest.raises(aiohttp.ClientConnectionError):
            await under_way
