"""Takes in a changed configuration: on SIGHUP, and when the file changes.

Checked whole, then swapped; a bad file keeps the old configuration and says why. Requests under way
keep what they began with. Not here: what a configuration says (`config`), and how it takes hold
(`services`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from typing import TYPE_CHECKING

from watchfiles import awatch

from vllm_rvec.errors import RvecError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vllm_rvec.router.services import Services

__all__ = ["Reloader"]

logger = logging.getLogger("vllm_rvec.router")

SETTLE_MILLISECONDS = 400
"""An editor writes a file in several steps."""

LOOK_MILLISECONDS = 5000
"""The file is looked at so often in any case: network file systems tell of no change, and what
happened before the watch began was told to nobody."""


class Reloader:
    """Reads a configuration again.

    Args:
        path: Its file.
        services: Told how it went.
        load: Reads and checks the file, in a thread; gives what swaps it in, on the event loop.
    """

    def __init__(
        self, path: Path, services: Services, load: Callable[[], Callable[[], None]]
    ) -> None:
        self._path = path
        self._services = services
        self._load = load
        self._lock = asyncio.Lock()
        self._hangup = asyncio.Event()
        self._seen = self._stamp()
        # From here on, not from `run`: without a handler, SIGHUP ends the process.
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._hangup.set)

    async def run(self) -> None:
        """Watch until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow_file())
            tasks.create_task(self._follow_signal())

    async def reload(self) -> bool:
        """Read the file again; tells whether it is what holds now."""
        async with self._lock:
            try:
                swap = await asyncio.to_thread(self._load)
                swap()
            except RvecError as exc:
                self._services.metrics.record_reload(is_ok=False)
                logger.error("the old configuration stays: %s", exc)  # noqa: TRY400 - the user's
                return False
            except Exception:
                self._services.metrics.record_reload(is_ok=False)
                logger.exception("the old configuration stays")
                return False
        self._services.metrics.record_reload(is_ok=True)
        generation = self._services.traffic.generation
        logger.info("configuration %d from %s", generation, self._path)
        return True

    async def _follow_signal(self) -> None:
        while await self._hangup.wait():
            self._hangup.clear()
            if self._services.access_log is not None:
                self._services.access_log.reopen()  # for logrotate
            await self.reload()

    async def _follow_file(self) -> None:
        """Watch the folder: editors and Kubernetes put another file in the old one's place."""
        # Seen also where what changed is a link on the way to the file, as in a ConfigMap.
        watched = {self._path.parent.absolute(), self._path.resolve().parent}
        changes = awatch(
            *watched,
            watch_filter=None,  # the default passes over folders such as `.venv`
            debounce=SETTLE_MILLISECONDS,
            rust_timeout=LOOK_MILLISECONDS,
            yield_on_timeout=True,
            recursive=False,
        )
        try:
            async for _ in changes:
                await self._look()
        except OSError as exc:  # most often there are no more inotify watches to be had
            logger.warning("%s is read again on SIGHUP only: %s", self._path, exc)
        except Exception:  # a watch that fails must end neither the router nor SIGHUP
            logger.exception("%s is read again on SIGHUP only", self._path)

    async def _look(self) -> None:
        stamp = await asyncio.to_thread(self._stamp)
        if stamp != self._seen:
            self._seen = stamp
            await self.reload()

    def _stamp(self) -> bytes:
        """The file's bytes; empty while it is gone."""
        with contextlib.suppress(OSError):
            return self._path.read_bytes()
        return b""
