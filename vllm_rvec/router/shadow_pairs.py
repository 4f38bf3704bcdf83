"""The live reply and the shadow's to one request, as a line of a file for an offline comparison.

A pair is whole once both replies are handed in; until then, and until it is written, it holds a
part of a bounded memory. Where that is used up there is no pair, and no request is held up. Not
here: who gets a copy, and how it is sent (`shadow`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from pydantic_core import from_json, to_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

__all__ = ["PairWriter", "ShadowRequest", "Ticket"]

logger = logging.getLogger("vllm_rvec.router")

MAX_REPLY_BYTES = 2**20
"""The largest reply that is kept."""

PAIR_MEMORY_BYTES = 64 * 2**20
"""What all unfinished and unwritten pairs hold together; further ones are not kept."""

PAIR_OVERHEAD_BYTES = 2048
"""What a pair holds beside its texts."""

CLOSE_SECONDS = 5.0
"""What the last pairs get to reach the disk."""


@dataclass(frozen=True, slots=True)
class ShadowRequest:
    """A live request, as far as its copy needs it."""

    request_id: str
    """What the live one is called; the copy's ends with `-shadow`."""
    variant: str
    """Who answers the live one."""
    path: str
    """As it came, perhaps with a query."""
    body: bytes = field(repr=False)
    """As it came: a JSON object."""
    headers: Mapping[str, str] = field(repr=False)
    """The client's, by case-insensitive name; only two are looked at."""


@dataclass(frozen=True, slots=True)
class _Reply:
    """A side of a pair."""

    status: int
    body: bytes | None
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class _Pair:
    """Both replies to one request."""

    alias: str
    at: datetime
    request: ShadowRequest
    live: _Reply
    shadow_variant: str
    shadow: _Reply
    held_bytes: int
    """What it holds of the pairs' memory."""


class _Memory:
    """How much all pairs hold together. Anyone may give back; only the event loop takes."""

    def __init__(self, limit_bytes: int) -> None:
        self._free_bytes = limit_bytes
        # No lock: the garbage collector may call `give_back` in the middle of anything.
        self._given_back: deque[int] = deque()

    def take(self, size: int) -> bool:
        while self._given_back:
            self._free_bytes += self._given_back.popleft()
        if size > self._free_bytes:
            return False
        self._free_bytes -= size
        return True

    def give_back(self, size: int) -> None:
        self._given_back.append(size)


class Ticket:
    """Where the live reply of a copied request is handed in, for the pair.

    It is fed by `chunk` and ended by `done`, which return at once and raise nothing. A ticket that
    is let go without an end leaves no pair.
    """

    def __init__(
        self,
        alias: str,
        request: ShadowRequest,
        shadow_variant: str,
        memory: _Memory,
        when_whole: Callable[[_Pair], None],
    ) -> None:
        self._alias = alias
        self._request = request
        self._shadow_variant = shadow_variant
        self._memory = memory
        self._when_whole = when_whole
        self._at = datetime.now(UTC)
        self._live: _Reply | None = None
        self._shadow: _Reply | None = None
        self._fed: bytearray | None = bytearray()
        self._held_bytes = 0
        self._is_wanted = self._hold(len(request.body) + PAIR_OVERHEAD_BYTES)

    def __del__(self) -> None:
        self.discard()

    @property
    def is_wanted(self) -> bool:
        """Whether there can still be a pair: not if its replies or the memory for it are lost."""
        return self._is_wanted

    def chunk(self, data: bytes) -> None:
        """Hand in the next bytes of the live reply.

        Args:
            data: As they came. Beyond 1 MiB in all none are kept.
        """
        if self._fed is None or not self._is_wanted:
            return
        if len(self._fed) + len(data) <= MAX_REPLY_BYTES and self._hold(len(data)):
            self._fed += data
        else:
            self._unhold(len(self._fed))
            self._fed = None

    def done(self, status: int, is_complete: bool) -> None:
        """End the live reply.

        Args:
            status: Its HTTP status.
            is_complete: Whether it came to its end. Half a reply can't be compared: no pair.
        """
        if not is_complete:
            self.discard()
        elif self._is_wanted and self._live is None:
            self._live = _Reply(status, None if self._fed is None else bytes(self._fed))
            self._fed = None
            self._finish()

    def shadow(self, status: int, body: bytes, seconds: float) -> None:
        """Hand in the shadow's reply.

        Args:
            status: Its HTTP status.
            body: Its body.
            seconds: How long it took.
        """
        if self._is_wanted:
            self._shadow = _Reply(status, self._kept(body), seconds)
            self._finish()

    def discard(self) -> None:
        """Let everything go: there will be no pair. Does nothing to one that is whole."""
        self._is_wanted = False
        self._fed = self._live = self._shadow = None
        self._unhold(self._held_bytes)

    def _finish(self) -> None:
        """Hand the pair on, and the memory with it, once it is whole."""
        if self._live is None or self._shadow is None:
            return
        pair = _Pair(
            self._alias,
            self._at,
            self._request,
            self._live,
            self._shadow_variant,
            self._shadow,
            self._held_bytes,
        )
        self._held_bytes = 0
        self.discard()
        self._when_whole(pair)

    def _kept(self, body: bytes) -> bytes | None:
        return body if len(body) <= MAX_REPLY_BYTES and self._hold(len(body)) else None

    def _hold(self, size: int) -> bool:
        if not self._memory.take(size):
            return False
        self._held_bytes += size
        return True

    def _unhold(self, size: int) -> None:
        if size:
            self._held_bytes -= size
            self._memory.give_back(size)


