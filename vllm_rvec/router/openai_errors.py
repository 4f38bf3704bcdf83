"""OpenAI's error body: the one place that makes it, and the statuses of our own errors.

Clients read `{"error": {"message", "type", "param", "code"}}` and raise by the HTTP status.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from aiohttp import web

from vllm_rvec.errors import (
    AlphaChangeFailedError,
    AlphaChangeRefusedError,
    RvecError,
    UpstreamError,
)
from vllm_rvec.router.gate import HeldTooLongError
from vllm_rvec.router.limits import RateLimitedError, VariantBusyError
from vllm_rvec.router.results import ResultsUnavailableError
from vllm_rvec.router.telemetry import ErrorKind
from vllm_rvec.router.variants import UnknownAliasError, UnknownVariantError, VariantDownError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "RequestRefusedError",
    "answer_error",
    "code_of",
    "error_body",
    "error_response",
    "kind_of",
]

SHOWN_PROBLEMS = 3

KINDS = {429: "rate_limit_error"}

RETRY_AFTER_SECONDS = 5
"""When a client may ask again for a variant that is down. An engine takes about 30 s to start, and
OpenAI's client tries three times in all: much shorter would use them up for nothing."""


class RequestRefusedError(RvecError):
    """A request that the router can't pass on.

    Args:
        status: The HTTP status to answer with.
        what: What is wrong with the request.
        code: OpenAI's machine-readable reason.
        param: The field of the body concerned.
        fix: What the client can do.
    """

    def __init__(
        self, status: int, what: str, *, code: str, param: str | None = None, fix: str = ""
    ) -> None:
        self.status = status
        self.code = code
        self.param = param
        super().__init__(what, fix=fix)


def error_body(status: int, message: str, *, code: str, param: str | None = None) -> bytes:
    """OpenAI's error object, as JSON on one line.

    Args:
        status: The HTTP status that goes with it; decides between client's and server's fault.
        message: What a person reads.
        code: What a program reads.
        param: The field of the request concerned.

    Returns:
        UTF-8 without a line break, so that it fits behind `data:`.
    """
    kind = "server_error" if status >= 500 else KINDS.get(status, "invalid_request_error")
    error = {"message": message, "type": kind, "param": param, "code": code}
    return json.dumps({"error": error}).encode()


def error_response(
    status: int,
    message: str,
    *,
    code: str,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> web.Response:
    """An HTTP answer with OpenAI's error body.

    Args:
        status: The HTTP status.
        message: What a person reads.
        code: What a program reads.
        param: The field of the request concerned.
        headers: More response headers.

    Returns:
        The response, not yet sent.
    """
    return web.Response(
        status=status,
        body=error_body(status, message, code=code, param=param),
        content_type="application/json",
        headers=headers,
    )


def answer_error(error: RvecError) -> web.Response:
    """The HTTP answer to one of our own errors.

    Args:
        error: What a handler raised.

    Returns:
        404 for an unknown variant, 503 for one that is down, busy or changes for too long, 429 for
        a key that asks too much, 502 for an upstream that failed, 409 for a change of alpha that
        was not begun, the error's own status for a refused request, otherwise 500.
    """
    status, code, param = _status_of(error)
    problems = "".join(f" {problem}." for problem in error.problems[:SHOWN_PROBLEMS])
    message = " ".join(part for part in (error.what, _why(error), error.fix) if part) + problems
    return error_response(status, message, code=code, param=param, headers=_retry(error, status))


def code_of(error: RvecError) -> str:
    """OpenAI's machine-readable reason."""
    return _status_of(error)[1]


def kind_of(error: RvecError) -> ErrorKind:
    """What an error is counted as."""
    match error:
        case RateLimitedError():
            return ErrorKind.RATE_LIMITED
        case VariantBusyError():
            return ErrorKind.BUSY
        case VariantDownError() | HeldTooLongError():
            return ErrorKind.DOWN
        case UpstreamError():
            return ErrorKind.UPSTREAM
        case _:
            is_ours = _status_of(error)[0] >= 500
            return ErrorKind.INTERNAL if is_ours else ErrorKind.REFUSED


def _retry(error: RvecError, status: int) -> Mapping[str, str] | None:
    """When to ask again, where that may help."""
    if isinstance(error, RateLimitedError | VariantBusyError):
        return {"Retry-After": str(error.retry_after_seconds)}
    return {"Retry-After": str(RETRY_AFTER_SECONDS)} if status == 503 else None


STATUSES: Mapping[type[RvecError], tuple[int, str, str | None]] = {
    UnknownVariantError: (404, "model_not_found", "model"),
    UnknownAliasError: (404, "alias_not_found", None),
    AlphaChangeRefusedError: (409, "alpha_change_refused", None),
    AlphaChangeFailedError: (500, "alpha_change_failed", None),
    VariantDownError: (503, "model_down", "model"),
    HeldTooLongError: (503, "model_changing", "model"),
    ResultsUnavailableError: (503, "results_unavailable", None),
    UpstreamError: (502, "upstream_error", None),
}
"""HTTP status, and OpenAI's code and param; the first kind that fits counts."""


def _status_of(error: RvecError) -> tuple[int, str, str | None]:
    if isinstance(error, RequestRefusedError):
        return error.status, error.code, error.param
    if isinstance(error, RateLimitedError | VariantBusyError):
        return error.status, error.code, None
    found = (said for kind, said in STATUSES.items() if isinstance(error, kind))
    return next(found, (500, "internal_error", None))


def _why(error: RvecError) -> str:
    return f"Why: {error.why.rstrip('.')}." if error.why else ""
