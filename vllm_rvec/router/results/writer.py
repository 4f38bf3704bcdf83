"""Writes batches of rows, come what may: locks, a full disk, a file that was moved, rotation.

Runs on the thread of `store`, which holds the queue. What fails is said once, and told to those who
wait.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_rvec.errors import RvecError
from vllm_rvec.router.results.rotation import bytes_of, rotate, rotated_files
from vllm_rvec.router.results.schema import ResultsUnavailableError, open_for_writing
from vllm_rvec.router.results.writing import SplitRows, insert_exposures, update_outcome

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future
    from pathlib import Path

    from vllm_rvec.router.results.rows import Exposure, Outcome

__all__ = ["Ask", "Writer", "refuse", "unavailable"]

logger = logging.getLogger("vllm_rvec.router")

RETRY_SECONDS = 1.0
"""After a write that failed."""
RETRY_ROTATION_SECONDS = 10.0
HARD_LIMIT = 2
"""A file that can't be rotated grows to so many times its largest size, and no further."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What somebody waits for: an outcome to be stored, or only all before it."""

    outcome: Outcome | None
    answer: Future[bool]


class Writer:
    """The connection, its failures, rotation. For one thread, less `check` and `files`.

    Args:
        path: The file.
        max_bytes: When it is larger it is rotated.
        keep_files: How many rotated files are kept.
    """

    def __init__(self, path: Path, max_bytes: int, keep_files: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._keep_files = keep_files
        self._connection: sqlite3.Connection | None = None
        self._splits: SplitRows | None = None
        self._inode = (0, 0)
        self._rotate_at = 0.0
        self._is_failing = False
        self._is_rotation_failing = False
        self.retry_at = 0.0
        self.files = threading.Lock()
        """Held while the files' names must stay as they are."""

    def check(self) -> None:
        """Open the file, see that it can be written, and close it again."""
        with closing(open_for_writing(self._path)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")

    def write(self, rows: list[tuple[Exposure, str | None]], asks: list[Ask]) -> tuple[bool, int]:
        """Write a batch; never raises for what a disk or another process does.

        Returns:
            Whether it is written, and how many rows could not be for what is in them.
        """
        if time.monotonic() < self.retry_at:
            refuse(asks, "the file can't be written")
            return False, 0
        try:
            refused, unknown = self._commit(rows, asks)
        except (sqlite3.Error, OSError, RvecError) as exc:
            self._failed(exc)
            refuse(asks, str(exc))
            return False, 0
        if self._is_failing:
            logger.warning("results: %s is written again", self._path)
        self._is_failing = False
        for ask in asks:
            if ask not in unknown:
                _answer(ask, is_known=True)
        for ask in unknown:
            self._look_back(ask)
        return True, refused

    def close(self) -> None:
        """Close the connection, if there is one."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(sqlite3.Error):
                connection.close()

    def _commit(
        self, rows: list[tuple[Exposure, str | None]], asks: list[Ask]
    ) -> tuple[int, list[Ask]]:
        self._rotate_if_large()
        connection, splits = self._open()
        try:
            connection.execute("BEGIN IMMEDIATE")
            refused = insert_exposures(connection, rows, splits)
            wanted = [(ask, ask.outcome) for ask in asks if ask.outcome is not None]
            unknown = [ask for ask, outcome in wanted if not update_outcome(connection, outcome)]
            connection.execute("COMMIT")
        except BaseException:
            self.close()  # rolls back; and the rows of `splits` that are known are gone with it
            raise
        return refused, unknown

    def _open(self) -> tuple[sqlite3.Connection, SplitRows]:
        # A file that somebody moved or removed would go on to be written, and never be read.
        if self._connection is not None and _inode(self._path) != self._inode:
            self.close()
        if self._connection is None or self._splits is None:
            self._connection = open_for_writing(self._path)
            self._splits = SplitRows(self._connection)
            self._inode = _inode(self._path)
        return self._connection, self._splits

    def _look_back(self, ask: Ask) -> None:
        """Store an outcome in the newest rotated file that knows its request."""
        try:
            is_known = ask.outcome is not None and any(
                _update(path, ask.outcome) for path in rotated_files(self._path)
            )
        except (sqlite3.Error, OSError, RvecError) as exc:
            refuse([ask], str(exc))
        else:
            _answer(ask, is_known=is_known)

    def _rotate_if_large(self) -> None:
        size_bytes = bytes_of(self._path)
        if size_bytes < self._max_bytes:
            return
        if time.monotonic() >= self._rotate_at:
            self._rotate()
            size_bytes = bytes_of(self._path)
        if size_bytes >= HARD_LIMIT * self._max_bytes:
            raise ResultsUnavailableError(
                f"{self._path} is over {HARD_LIMIT} times max_mib, and can't be rotated.",
                why="another process has it open",
                fix="Close what has it open.",
            )

    def _rotate(self) -> None:
        if not self.files.acquire(blocking=False):
            return  # being read: at the next commit
        try:
            self.close()
            rotate(self._path, self._keep_files)
            self._is_rotation_failing = False
        except (sqlite3.Error, OSError) as exc:
            self._rotate_at = time.monotonic() + RETRY_ROTATION_SECONDS
            if not self._is_rotation_failing:
                logger.warning("results: %s can't be rotated yet: %s", self._path, exc)
            self._is_rotation_failing = True
        finally:
            self.files.release()

    def _failed(self, error: Exception) -> None:
        self.retry_at = time.monotonic() + RETRY_SECONDS
        self.close()
        if not self._is_failing:
            logger.warning(
                "results: %s can't be written: %s; it is tried again each second, "
                "and requests are served meanwhile",
                self._path,
                error,
            )
        self._is_failing = True


def refuse(asks: Sequence[Ask], why: str) -> None:
    """Tell those who wait that it did not come about."""
    for ask in asks:
        if not ask.answer.done() and ask.answer.set_running_or_notify_cancel():
            ask.answer.set_exception(unavailable(why))


def unavailable(why: str) -> ResultsUnavailableError:
    """The error of an outcome that can't be stored now."""
    return ResultsUnavailableError(
        "The results can't be stored now.", why=why, fix="Try again in a moment."
    )


def _update(path: Path, outcome: Outcome) -> bool:
    # Each statement by itself: a file that doesn't know the request isn't locked.
    with closing(open_for_writing(path)) as connection:
        return update_outcome(connection, outcome)


def _inode(path: Path) -> tuple[int, int]:
    try:
        found = os.stat(path)  # noqa: PTH116 - called for each commit
    except FileNotFoundError:
        return 0, 0
    return found.st_dev, found.st_ino


def _answer(ask: Ask, *, is_known: bool) -> None:
    # False where the caller has gone, by its own time limit.
    if ask.answer.set_running_or_notify_cancel():
        ask.answer.set_result(is_known)