@dataclass(frozen=True, slots=True)
class _Target:
    """Where pairs go."""

    path: Path
    max_bytes: int


class PairWriter:
    """Writes pairs, in a thread: neither a slow disk nor large JSON holds up the event loop."""

    def __init__(self) -> None:
        self._memory = _Memory(PAIR_MEMORY_BYTES)
        # What waits in it is bounded by the pairs' memory.
        self._queue: queue.SimpleQueue[tuple[_Target, _Pair] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._warned: set[str] = set()

    def begin(
        self,
        alias: str,
        request: ShadowRequest,
        shadow_variant: str,
        path: Path,
        max_bytes: int,
    ) -> Ticket | None:
        """Begin a pair.

        Args:
            alias: The name that the client asked for.
            request: The live request.
            shadow_variant: Who gets its copy.
            path: The file for the pair.
            max_bytes: At this size the file is moved away.

        Returns:
            Where to hand in both replies; None where too many pairs are unfinished.
        """
        target = _Target(path, max_bytes)
        ticket = Ticket(
            alias, request, shadow_variant, self._memory, lambda pair: self._add(target, pair)
        )
        if ticket.is_wanted:
            return ticket
        self._warn_once("memory", "some pairs are not kept: too many are unfinished")
        return None

    async def aclose(self) -> None:
        """Write what was added, if that takes no longer than a few seconds."""
        if self._thread is not None:
            self._queue.put(None)
            await asyncio.to_thread(self._thread.join, CLOSE_SECONDS)

    def _add(self, target: _Target, pair: _Pair) -> None:
        """Have a pair written."""
        if self._thread is None:
            # A daemon, so that a hung disk can't keep the process from ending.
            self._thread = threading.Thread(target=self._work, name="shadow-pairs", daemon=True)
            self._thread.start()
        self._queue.put((target, pair))

    def _warn_once(self, key: str, message: str) -> None:
        """Log something that would otherwise be said again with each request."""
        if key not in self._warned:
            self._warned.add(key)
            logger.warning("shadow traffic: %s", message)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            self._write(*item)
            self._memory.give_back(item[1].held_bytes)
            del item  # else it stays until the next one comes

    def _write(self, target: _Target, pair: _Pair) -> None:
        try:
            _append(target, _line(pair))
        except OSError as exc:
            reason = exc.strerror or type(exc).__name__
            self._warn_once(str(target.path), f"pairs can't be written to {target.path}: {reason}")
        except Exception:
            logger.exception("unexpected error with a pair of shadow traffic")


def _append(target: _Target, line: bytes) -> None:
    """Add one line, or nothing at all."""
    with suppress(FileNotFoundError):
        size = target.path.stat().st_size
        if size and size + len(line) > target.max_bytes:
            target.path.replace(f"{target.path}.1")
    # Opened each time: whoever moves the file away or makes room finds a new one.
    descriptor = os.open(target.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        _write_whole(descriptor, line)
    finally:
        os.close(descriptor)


def _write_whole(descriptor: int, line: bytes) -> None:
    before = os.fstat(descriptor).st_size
    left = memoryview(line)
    try:
        while left:
            left = left[os.write(descriptor, left) :]
    except OSError:
        with suppress(OSError):
            os.ftruncate(descriptor, before)
        raise


def _line(pair: _Pair) -> bytes:
    """A pair as one line of JSON."""
    request = _parsed(pair.request.body)
    is_stream = isinstance(request, dict) and bool(request.get("stream"))
    told = {
        "request_id": _as_unicode(pair.request.request_id),
        "alias": pair.alias,
        "at": pair.at.isoformat(),
        "request": request,
        "live": {"variant": pair.request.variant} | _side(pair.live, is_stream=is_stream),
        "shadow": {"variant": pair.shadow_variant} | _side(pair.shadow, is_stream=False),
    }
    return to_json(told) + b"\n"


def _side(reply: _Reply, *, is_stream: bool) -> dict[str, object]:
    body = None if reply.body is None else _parsed(reply.body, is_stream=is_stream)
    told: dict[str, object] = {"status": reply.status, "body": body}
    return told if reply.seconds is None else told | {"seconds": round(reply.seconds, 6)}


def _parsed(body: bytes, *, is_stream: bool = False) -> object:
    """JSON where it is, else a stream's events, else text."""
    # An answer to a request for a stream may be an error, which is none.
    with suppress(ValueError):
        parsed: object = from_json(body, allow_inf_nan=False)
        return parsed
    return _events(body) if is_stream else body.decode(errors="replace")


def _events(body: bytes) -> list[object]:
    """The data of a stream's events, without the mark at its end."""
    text = body.decode(errors="replace").replace("\r\n", "\n").replace("\r", "\n")
    found = (_event_data(event) for event in text.split("\n\n"))
    return [_parsed(data.encode()) for data in found if data and data != "[DONE]"]


def _event_data(event: str) -> str:
    fields = (line.partition(":") for line in event.split("\n"))
    return "\n".join(value.removeprefix(" ") for name, _, value in fields if name == "data")


def _as_unicode(text: str) -> str:
    """A header's text may hold what is no Unicode."""
    return text.encode(errors="replace").decode()
