"""Asking upstreams for their health: what counts as well, how often, and who is told."""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import pytest

from vllm_rvec.router import Upstream, VariantTable, create_client
from vllm_rvec.router.config import HealthConfig
from vllm_rvec.router.health import HealthWatch

from .conftest import answers, die, until, wait_for_ever

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aiohttp import web

    from .conftest import Answer, StandInEngine, StartEngine

pytestmark = pytest.mark.anyio

QUICK = HealthConfig(interval_seconds=0.02, timeout_seconds=0.1, failures=3)


class Watched:
    """A table of one variant, and what the watch says of it."""

    def __init__(self, *upstreams: Upstream) -> None:
        self.table = VariantTable(["base"])
        self.table.set_ready("base", *upstreams)
        self.told: list[tuple[str, bool]] = []

    @asynccontextmanager
    async def by(self, config: HealthConfig = QUICK) -> AsyncIterator[None]:
        """Watch meanwhile."""
        async with create_client() as client:
            watch = HealthWatch(
                self.table,
                client,
                lambda: config,
                lambda upstream, is_up: self.told.append((upstream.base_url, is_up)),
            )
            task = asyncio.create_task(watch.run())
            try:
                yield
            finally:
                assert not task.done()
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task

    def is_well(self, upstream: Upstream) -> bool:
        """Whether an upstream would get a request."""
        return self.table.load.is_well(upstream)


async def test_one_that_answers_is_well_and_asked_without_a_key(engine: StandInEngine) -> None:
    """A health path is open; a key sent there could only be lost."""
    watched = Watched(engine.upstream)
    async with watched.by():
        await until(lambda: len(engine.seen) >= 3)
    assert {(seen.method, seen.target) for seen in engine.seen} == {("GET", "/health")}
    assert not engine.seen[0].values("authorization")
    assert set(watched.told) == {(engine.url, True)}


@pytest.mark.parametrize(
    "answer", [answers(503), answers(500), wait_for_ever], ids=["503", "500", "hangs"]
)
async def test_one_that_fails_so_often_is_skipped_and_taken_back(
    engine: StandInEngine, answer: Answer, caplog: pytest.LogCaptureFixture
) -> None:
    """An engine that hangs accepts connections and never answers. Each change is logged once."""
    well, engine.answer = engine.answer, answer
    watched = Watched(engine.upstream)
    with caplog.at_level(logging.WARNING, "vllm_rvec.router"):
        async with watched.by():
            await until(lambda: not watched.is_well(engine.upstream))
            assert len(engine.seen) == 3
            # It stays so from check to check.
            seen = len(engine.seen)
            while len(engine.seen) < seen + 3:
                assert not watched.is_well(engine.upstream)
                await asyncio.sleep(0.005)
            engine.answer = well
            await until(lambda: watched.is_well(engine.upstream))
    assert [record.getMessage() for record in caplog.records] == [
        f"upstream {engine.url} is down",
        f"upstream {engine.url} is up",
    ]
    states = [is_up for _, is_up in watched.told]
    assert states[:3] == [True, True, False]
    assert states[-1]


async def test_one_failure_is_none(engine: StandInEngine) -> None:
    """A check may get lost in a burst."""
    well = engine.answer

    async def fail_every_second(request: web.Request) -> web.StreamResponse:
        return die(request) if len(engine.seen) % 2 else await well(request)

    engine.answer = fail_every_second
    watched = Watched(engine.upstream)
    async with watched.by():
        await until(lambda: len(engine.seen) >= 8)
    assert all(is_up for _, is_up in watched.told)


async def test_a_refused_connection_is_enough() -> None:
    """Nobody listens there: that needs no second look."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # held, and nobody listens
        gone = Upstream(f"http://127.0.0.1:{unused.getsockname()[1]}", None)
        watched = Watched(gone)
        slow = HealthConfig(interval_seconds=60, timeout_seconds=1, failures=3)
        async with watched.by(slow):
            await until(lambda: bool(watched.told))
            assert watched.told == [(gone.base_url, False)]
            assert not watched.is_well(gone)


@pytest.mark.parametrize("status", [404, 401])
async def test_an_upstream_without_a_health_path_is_well(
    engine: StandInEngine, status: int
) -> None:
    """Any OpenAI-compatible server will do, and not all have `/health`. This one answers."""
    engine.answer = answers(status)
    watched = Watched(engine.upstream)
    async with watched.by():
        await until(lambda: len(engine.seen) >= 5)
    assert {is_up for _, is_up in watched.told} == {True}


async def test_one_that_hangs_does_not_hold_up_the_checks_of_others(
    start_engine: StartEngine,
) -> None:
    """Else a second one that is down would be found late."""
    hung, other = await start_engine(), await start_engine()
    hung.answer = wait_for_ever
    watched = Watched(hung.upstream, other.upstream)
    config = HealthConfig(interval_seconds=0.02, timeout_seconds=3, failures=1)
    async with watched.by(config):
        await until(lambda: len(other.seen) >= 5)
    assert len(hung.seen) == 1


async def test_upstreams_that_come_and_go_are_followed(start_engine: StartEngine) -> None:
    """A reload changes the table under a running watch."""
    old, new = await start_engine(), await start_engine()
    watched = Watched(old.upstream)
    async with watched.by():
        await until(lambda: bool(old.seen))
        watched.table.set_ready("base", new.upstream)
        await until(lambda: bool(new.seen))
        await asyncio.sleep(0.03)
        seen = len(old.seen)
        await until(lambda: len(new.seen) >= 5)
        assert len(old.seen) == seen
        watched.table.set_down("base", "it is being changed")
        await asyncio.sleep(0.05)
        watched.table.set_ready("base", old.upstream)
        await until(lambda: len(old.seen) > seen)


async def test_something_that_is_not_http_is_down() -> None:
    """Another program may listen there."""

    async def talk(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example ESMTP\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
        upstream = Upstream(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", None)
        watched = Watched(upstream)
        async with watched.by():
            await until(lambda: not watched.is_well(upstream))
