"""The access log: one JSON line for each request, to stderr or to a file.

A thread of its own writes, some lines at a time, so that a disk that hangs or a pipe that nobody
reads delays no request. Lines that can't be written are lost and counted. Neither keys nor bodies
are ever in it, nor queries. The router's own messages are not here: they go to `logging`.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from json.encoder import encode_basestring_ascii as quote
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_rvec.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["AccessLog", "AccessRecord", "trace_id"]

logger = logging.getLogger("vllm_rvec.router")

STDERR = 2

CLOSED = -1
"""Writing there is an error; the old number may be another file's by then."""

MODE = 0o600
"""Of a file that is made here: which client asks when is nobody else's business."""

WAITING_LINES = 10_000
"""How many lines wait at most for a disk that doesn't take them."""

PAUSE_SECONDS = 0.05
"""How long lines are collected. A thread that woke for each one would take turns with the event
loop thousands of times a second."""

CLOSE_SECONDS = 5.0
"""How long `close` waits for a disk that hangs."""

TEXT_CHARACTERS = 200
"""How much of a text is logged. Escaped, each may take 12 bytes."""

TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")
"""W3C Trace Context, 3.2; higher versions may have more behind."""


@dataclass(slots=True)
class AccessRecord:
    """What is logged of one request.

    Not frozen: making a frozen one takes three times as long, and there is one for each request.
    """

    request_id: str
    """The client's `X-Request-Id`, or the one made for it."""
    method: str
    """GET, POST and so on."""
    path: str
    """The raw path; a query behind it is left out of the log."""
    status: int | None
    """The answer's HTTP status; None where the client left before it began."""
    duration_ms: float
    """From the request's arrival to its answer's end."""
    variant: str | None = None
    """Who answered."""
    alias: str | None = None
    """The alias that the client asked for."""
    reason: str | None = None
    """Why it was this variant."""
    alpha: str | None = None
    """The alpha, as `X-Rvec-Alpha` says it."""
    key: str | None = None
    """The client key's name in the configuration. Never the key."""
    ttft_ms: float | None = None
    """Time to the first token; to the first byte where the answer is no stream."""
    prompt_tokens: int | None = None
    """Where the answer tells them."""
    completion_tokens: int | None = None
    """Where the answer tells them."""
    error: str | None = None
    """The error's code."""
    client: str | None = None
    """The client's address."""
    traceparent: str | None = None
    """The request's header; of a valid one the trace id is logged."""


class AccessLog:
    """Writes records. Use it from one thread; close it at the end.

    Args:
        target: A file to append to, or `-` for stderr.
        clock: The time of day, in seconds since 1970.

    Raises:
        ConfigError: The file can't be opened.
    """

    def __init__(self, target: str | Path, clock: Callable[[], float] = time.time) -> None:
        self._path = None if str(target) == "-" else Path(target)
        self._clock = clock
        self._fd = STDERR if self._path is None else _open(self._path)
        self._lines: deque[str] = deque()
        self._has_work = threading.Event()
        self._is_reopen_asked = False
        self._is_closing = False
        self._is_reported = False
        self._is_line_begun = False
        self._lost_lines = 0
        self._writing = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="access-log", daemon=True)
        self._thread.start()

    @property
    def lost_lines(self) -> int:
        """How many lines could not be written."""
        return self._lost_lines

    def write(self, record: AccessRecord) -> None:
        """Log a request that has ended. Never waits, never fails.

        Args:
            record: What is known of it; the time is now.
        """
        if len(self._lines) >= WAITING_LINES:
            self._lost_lines += 1
            self._report("it is written too slowly")
            return
        self._lines.append(format_line(record, self._clock()))
        if not self._has_work.is_set():
            self._has_work.set()

    def reopen(self) -> None:
        """Go on in a new file of the same name, before the next line: for logrotate's SIGHUP."""
        self._is_reopen_asked = True
        self._has_work.set()

    def flush(self) -> None:
        """Write what waits. Unlike `write`, this waits for the disk."""
        with self._writing:
            self._drain()

    def close(self) -> None:
        """Write what waits and end. A disk that hangs is not waited for long."""
        self._is_closing = True
        self._has_work.set()
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while not self._is_closing:
            self._has_work.wait()
            if not self._is_closing:
                time.sleep(PAUSE_SECONDS)
            # Before the lines are taken: one that comes later sets it again.
            self._has_work.clear()
            self.flush()
        with self._writing:
            self._drain()
            self._close_file()

    def _drain(self) -> None:
        if self._is_reopen_asked:
            self._is_reopen_asked = False
            self._reopen()
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        if not lines:
            return
        try:
            self._write_all("".join(lines).encode())
        except OSError as exc:
            self._lost_lines += len(lines)
            self._report(exc.strerror or str(exc))

    def _write_all(self, data: bytes) -> None:
        if self._is_line_begun:
            data = b"\n" + data
        while data:
            written = os.write(self._fd, data)
            # What is cut off by a full disk must not run into the next line.
            self._is_line_begun = written > 0 and data[written - 1 : written] != b"\n"
            data = data[written:]

    def _reopen(self) -> None:
        if self._path is None:
            return
        try:
            fd = _open(self._path)
        except ConfigError as exc:
            logger.warning("the access log stays in its old file: %s", exc.why)
            return
        self._close_file()
        self._fd = fd
        self._is_reported = self._is_line_begun = False

    def _close_file(self) -> None:
        if self._path is not None:
            fd, self._fd = self._fd, CLOSED
            os.close(fd)

    def _report(self, why: str) -> None:
        """Say once that lines are lost: a full disk would fill the other log too."""
        if not self._is_reported:
            self._is_reported = True
            logger.warning("lines of the access log are lost: %s", why)


