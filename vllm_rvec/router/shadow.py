"""A sampled copy of an alias's traffic for another variant; nobody waits for its reply.

The copy must never cost the live request anything: offering one parses and sends nothing, and when
the shadow's engine is slow, hung or down, copies are dropped and counted. Replies are thrown away,
or kept with the live ones as pairs (`shadow_pairs`). Not here: which aliases have a shadow
(`config`), and how a copy reaches an engine (`send`).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import aiohttp
from pydantic import Field
from pydantic_core import from_json, to_json

from vllm_rvec.errors import RvecError
from vllm_rvec.router.settings import PathText, Settings
from vllm_rvec.router.shadow_pairs import PairWriter, ShadowRequest, Ticket
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
"""The largest request that is copied."""

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

    record: PathText | None = None
    """A JSONL file for pairs of the live and the shadow's reply, prompts included; off by
    default."""

    max_record_mib: Annotated[int, Field(ge=1)] = 512
    """At this size the file becomes NAME.1, in place of an earlier one, and begins anew."""


OnResult = Callable[[str, str, ShadowResult], None]
"""`on_result(alias, variant, result)`."""


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
        self._pairs = PairWriter()
        self._is_closed = False

    def offer(self, alias: str, config: ShadowConfig, request: ShadowRequest) -> Ticket | None:
        """Copy a live request, perhaps. Parses nothing, never waits, never raises.

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
        await self._pairs.aclose()

    def _make_ticket(
        self, alias: str, config: ShadowConfig, request: ShadowRequest
    ) -> Ticket | None:
        if config.record is None:
            return None
        max_bytes = config.max_record_mib * 2**20
        return self._pairs.begin(alias, request, config.variant, Path(config.record), max_bytes)

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
