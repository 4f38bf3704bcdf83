"""Passing one request on to its variant's upstream; `relay.py` brings the answer back.

Bodies, paths and queries go through as they came; of the headers, only those of the connection
itself are dropped (`headers.py`). Picking among variants by weight, shadow traffic and metrics
are not here: this module does what the request's `model` says.
"""

from __future__ import annotations

import io
import logging
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import aiohttp
from aiohttp import web
from pydantic import BaseModel, JsonValue, ValidationError
from yarl import URL

from vllm_rvec.errors import UpstreamError
from vllm_rvec.router.alphas import settle
from vllm_rvec.router.headers import request_headers
from vllm_rvec.router.openai_errors import RequestRefusedError
from vllm_rvec.router.relay import brief, relay
from vllm_rvec.router.variants import VariantDownError, names_there_are

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from vllm_rvec.router.variants import VariantTable

__all__ = ["ALPHA", "MAX_BODY_BYTES", "REQUEST_ID", "VARIANT", "Proxy", "create_client"]

logger = logging.getLogger("vllm_rvec.router")

VARIANT = web.RequestKey("VARIANT", str)
"""The variant that a request asks for; absent until it is known to exist."""

ALPHA = web.RequestKey("ALPHA", str)
"""The alphas that a request has while it is under way; absent where they are not known."""

ENGINE_HEADERS: web.RequestKey[Mapping[str, str | None]] = web.RequestKey("ENGINE_HEADERS", dict)
"""What the engine is sent in place of the client's headers of these names."""

REQUEST_ID = web.RequestKey("REQUEST_ID", str)
"""The client's `X-Request-Id`, or the one made for it."""

MAX_BODY_BYTES = 64 * 2**20
"""Room for the base64 images of a multimodal request."""

IDLE_CONNECTION_SECONDS = 3.0
"""vLLM closes a connection after 5 s without a request (VLLM_HTTP_TIMEOUT_KEEP_ALIVE). A pool that
keeps it longer sends requests into connections that are just being closed."""

CONNECT_SECONDS = 5.0

CONNECTION_ERRORS = (aiohttp.ClientConnectionError,)
"""Nothing of an answer has come: refused, reset, closed, or not connected in time."""


def create_client(*, is_pooled: bool = True) -> aiohttp.ClientSession:
    """The session that requests go to upstreams with. Call it in a running event loop.

    It adds nothing of its own: no cookies, no compression, no default headers, no limit on the
    time an answer takes or on how many requests are under way.

    Args:
        is_pooled: Whether connections are kept for the next request.

    Returns:
        The session; the caller closes it, after the server that uses it.
    """
    # 0 is aiohttp's word for no limit: engines queue requests themselves, and better.
    if is_pooled:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_CONNECTION_SECONDS)
    else:
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
    return aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_SECONDS),
        # One client's cookies must not travel with another's request.
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
    )


