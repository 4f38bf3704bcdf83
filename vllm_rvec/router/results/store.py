"""The results of a running router: an embedded SQLite file that never holds a request up.

Exposures go into a bounded queue, and one thread writes them, many to a commit. A file that is
locked or a disk that is full costs rows, which are counted, and nothing else. One router for each
file: rotation needs the file to itself. What the rows say is for `report`.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import sqlite3
import threading
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from vllm_rvec.errors import ConfigError
from vllm_rvec.router.results.reader import read_experiments
from vllm_rvec.router.results.schema import ResultsUnavailableError, is_passing
from vllm_rvec.router.results.writer import Ask, Writer, refuse, unavailable
from vllm_rvec.router.results.writing import split_text
from vllm_rvec.router.settings import PathText, Settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm_rvec.router.results.report import ExperimentSummary
    from vllm_rvec.router.results.rows import Exposure, Outcome

__all__ = ["ResultsConfig", "ResultsStore"]

logger = logging.getLogger("vllm_rvec.router")

BATCH_ROWS = 200
COMMIT_SECONDS = 0.5
"""A commit is made when so many rows wait, or after so long."""
MAX_BATCH_ROWS = 1000
QUEUE_ROWS = 10_000
QUEUE_PROMPT_BYTES = 32 * 2**20
"""What waits in memory while the file can't be written: some seconds of traffic."""
MAX_PROMPT_BYTES = 256 * 2**10
"""Of one prompt; the rest is cut off."""
QUEUE_OUTCOMES = 1000
ANSWER_SECONDS = 5.0
"""How long a caller of `add` or `flush` waits for the thread."""
CLOSE_SECONDS = 5.0


class ResultsConfig(Settings):
    """Where results are kept, and how many."""

    path: PathText
    """The SQLite file. Its folder must exist; beside it lie `-wal`, `-shm` and rotated files."""

    max_mib: int = Field(default=512, ge=1)
    """When the file is larger it is moved to `PATH.1` and a new one begun."""

    keep_files: int = Field(default=4, ge=0)
    """How many rotated files are kept; older ones are removed."""

    keep_prompts: bool = False
    """Whether request bodies are stored too, up to 256 KiB of each."""


