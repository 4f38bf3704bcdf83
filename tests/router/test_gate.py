"""The door before a variant: who waits, for how long, and what it waits for."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from vllm_rvec.errors import AlphaChangeRefusedError
from vllm_rvec.router.gate import Gate, HeldTooLongError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def inside(gate: Gate) -> AsyncIterator[None]:
    leave = await gate.enter()
    try:
        yield
    finally:
        leave()


async def test_requests_wait_while_it_is_shut_and_go_on_when_it_opens() -> None:
    """In between, nobody is inside."""
    gate, seen = Gate(), 0

    async def request() -> int:
        async with inside(gate):
            return seen

    async with gate.shut(1):
        waiting = [asyncio.create_task(request()) for _ in range(3)]
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in waiting)
        seen = 7
    assert await asyncio.gather(*waiting) == [7, 7, 7]
    assert not gate.is_shut


async def test_it_is_shut_only_when_all_have_come_out() -> None:
    """The body runs after the last of them, not before."""
    gate, done = Gate(), asyncio.Event()

    async def request() -> None:
        async with inside(gate):
            await done.wait()

    running = [asyncio.create_task(request()) for _ in range(2)]
    await asyncio.sleep(0)
    asyncio.get_running_loop().call_later(0.05, done.set)
    async with gate.shut(5):
        assert all(task.done() for task in running)


async def test_who_takes_too_long_goes_on_and_the_door_opens() -> None:
    """Nothing is cut short, and those who waited come in."""
    gate = Gate()
    async with inside(gate):
        with pytest.raises(AlphaChangeRefusedError, match=r"1 requests .* within 0.01 s"):
            async with gate.shut(0.01):
                raise AssertionError
        async with inside(gate):
            pass


async def test_a_request_is_not_held_for_ever() -> None:
    """After a while it is told to come again, and the change goes on."""
    gate = Gate(hold_seconds=0.01)
    async with gate.shut(1):
        with pytest.raises(HeldTooLongError, match=r"within 0.01 s"):
            async with inside(gate):
                raise AssertionError


async def test_it_is_not_shut_twice() -> None:
    """The second change is refused at once, and the first's door stays shut."""
    gate = Gate()
    async with gate.shut(1):
        with pytest.raises(AlphaChangeRefusedError, match="under way"):
            async with gate.shut(1):
                raise AssertionError
        assert gate.is_shut


async def test_a_request_that_is_cancelled_comes_out() -> None:
    """A client that goes away must not hold up a change for ever."""
    gate = Gate()

    async def request() -> None:
        async with inside(gate):
            await asyncio.Event().wait()

    task = asyncio.create_task(request())
    await asyncio.sleep(0)
    task.cancel()
    async with gate.shut(1):
        assert task.done()
