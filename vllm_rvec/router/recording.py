"""What becomes of a request that has ended: log line, metrics, access log, exposure."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from vllm_rvec.router.results import Exposure
from vllm_rvec.router.telemetry import AccessRecord, RequestLabels

if TYPE_CHECKING:
    from vllm_rvec.router.exchange import Exchange
    from vllm_rvec.router.request import Request
    from vllm_rvec.router.services import Services

__all__ = ["record"]

logger = logging.getLogger("vllm_rvec.router")

CLIENT_GONE = 499
"""nginx's status for the log when the client left before the answer; no client ever sees it."""


def record(services: Services, request: Request, status: int | None) -> None:
    """Note a request that has ended.

    Args:
        services: Where to.
        request: It.
        status: The answer's HTTP status; None where the client left before it began.
    """
    exchange = request.exchange
    seconds = time.perf_counter() - exchange.started
    if services.access_log is not None:
        services.access_log.write(_access_record(request, status, seconds))
    else:
        _log(request, status, seconds)
    _count(services, exchange, status)
    if services.results is not None and exchange.is_generating:
        _expose(services, exchange, seconds)


def _log(request: Request, status: int | None, seconds: float) -> None:
    """One line for people, where there is no access log."""
    logger.info(
        "%s %s %s %d %.1f ms",
        request.method,
        # The raw path: a decoded line break would forge a log line. No query: it may hold secrets.
        request.rel_url.raw_path,
        request.exchange.variant,
        CLIENT_GONE if status is None else status,
        seconds * 1000,
    )


def _count(services: Services, exchange: Exchange, status: int | None) -> None:
    choice = exchange.choice
    labels = RequestLabels()
    if choice is not None:
        labels = RequestLabels(choice.variant, choice.alias, choice.reason)
    if exchange.seen is not None and exchange.seen.outcome is not None:
        services.metrics.record(labels, exchange.seen)
    elif exchange.error is not None and status is not None:
        services.metrics.record_refusal(labels, status, exchange.error[0])
    elif status is None:
        services.metrics.record_gone(labels)


def _access_record(request: Request, status: int | None, seconds: float) -> AccessRecord:
    exchange = request.exchange
    seen, choice = exchange.seen, exchange.choice
    ttft = None if seen is None else seen.ttft_seconds
    return AccessRecord(
        exchange.request_id,
        request.method,
        request.rel_url.raw_path,
        status,
        seconds * 1000,
        variant=None if choice is None else choice.variant,
        alias=None if choice is None else choice.alias,
        reason=None if choice is None else choice.reason.value,
        alpha=exchange.alpha,
        key=None if exchange.client is None else exchange.client.name,
        ttft_ms=None if ttft is None else ttft * 1000,
        prompt_tokens=None if seen is None else seen.prompt_tokens,
        completion_tokens=None if seen is None else seen.completion_tokens,
        error=None if exchange.error is None else exchange.error[1],
        client=request.remote,
        traceparent=request.headers.get("traceparent"),
    )


def _expose(services: Services, exchange: Exchange, seconds: float) -> None:
    """Keep what was served: all that an engine answered, and why it was this variant."""
    seen, choice = exchange.seen, exchange.choice
    if services.results is None or seen is None or choice is None:
        return
    services.results.record(
        Exposure(
            exchange.request_id,
            time.time(),
            choice.alias or "",
            choice.variant,
            choice.reason.value,
            choice.unit,
            seen.status or 0,
            seen.has_error,
            seen.ttft_seconds if seen.is_stream else None,
            seconds,
            seen.prompt_tokens,
            seen.completion_tokens,
            exchange.body,
        )
    )
