"""A sampled copy of an alias's traffic for another variant; nobody waits for its reply.

The copy must never cost the live request anything: offering one is a few microseconds, and when
the shadow's engine is slow, hung or down, copies are dropped and counted. Replies are thrown away,
or kept with the live ones as pairs for an offline comparison (`_PairWriter`, a thread of its own).
Not here: which aliases have a shadow (`config`), and how a copy reaches an engine (`send`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import aiohttp
from pydantic import Field
from pydantic_core import from_json, to_json

from vllm_rvec.errors import RvecError
from vllm_rvec.router.settings import Settings
from vllm_rvec.router.telemetry import ShadowResult
from vllm_rvec.vector.dial import ALPHA_KEY

__all__ = [
    "SHADOWED_PATHS",
    "ShadowConfig",
    "ShadowRequest",
    "ShadowResult",
    "ShadowTraffic",
    "Ticket",
]

logger = logging.getLogger("vllm_rvec.router")

RESPONSES_PATH = "/v1/responses"

SHADOWED_PATHS = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/messages", RESPONSES_PATH}
)
"""Paths that generate. Of the last, requests that write or need an engine's state are left out."""

STATEFUL_FIELDS = ("store", "previous_response_id", "background")
"""What makes a request of `/v1/responses` depend on what one engine keeps, where it is set."""

MAX_BODY_BYTES = 2**20
"""The largest request that is copied, and the largest reply that is kept in a pair."""

PAIR_MEMORY_BYTES = 64 * 2**20
"""What all unfinished and unwritten pairs hold together; further ones are not kept."""

PAIR_OVERHEAD_BYTES = 2048
"""What a pair holds beside its texts."""

CLOSE_SECONDS = 5.0
"""What the last pairs get to reach the disk."""

MIB = 2**20

SendCopy = Callable[[str, str, bytes, Mapping[str, str]], Awaitable[tuple[int, bytes]]]
"""`send(variant, path, body, headers)`, which gives status and body."""


class ShadowConfig(Settings):
    """A copy of an alias's traffic for another variant."""

    variant: Annotated[str, Field(min_length=1)]
    """Who gets the copy."""

    share: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    """Which part of the alias's requests is copied."""

    queue: Annotated[int, Field(ge=1)] = 64
    """How many copies may wait or be under way; more are dropped, and counted."""

    concurrency: Annotated[int, Field(ge=1)] = 4
    """How many are under way at once."""

    timeout_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0
    """How long the shadow may take for its reply."""

    record: Annotated[str, Field(min_length=1)] | None = None
    """A JSONL file for pairs of the live and the shadow's reply, prompts included; off by
    default."""

    max_record_mib: Annotated[int, Field(ge=1)] = 512
    """At this size the file becomes NAME.1, in place of an earlier one, and begins anew."""


OnResult = Callable[[str, str, ShadowResult], None]
"""`on_result(alias, variant, result)`."""


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

    `live` takes a whole one. A stream is fed by `chunk` and ended by `done`. All of them return at
    once and raise nothing. A ticket that is let go without either leaves no pair.
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

    def live(self, status: int, body: bytes | None) -> None:
        """Hand in the whole live reply.

        Args:
            status: Its HTTP status.
            body: Its body, not compressed; None where it isn't known. Beyond 1 MiB it isn't kept.
        """
        if self._is_wanted and self._live is None:
            self._live = _Reply(status, None if body is None else self._kept(body))
            self._finish()

    def chunk(self, data: bytes) -> None:
        """Hand in the next bytes of the live reply.

        Args:
            data: As they came. Beyond 1 MiB in all none are kept.
        """
        if self._fed is None or not self._is_wanted:
            return
        if len(self._fed) + len(data) <= MAX_BODY_BYTES and self._hold(len(data)):
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
        return body if len(body) <= MAX_BODY_BYTES and self._hold(len(body)) else None

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
class _Copy:
    """One request that waits for its turn."""

    config: ShadowConfig
    path: str
    body: bytes
    headers: Mapping[str, str]
    ticket: Ticket | None


