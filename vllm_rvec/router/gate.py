"""A door before one variant: it can be shut, and says when everybody who went in has come out.

While a variant's weights change, no request may be in the engine: one that began before would end
with other weights. So those under way end first, and new ones wait at the door.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from vllm_rvec.errors import AlphaChangeRefusedError, UpstreamError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

__all__ = ["Gate", "HeldTooLongError"]

HOLD_SECONDS = 60.0
"""How long a request waits at a shut door. OpenAI's clients wait ten minutes for an answer; a
balancer before us may give up after one."""


class HeldTooLongError(UpstreamError):
    """The door stayed shut for longer than a client can be made to wait.

    Args:
        seconds: How long that was.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(
            "The model is being changed.",
            why=f"its weights were not ready within {seconds:g} s",
            fix="Try again in a few seconds.",
        )


class Gate:
    """One variant's door; open at first.

    Args:
        hold_seconds: How long requests wait at it when it is shut.
    """

    def __init__(self, hold_seconds: float = HOLD_SECONDS) -> None:
        self._hold_seconds = hold_seconds
        self._inside = 0
        self._is_open = asyncio.Event()
        self._is_open.set()
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    @property
    def is_shut(self) -> bool:
        """Whether requests wait."""
        return not self._is_open.is_set()

    async def enter(self) -> Callable[[], None]:
        """Be under way; waits while the door is shut.

        Returns:
            What to call on the way out, once.

        Raises:
            HeldTooLongError: It stayed shut.
        """
        if self.is_shut:
            await self._wait_until_open()
        self._inside += 1
        self._is_empty.clear()
        return self._leave

    def _leave(self) -> None:
        self._inside -= 1
        if not self._inside:
            self._is_empty.set()

    @asynccontextmanager
    async def shut(self, drain_seconds: float) -> AsyncIterator[None]:
        """Shut the door and wait until nobody is inside; open it again at the end.

        Args:
            drain_seconds: How long those inside may take. Then they go on, and the door opens.

        Raises:
            AlphaChangeRefusedError: They took longer, or the door is shut already.
        """
        if self.is_shut:
            raise AlphaChangeRefusedError(
                "another change of this variant is under way",
                fix="wait for its end, then ask again",
            )
        self._is_open.clear()
        try:
            await self._wait_until_empty(drain_seconds)
            yield
        finally:
            self._is_open.set()

    async def _wait_until_open(self) -> None:
        try:
            async with asyncio.timeout(self._hold_seconds):
                # Again and again: the next change may have shut it before our turn came.
                while self.is_shut:
                    await self._is_open.wait()
        except TimeoutError:
            raise HeldTooLongError(self._hold_seconds) from None

    async def _wait_until_empty(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._is_empty.wait()
        except TimeoutError:
            raise AlphaChangeRefusedError(
                f"{self._inside} requests under way did not end within {seconds:g} s",
                fix="ask again when fewer or shorter ones are under way, or raise `drain_seconds`",
            ) from None