class Proxy:
    """Forwards requests to the upstream of the variant that they name.

    Args:
        variants: Who answers for which name.
        client: What requests are sent with.
    """

    def __init__(self, variants: VariantTable, client: aiohttp.ClientSession) -> None:
        self._variants = variants
        self._client = client

    async def forward(self, request: web.Request) -> web.StreamResponse:
        """Pass a request on and its answer back, as it comes.

        Args:
            request: Any POST with `model` in a JSON body.

        Returns:
            The upstream's answer, already sent.

        Raises:
            RequestRefusedError: If the body is too large, doesn't say which model, or asks for
                alphas that it can't have.
            UnknownVariantError: If there is no such variant.
            VariantDownError: If the variant can't answer now.
            HeldTooLongError: If its weights are being changed, and that takes long.
            UpstreamError: If the upstream fails before it answers.
        """
        body = await _read_body(request)
        asked = self._read(body)
        name = request[VARIANT] = asked.model
        async with self._variants.gate(name).enter():
            # They can't change while this request is under way.
            settled = settle(self._variants, name, asked.alpha, request.headers)
            request[ENGINE_HEADERS] = settled.engine_headers
            if settled.said is not None:
                request[ALPHA] = settled.said
            async with self._answer(request, body) as answer:
                return await relay(request, answer, name)

    def _read(self, body: bytes) -> _Routing:
        """What a body asks for; the variant is there, ready or not."""
        hint = names_there_are(self._variants.names(), self._variants.alpha_range)
        asked = _read_routing(body, hint)
        if not self._variants.has(asked.model):
            raise self._variants.unknown(asked.model)
        return asked

    @asynccontextmanager
    async def _answer(
        self, request: web.Request, body: bytes
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The upstream's answer, its body still to come. Leaving it early aborts generation."""
        async with AsyncExitStack() as resources:
            try:
                answer = await self._send(self._client, request, body)
            except CONNECTION_ERRORS as exc:
                # Most often a pooled connection that the engine closed while the request was on
                # its way. Another pooled one may be as stale, so the second try opens its own.
                logger.info("trying %s again: %s", request[VARIANT], brief(exc))
                fresh = await resources.enter_async_context(create_client(is_pooled=False))
                answer = await self._send_last(fresh, request, body)
            resources.callback(answer.close)
            yield answer

    async def _send_last(
        self, client: aiohttp.ClientSession, request: web.Request, body: bytes
    ) -> aiohttp.ClientResponse:
        """Send without another try behind it."""
        name = request[VARIANT]
        try:
            return await self._send(client, request, body)
        except CONNECTION_ERRORS as exc:
            logger.warning("can't reach the engine of %s: %s", name, brief(exc))
            # By now the variant may be known to be down: that answer says why. If not, it soon
            # will be: what is left of a killed engine takes seconds to clear away.
            self._variants.find(name)
            raise VariantDownError(name, "its engine can't be reached") from exc

    async def _send(
        self, client: aiohttp.ClientSession, request: web.Request, body: bytes
    ) -> aiohttp.ClientResponse:
        """Send the request to whoever answers for its variant now."""
        upstream = self._variants.find(request[VARIANT])
        url = URL(upstream.base_url.rstrip("/") + request.rel_url.raw_path_qs, encoded=True)
        try:
            return await client.post(
                url,
                # BytesIO goes out in pieces; 64 MiB of bytes would hold up the event loop.
                data=io.BytesIO(body),
                headers=request_headers(
                    request.headers, upstream, request[REQUEST_ID], request[ENGINE_HEADERS]
                ),
                allow_redirects=False,
            )
        except CONNECTION_ERRORS:
            raise
        except aiohttp.ClientError as exc:
            logger.warning("no HTTP from the engine of %s: %s", request[VARIANT], brief(exc))
            raise UpstreamError(
                f"The engine of `{request[VARIANT]}` answered with something that is not HTTP."
            ) from exc


class _Routing(BaseModel):
    """What the router reads of a body; the rest is the engine's business."""

    model: str
    alpha: JsonValue = None


async def _read_body(request: web.Request) -> bytes:
    if (request.content_length or 0) > MAX_BODY_BYTES:
        raise web.HTTPRequestEntityTooLarge(MAX_BODY_BYTES)
    if "Content-Encoding" in request.headers:
        raise RequestRefusedError(
            415,
            "The router reads `model` from the body, which must not be compressed.",
            code="unsupported_content_encoding",
            fix="Send it without Content-Encoding.",
        )
    try:
        return await request.read()
    except web.RequestPayloadError as exc:
        raise RequestRefusedError(
            400, "The body did not arrive as its headers say.", code="invalid_body"
        ) from exc


def _read_routing(body: bytes, fix: str) -> _Routing:
    """Find the name of the variant, and the alphas, if any."""
    try:
        return _Routing.model_validate_json(body)
    except ValidationError as exc:
        # The input stays out of it: it may be 64 MiB, and it is the client's own.
        problem = exc.errors(include_url=False, include_context=False, include_input=False)[0]
    match problem["type"]:
        case "json_invalid":
            raise RequestRefusedError(400, f"{problem['msg']}.", code="invalid_json")
        case "missing":
            what = "The body doesn't say which `model` to ask."
            raise RequestRefusedError(400, what, code="missing_model", param="model", fix=fix)
        case "string_type":
            what = "`model` must be a string."
            raise RequestRefusedError(400, what, code="invalid_model", param="model", fix=fix)
        case _:
            raise RequestRefusedError(
                400, "The body must be a JSON object.", code="invalid_json", fix=fix
            )