@dataclass(slots=True)
class _Lane:
    """One alias's copies."""

    waiting: deque[_Copy] = field(default_factory=deque)
    held: int = 0
    """Copies that wait or are under way."""
    workers: int = 0
    concurrency: int = 1


class ShadowTraffic:
    """Copies requests to the shadows of their aliases. Belongs to one event loop.

    Args:
        send: Brings a copy to its variant's engine and the reply back. It may raise or hang.
        on_result: Told of each copy what became of it. It must not raise.
        rng: Who is copied; a seam for tests.
    """

    def __init__(
        self, send: SendCopy, on_result: OnResult, *, rng: random.Random | None = None
    ) -> None:
        self._send = send
        self._on_result = on_result
        self._rng = rng or random.SystemRandom()
        self._lanes: dict[str, _Lane] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._memory = _Memory(PAIR_MEMORY_BYTES)
        self._writer = _PairWriter(self._memory)
        self._is_closed = False

    def offer(self, alias: str, config: ShadowConfig, request: ShadowRequest) -> Ticket | None:
        """Copy a live request, perhaps. Takes microseconds, never waits, never raises.

        Args:
            alias: The name that the client asked for.
            config: The alias's shadow.
            request: The live request.

        Returns:
            Where to hand in the live reply; None where nobody wants it.
        """
        if (
            self._is_closed
            or request.path.partition("?")[0] not in SHADOWED_PATHS
            or self._rng.random() >= config.share
        ):
            return None
        lane = self._lanes.setdefault(alias, _Lane())
        if len(request.body) > MAX_BODY_BYTES or lane.held >= config.queue:
            self._on_result(alias, config.variant, ShadowResult.DROPPED)
            return None
        ticket = self._make_ticket(alias, config, request)
        copy = _Copy(config, request.path, request.body, _copied_headers(request), ticket)
        lane.waiting.append(copy)
        lane.held += 1
        lane.concurrency = config.concurrency
        self._start_worker(alias, lane)
        return ticket

    def reconfigure(self, configs: Mapping[str, ShadowConfig]) -> None:
        """Drop the copies that wait for a shadow which is no more. What runs goes on.

        Args:
            configs: Each alias's shadow from now on.
        """
        for alias, lane in self._lanes.items():
            shadow = configs.get(alias)
            for _ in range(len(lane.waiting)):
                copy = lane.waiting.popleft()
                if shadow is not None and shadow.variant == copy.config.variant:
                    lane.waiting.append(copy)
                else:
                    if copy.ticket is not None:
                        copy.ticket.discard()
                    self._settle(alias, lane, copy, ShadowResult.DROPPED)

    async def aclose(self) -> None:
        """Cancel what runs, forget what waits, and write the pairs that are whole."""
        self._is_closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._lanes.clear()
        await self._writer.aclose()

    def _make_ticket(
        self, alias: str, config: ShadowConfig, request: ShadowRequest
    ) -> Ticket | None:
        if config.record is None:
            return None
        target = _Target(Path(config.record), config.max_record_mib * MIB)
        ticket = Ticket(
            alias,
            request,
            config.variant,
            self._memory,
            lambda pair: self._writer.add(target, pair),
        )
        if ticket.is_wanted:
            return ticket
        self._writer.warn_once("memory", "some pairs are not kept: too many are unfinished")
        return None

    def _start_worker(self, alias: str, lane: _Lane) -> None:
        if lane.workers < lane.concurrency:
            lane.workers += 1
            task = asyncio.create_task(self._work(alias, lane))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _work(self, alias: str, lane: _Lane) -> None:
        """Send what waits, one after the other, until nothing does."""
        try:
            while lane.waiting and lane.workers <= lane.concurrency:
                copy = lane.waiting.popleft()
                self._settle(alias, lane, copy, await self._exchange(copy))
        finally:
            lane.workers -= 1

    def _settle(self, alias: str, lane: _Lane, copy: _Copy, result: ShadowResult | None) -> None:
        """Make room for another copy, and tell what became of this one."""
        lane.held -= 1
        if result is not None:
            self._on_result(alias, copy.config.variant, result)

    async def _exchange(self, copy: _Copy) -> ShadowResult | None:
        """Send one copy and see to its reply."""
        started = time.perf_counter()
        result, answer = await self._ask(copy)
        if copy.ticket is None:
            return result
        if answer is None:
            copy.ticket.discard()
        else:
            copy.ticket.shadow(*answer, time.perf_counter() - started)
        return result

    async def _ask(self, copy: _Copy) -> tuple[ShadowResult | None, tuple[int, bytes] | None]:
        """What became of a copy, None where it turned out to be none to send; and the reply."""
        variant = copy.config.variant
        try:
            if (body := _copied_body(copy)) is None:
                return None, None
            async with asyncio.timeout(copy.config.timeout_seconds):
                answer = await self._send(variant, copy.path, body, copy.headers)
        except TimeoutError:
            return ShadowResult.TIMED_OUT, None
        except (RvecError, aiohttp.ClientError, OSError) as exc:
            logger.debug("a copy for %s failed: %s", variant, type(exc).__name__)
            return ShadowResult.FAILED, None
        except Exception:
            logger.exception("unexpected error with a copy for %s", variant)
            return ShadowResult.FAILED, None
        return ShadowResult.SENT if answer[0] < 400 else ShadowResult.FAILED, answer