def format_line(record: AccessRecord, now: float) -> str:
    """A record as one line of JSON. All but ASCII is escaped, so nobody can forge a second line.

    Put together by hand: `json.dumps` of a dictionary takes several times as long.

    Args:
        record: What is logged.
        now: The time of day, in seconds since 1970.
    """
    return (
        f'{{"time":"{_rfc3339(now)}","request_id":{_text(record.request_id)}'
        f',"method":{_text(record.method)},"path":{_text(record.path.partition("?")[0])}'
        f',"status":{_whole(record.status)},"variant":{_text(record.variant)}'
        f',"alias":{_text(record.alias)},"reason":{_text(record.reason)}'
        f',"alpha":{_text(record.alpha)},"key":{_text(record.key)}'
        f',"duration_ms":{_milliseconds(record.duration_ms)},"ttft_ms":{_milliseconds(record.ttft_ms)}'
        f',"prompt_tokens":{_whole(record.prompt_tokens)}'
        f',"completion_tokens":{_whole(record.completion_tokens)}'
        f',"error":{_text(record.error)},"client":{_text(record.client)}'
        f',"trace_id":{_text(trace_id(record.traceparent))}}}\n'
    )


def trace_id(traceparent: str | None) -> str | None:
    """The trace id of a W3C `traceparent` header; None where that isn't valid.

    >>> trace_id("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
    '4bf92f3577b34da6a3ce929d0e0e4736'

    Args:
        traceparent: The header, if there was one.
    """
    found = TRACEPARENT.fullmatch(traceparent) if traceparent else None
    if found is None:
        return None
    version, trace, parent, more = found.groups()
    is_invalid = version == "ff" or (version == "00" and more is not None)
    return None if is_invalid or not trace.strip("0") or not parent.strip("0") else trace


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, MODE)
    except OSError as exc:
        raise ConfigError(
            f"Can't write the access log {path}.",
            why=exc.strerror or str(exc),
            fix="Name a file in a folder that is there and may be written to, or `-` for stderr.",
            path=path,
        ) from exc


def _text(text: str | None) -> str:
    if text is None:
        return "null"
    return quote(text if len(text) <= TEXT_CHARACTERS else text[:TEXT_CHARACTERS] + "...")


def _whole(number: int | None) -> str:
    return "null" if number is None else str(number)


def _milliseconds(number: float | None) -> str:
    return "null" if number is None else f"{number:.3f}"


@lru_cache(maxsize=2)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _rfc3339(now: float) -> str:
    seconds, rest = divmod(now, 1)
    return f"{_second(int(seconds))}.{int(rest * 1000):03d}Z"
