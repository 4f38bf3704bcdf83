"""Sending a request to one of a variant's upstreams, and to others while none has answered.

Only before an answer begins: what has begun can't be asked for again. Not here: which variant that
is (`policy`), and what happens to the answer (`relay`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import aiohttp
from aiohttp.http import HttpProcessingError

from vllm_rvec.errors import UpstreamError
from vllm_rvec.router.answers import TIMEOUT, Origin
from vllm_rvec.router.relay import brief
from vllm_rvec.router.variants import UNREACHABLE, VariantDownError

if TYPE_CHECKING:
    from collections.abc import Callable

    from multidict import CIMultiDict

    from vllm_rvec.router.answers import Answer
    from vllm_rvec.router.held import Held
    from vllm_rvec.router.telemetry import Metrics
    from vllm_rvec.router.upstreams import Upstream
    from vllm_rvec.router.variants import VariantTable

__all__ = ["CONNECTION_ERRORS", "Message", "Sender", "create_client"]

logger = logging.getLogger("vllm_rvec.router")

IDLE_CONNECTION_SECONDS = 3.0
"""vLLM closes a connection after 5 s without a request (VLLM_HTTP_TIMEOUT_KEEP_ALIVE). A pool that
keeps it longer sends requests into connections that are just being closed."""

CONNECTION_ERRORS = (aiohttp.ClientConnectionError,)
"""Nothing of an answer has come: refused, reset, closed, or not connected in time."""

ABSENT = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
"""There is not even a connection: no pooled one can be to blame."""

MAX_ORIGINS = 4096

MAX_TRIES = 4
"""How often a request is sent at most inside its variant."""


def create_client() -> aiohttp.ClientSession:
    """The session whose connections requests go to upstreams over. Call it in an event loop.

    It adds nothing of its own: no cookies, no compression, no default headers, no limit on the
    time an answer takes or on how many requests are under way.

    Returns:
        The session; the caller closes it, after the server that uses it.
    """
    return aiohttp.ClientSession(
        # 0 is aiohttp's word for no limit: engines queue requests themselves, and better.
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_CONNECTION_SECONDS),
        timeout=TIMEOUT,
        # One client's cookies must not travel with another's request.
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
    )


@dataclass(frozen=True, slots=True)
class Message:
    """What is sent, whichever upstream gets it."""

    method: str
    path: str
    body: bytes
    headers: Callable[[Upstream], CIMultiDict[str]]


class Sender:
    """Sends to upstreams.

    Args:
        variants: Who answers for which name.
        client: What requests are sent with.
        metrics: Told of each further try.
    """

    def __init__(
        self, variants: VariantTable, client: aiohttp.ClientSession, metrics: Metrics
    ) -> None:
        self._variants = variants
        self._client = client
        self._metrics = metrics
        self._origins: dict[str, Origin] = {}
        self._unpooled: aiohttp.BaseConnector | None = None

    async def send(
        self,
        held: Held,
        variant: str,
        message: Message,
        pinned: Upstream | None = None,
    ) -> tuple[Answer, Upstream]:
        """Send to one of a variant's upstreams, and to others while none has answered.

        Args:
            held: Keeps the answer; leaving it early aborts generation.
            variant: Who is asked.
            message: What is asked.
            pinned: The only upstream that can answer.

        Returns:
            The answer, its body still to come, and whose it is.

        Raises:
            VariantDownError: None can be reached.
            UpstreamError: One answers with something that is not HTTP.
        """
        tried: list[Upstream] = []
        connector = None
        for tries_left in reversed(range(MAX_TRIES)):
            upstream = pinned or self._variants.find(variant, tried=tried)
            if tried:
                self._metrics.record_retry(variant)
            try:
                answer = await self.send_to(upstream, message, connector)
            except CONNECTION_ERRORS as exc:
                # On a connection of its own: the request itself may be what ends engines.
                is_ended = connector is not None and not isinstance(exc, ABSENT)
                is_again = is_ended or upstream in tried
                if self._note_failure(variant, upstream, exc, is_again=is_again) or is_ended:
                    break
                # Most often a pooled connection that the engine closed while the request was on
                # its way. Another pooled one may be as stale, so the next try opens its own.
                connector = self._fresh()
            else:
                is_last = pinned is not None or not tries_left
                if answer.status != 503 or is_last or not self._others(variant, upstream, tried):
                    held.add(partial(self.let_go, upstream, answer))
                    return answer, upstream
                # At once: the request may go on for minutes elsewhere.
                self.let_go(upstream, answer)
            tried.append(upstream)
        # By now the variant may be known to be down: that answer says why. If not, it soon will
        # be: what is left of a killed engine takes seconds to clear away.
        self._variants.find(variant)
        raise VariantDownError(variant, UNREACHABLE)

    def _others(self, variant: str, upstream: Upstream, tried: list[Upstream]) -> bool:
        """Whether there are upstreams that are well and not asked yet."""
        others = [u for u in self._variants.upstreams(variant) if u not in (*tried, upstream)]
        return self._variants.load.least_busy(others) is not None

    def _note_failure(
        self, variant: str, upstream: Upstream, error: Exception, *, is_again: bool
    ) -> bool:
        """Take in that an upstream was not reached; tells whether to give the request up."""
        is_absent = isinstance(error, ABSENT)
        if not is_again and not is_absent:
            logger.info("trying %s again: %s", variant, brief(error))
            return False
        logger.warning("can't reach the engine of %s: %s", variant, brief(error))
        self._variants.load.note_failure(upstream)
        return self._variants.load.least_busy(self._variants.upstreams(variant)) is None

    async def send_to(
        self,
        upstream: Upstream,
        message: Message,
        connector: aiohttp.BaseConnector | None = None,
    ) -> Answer:
        """Send to one upstream. The caller lets go of the answer (`let_go`).

        Args:
            upstream: Who is asked.
            message: What is asked.
            connector: Another one than the usual, which keeps connections for the next request.

        Raises:
            UpstreamError: It answers with something that is not HTTP.
            ClientConnectionError: It can't be reached.
        """
        load = self._variants.load
        load.begin(upstream)
        try:
            return await self._origin(upstream).ask(
                connector or self._pool(),
                message.method,
                message.path,
                message.headers(upstream),
                message.body,
            )
        except (HttpProcessingError, aiohttp.ClientPayloadError) as exc:
            load.end(upstream)
            logger.warning("no HTTP from %s: %s", upstream.base_url, brief(exc))
            raise UpstreamError("The engine answered with something that is not HTTP.") from exc
        except BaseException:
            load.end(upstream)
            raise

    def let_go(self, upstream: Upstream, answer: Answer) -> None:
        """Have done with an answer; one that has not ended is aborted."""
        answer.close()
        self._variants.load.end(upstream)

    async def aclose(self) -> None:
        """Close what was opened here."""
        if self._unpooled is not None:
            await self._unpooled.close()

    def _origin(self, upstream: Upstream) -> Origin:
        origin = self._origins.get(upstream.base_url)
        if origin is None:
            if len(self._origins) >= MAX_ORIGINS:  # configurations came and went
                self._origins.clear()
            origin = self._origins[upstream.base_url] = Origin(upstream.base_url, self._client)
        return origin

    def _pool(self) -> aiohttp.BaseConnector:
        """Where connections are kept for the next request."""
        connector = self._client.connector
        if connector is None:
            raise aiohttp.ClientConnectionError("the router is stopping")
        return connector

    def _fresh(self) -> aiohttp.BaseConnector:
        """What opens a connection for each request."""
        if self._unpooled is None:
            self._unpooled = aiohttp.TCPConnector(limit=0, force_close=True)
        return self._unpooled