def _copied_headers(request: ShadowRequest) -> Mapping[str, str]:
    """What the shadow's engine is sent: nothing of the client's that could bill or name it."""
    passed = {"X-Request-Id": f"{request.request_id}-shadow"}
    passed["Content-Type"] = request.headers.get("Content-Type", "application/json")
    if (parent := request.headers.get("traceparent")) is not None:
        passed["traceparent"] = parent
    return passed


def _copied_body(copy: _Copy) -> bytes | None:
    """The body for the shadow; None where the request leans on what an engine keeps."""
    asked = from_json(copy.body)
    if not isinstance(asked, dict):
        return None
    if copy.path.partition("?")[0] == RESPONSES_PATH:
        if any(asked.get(name) for name in STATEFUL_FIELDS):
            return None
        # Left out, it would be true.
        asked["store"] = False
    asked |= {"model": copy.config.variant, "stream": False}
    asked.pop("stream_options", None)
    _leave_alpha_to_the_name(asked)
    return to_json(asked)


def _leave_alpha_to_the_name(asked: dict[str, object]) -> None:
    """Take out the live request's alpha: a dial would heed it before the shadow's name."""
    asked.pop(ALPHA_KEY, None)
    if isinstance(more := asked.get("vllm_xargs"), dict):
        more.pop(ALPHA_KEY, None)


@dataclass(frozen=True, slots=True)
class _Target:
    """Where pairs go."""

    path: Path
    max_bytes: int


class _PairWriter:
    """Writes pairs, in a thread: neither a slow disk nor large JSON holds up the event loop."""

    def __init__(self, memory: _Memory) -> None:
        self._memory = memory
        # What waits in it is bounded by the pairs' memory.
        self._queue: queue.SimpleQueue[tuple[_Target, _Pair] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._warned: set[str] = set()

    def add(self, target: _Target, pair: _Pair) -> None:
        """Have a pair written."""
        if self._thread is None:
            # A daemon, so that a hung disk can't keep the process from ending.
            self._thread = threading.Thread(target=self._work, name="shadow-pairs", daemon=True)
            self._thread.start()
        self._queue.put((target, pair))

    def warn_once(self, key: str, message: str) -> None:
        """Log something that would otherwise be said again with each request."""
        if key not in self._warned:
            self._warned.add(key)
            logger.warning("shadow traffic: %s", message)

    async def aclose(self) -> None:
        """Write what was added, if that takes no longer than a few seconds."""
        if self._thread is not None:
            self._queue.put(None)
            await asyncio.to_thread(self._thread.join, CLOSE_SECONDS)

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
            self.warn_once(str(target.path), f"pairs can't be written to {target.path}: {reason}")
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
        "request_id": _printable(pair.request.request_id),
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


def _printable(text: str) -> str:
    """A header's text may hold what is no Unicode."""
    return text.encode(errors="replace").decode()