class ResultsStore:
    """Writes what was served and what it was worth; answers which variant is better.

    Args:
        config: Where, and how much.
    """

    def __init__(self, config: ResultsConfig) -> None:
        self._config = config
        self._path = Path(config.path)
        self._lock = threading.Lock()
        """Held for a moment only: for what both threads change."""
        self._queue: deque[tuple[Exposure, str | None]] = deque()
        self._prompt_bytes = 0
        self._asks: deque[Ask] = deque()
        self._splits: dict[str, str] = {}
        self._dropped = 0
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._reading = asyncio.Lock()
        self._writer = Writer(self._path, config.max_mib * 2**20, config.keep_files)

    @property
    def dropped(self) -> int:
        """Exposures that were not stored: the queue was full, or the file of no use."""
        with self._lock:
            return self._dropped

    def start(self) -> None:
        """Open the file, and start the thread that writes.

        A file that is locked, or a full disk, is no error: it is tried again.

        Raises:
            ConfigError: The file is not ours, of another version, or can't be made.
        """
        try:
            self._writer.check()
        except sqlite3.Error as exc:
            if not is_passing(exc):
                raise self._unusable(str(exc)) from exc
            logger.warning("results: %s can't be written yet: %s", self._path, exc)
        except OSError as exc:
            if exc.errno not in {errno.ENOSPC, errno.EDQUOT}:
                raise self._unusable(exc.strerror or str(exc)) from exc
            logger.warning("results: %s can't be made yet: %s", self._path, exc)
        # A daemon: a disk that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="rvec-results", daemon=True)
        self._thread.start()

    def note_split(self, experiment: str, weights: Mapping[str, float]) -> None:
        """Say what the exposures from now on are drawn from.

        Args:
            experiment: The alias.
            weights: Relative. The first variant is the one that others are compared with.
        """
        self._splits[experiment] = split_text(weights)

    def record(self, exposure: Exposure) -> None:
        """Store an exposure soon. Never blocks, never raises; drops it when the queue is full."""
        prompt = exposure.prompt
        if prompt is not None:
            prompt = prompt[:MAX_PROMPT_BYTES] if self._config.keep_prompts else None
            exposure = replace(exposure, prompt=prompt)
        size = len(prompt or b"")
        with self._lock:
            is_full = len(self._queue) >= QUEUE_ROWS
            if is_full or self._prompt_bytes + size > QUEUE_PROMPT_BYTES or self._closing.is_set():
                self._dropped += 1
                return
            self._queue.append((exposure, self._splits.get(exposure.experiment)))
            self._prompt_bytes += size
            is_batch = len(self._queue) == BATCH_ROWS
        if is_batch:
            self._wake.set()

    async def add(self, outcome: Outcome) -> bool:
        """Store what a request was worth; a later vote for the same request replaces the earlier.

        Args:
            outcome: Of any request that is in this file or a rotated one.

        Returns:
            False when the request is not known here.

        Raises:
            ResultsUnavailableError: The file can't be written now.
        """
        return await self._ask(outcome)

    async def flush(self) -> None:
        """Wait until all that was recorded is stored.

        Raises:
            ResultsUnavailableError: The file can't be written now.
        """
        await self._ask(None)

    async def experiments(
        self, configured: Mapping[str, Mapping[str, float]]
    ) -> list[ExperimentSummary]:
        """Summarise each experiment: those configured, and those found in the files.

        Args:
            configured: Of each alias with a split: its weights.

        Returns:
            By name.

        Raises:
            ResultsUnavailableError: The file can't be read now.
        """
        # While the file can't be written, what is in it can be read.
        with suppress(ResultsUnavailableError):
            await self.flush()
        async with self._reading:
            return await asyncio.to_thread(self._read, configured)

    def close(self) -> None:
        """Write what waits, within a bounded time, and end the thread."""
        with self._lock:
            self._closing.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)
        self._drop_all()

    def _read(self, configured: Mapping[str, Mapping[str, float]]) -> list[ExperimentSummary]:
        with self._writer.files:
            return read_experiments(self._path, configured)

    async def _ask(self, outcome: Outcome | None) -> bool:
        ask = Ask(outcome, Future())
        with self._lock:
            is_full = len(self._asks) >= QUEUE_OUTCOMES
            if is_full or self._thread is None or self._closing.is_set():
                raise unavailable("too many wait" if is_full else "the store is closed")
            self._asks.append(ask)
        self._wake.set()
        try:
            return await asyncio.wait_for(asyncio.wrap_future(ask.answer), ANSWER_SECONDS)
        except TimeoutError as exc:
            raise unavailable("writing takes too long") from exc

    def _run(self) -> None:
        while not self._closing.is_set():
            self._wake.wait(COMMIT_SECONDS)
            self._wake.clear()
            self._write_all()
        self._writer.retry_at = 0.0  # what failed a moment ago is tried once more
        self._write_all()
        self._writer.close()

    def _write_all(self) -> None:
        while True:
            rows, asks = self._take()
            if not rows and not asks:
                return
            try:
                is_written, refused = self._writer.write(rows, asks)
            except Exception:
                # The thread's boundary: a bug of ours costs this batch, not all that follow.
                logger.exception("results: %d rows were lost", len(rows))
                refuse(asks, "an internal error")
                is_written, refused = True, len(rows)
            with self._lock:
                self._dropped += refused
                if not is_written:
                    self._put_back(rows)
                    return

    def _take(self) -> tuple[list[tuple[Exposure, str | None]], list[Ask]]:
        with self._lock:
            # Asks first is right: whatever was recorded before them is among the rows, or the
            # batch is full and they wait for the last one.
            rows = [self._queue.popleft() for _ in range(min(MAX_BATCH_ROWS, len(self._queue)))]
            self._prompt_bytes -= sum(len(row.prompt or b"") for row, _ in rows)
            asks = [] if self._queue else list(self._asks)
            if asks:
                self._asks.clear()
        return rows, asks

    def _put_back(self, rows: list[tuple[Exposure, str | None]]) -> None:
        self._queue.extendleft(reversed(rows))
        self._prompt_bytes += sum(len(row.prompt or b"") for row, _ in rows)
        asks = list(self._asks)
        self._asks.clear()
        refuse(asks, "the file can't be written")

    def _drop_all(self) -> None:
        with self._lock:
            lost, asks = len(self._queue), list(self._asks)
            self._dropped += lost
            self._queue.clear()
            self._asks.clear()
        refuse(asks, "the store is closed")
        if lost:
            logger.warning("results: %d requests were not recorded at the end", lost)

    def _unusable(self, why: str) -> ConfigError:
        return ConfigError(
            f"Results can't be kept in {self._path}.",
            why=why,
            fix="Name a file in a folder that exists and that the router may write to.",
            path=self._path,
        )
