"""Passing an upstream's answer back as it comes, and telling the client when it breaks off.

An answer that has begun can't be asked for again and can't change its status. What remains is an
error event in an event stream, and a cut connection everywhere else: never a clean end.
"""

from __future__ import annotations

import logging
import socket
import struct
from typing import TYPE_CHECKING

import aiohttp
from aiohttp import web

from vllm_rvec.errors import UpstreamError
from vllm_rvec.router.headers import response_headers
from vllm_rvec.router.openai_errors import error_body, error_response
from vllm_rvec.router.sse import EventGate
from vllm_rvec.router.telemetry import Outcome

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from vllm_rvec.router.answers import Answer
    from vllm_rvec.router.exchange import Exchange
    from vllm_rvec.router.request import Request

__all__ = ["brief", "cut_off", "relay"]

logger = logging.getLogger("vllm_rvec.router")

WHOLE_BYTES = 64 * 2**10
"""Up to here an answer of a known length goes out in one piece: one write instead of two."""

BREAK_MESSAGE = "The engine broke off in the middle of its answer, which is incomplete."


async def relay(request: Request, answer: Answer) -> web.StreamResponse:
    """Send an answer's head, then its body as it comes.

    Args:
        request: The client's. Its exchange is told what passes, and how it ends.
        answer: The upstream's answer to it, its body unread.

    Returns:
        The response, already sent or cut off.
    """
    exchange = request.exchange
    exchange.begin(answer.status, answer.content_type)
    if answer.content_length and answer.content_length <= WHOLE_BYTES:
        return await _relay_whole(answer, exchange)
    response = web.StreamResponse(
        status=answer.status, reason=answer.reason, headers=response_headers(answer.headers)
    )
    if answer.content_type == "text/event-stream":
        # nginx would collect events into blocks of 4 KiB.
        response.headers["X-Accel-Buffering"] = "no"
    outcome = Outcome.CLIENT_GONE
    try:
        request.mark(response)
        await response.prepare(request)
        if _has_plain_events(answer):
            outcome = await _relay_events(request, response, answer)
        else:
            await _relay_bytes(response, answer, exchange)
            outcome = Outcome.COMPLETE
    except UpstreamError as exc:
        outcome = Outcome.BROKEN
        _log_break(exchange, exc)
        cut_off(request)
    except ConnectionError:
        # The client has gone, which is its right. Cancellation comes first as a rule.
        logger.debug("the client went away")
    finally:
        exchange.end(outcome)
    return response


def cut_off(request: Request) -> None:
    """Reset the client's connection, so that what it has can't pass for a whole answer.

    Args:
        request: The request whose answer has begun and can't be finished.
    """
    if request.transport is None:
        return  # the client was faster
    # To a client of HTTP/1.0, nginx among them, a plain end of the connection is the end of the
    # body. Lingering for 0 s makes it a reset.
    linger = struct.pack("ii", 1, 0)
    request.transport.get_extra_info("socket").setsockopt(
        socket.SOL_SOCKET, socket.SO_LINGER, linger
    )
    request.transport.abort()


def brief(error: Exception) -> str:
    """What went wrong, on one line, for the log.

    Never `repr`: aiohttp's ClientResponseError shows there the request's headers, keys included,
    and in `str` the address with its query.

    Args:
        error: What aiohttp raised.

    Returns:
        Its type and text.
    """
    text = error.message if isinstance(error, aiohttp.ClientResponseError) else str(error)
    return " ".join([f"{type(error).__name__}:", *text.split()])


def _has_plain_events(answer: Answer) -> bool:
    """Whether an event can be added at the end: not into gzip, nor beyond a promised length."""
    is_encoded = answer.headers.get("Content-Encoding", "identity") != "identity"
    is_open = answer.content_length is None
    return answer.content_type == "text/event-stream" and is_open and not is_encoded


async def _relay_whole(answer: Answer, exchange: Exchange) -> web.Response:
    """Send a small answer's head and body in one piece, once it is here."""
    outcome = Outcome.CLIENT_GONE
    headers = response_headers(answer.headers)
    try:
        body = await _whole(answer)
        exchange.pass_on(body)
        outcome = Outcome.COMPLETE
    except UpstreamError as exc:
        outcome = Outcome.BROKEN
        _log_break(exchange, exc)
        return error_response(502, BREAK_MESSAGE, code="upstream_broke_off")
    finally:
        exchange.end(outcome)
    headers.popall("Content-Length", None)  # aiohttp's own is the same
    return web.Response(status=answer.status, reason=answer.reason, headers=headers, body=body)


async def _relay_bytes(response: web.StreamResponse, answer: Answer, exchange: Exchange) -> None:
    async for chunk in _chunks(answer):
        exchange.pass_on(chunk)
        await response.write(chunk)


async def _relay_events(request: Request, response: web.StreamResponse, answer: Answer) -> Outcome:
    exchange, gate = request.exchange, EventGate()
    try:
        async for chunk in _chunks(answer):
            if events := gate.feed(chunk):
                exchange.pass_on(events)
                await response.write(events)
    except UpstreamError as exc:
        if not gate.is_between_events:
            raise
        _log_break(exchange, exc)
        await response.write(_break_event(request.path))
        return Outcome.BROKEN
    # What is held at a clean end is the upstream's own business: it goes on as it is.
    exchange.pass_on(gate.held)
    await response.write(gate.held)
    return Outcome.COMPLETE


async def _whole(answer: Answer) -> bytes:
    try:
        return await answer.read()
    except (aiohttp.ClientError, ConnectionError) as exc:
        raise UpstreamError(BREAK_MESSAGE, why=brief(exc)) from exc


async def _chunks(answer: Answer) -> AsyncIterator[bytes]:
    """The body as it comes. Only the upstream's failures become UpstreamError, not the client's."""
    while True:
        try:
            chunk = await answer.content.readany()
        except (aiohttp.ClientError, ConnectionError) as exc:
            raise UpstreamError(BREAK_MESSAGE, why=brief(exc)) from exc
        if not chunk:
            return
        yield chunk


def _break_event(path: str) -> bytes:
    """The event that tells a client that its answer is incomplete."""
    event = b"data: " + error_body(502, BREAK_MESSAGE, code="upstream_broke_off") + b"\n\n"
    # Anthropic's client passes over events without a name, so it would see a clean end. Others
    # get none: some OpenAI clients read only lines that begin with `data:`.
    return b"event: error\n" + event if path == "/v1/messages" else event


def _log_break(exchange: Exchange, error: UpstreamError) -> None:
    logger.warning("the engine of %s broke off: %s", exchange.variant, error.why)
