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
from vllm_rvec.router.variants import UnknownVariantError, VariantDownError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["RequestRefusedError", "answer_error", "error_body", "error_response"]

SHOWN_PROBLEMS = 3

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
    kind = "server_error" if status >= 500 else "invalid_request_error"
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
        404 for an unknown variant, 503 for one that is down or changes for too long, 502 for an
        upstream that failed, 409 for a change of alpha that was not begun, the error's own status
        for a refused request, otherwise 500.
    """
    message = " ".join(part for part in (error.what, _why(error), error.fix) if part)
    match error:
        case RequestRefusedError(status=status, code=code, param=param):
            return error_response(status, message, code=code, param=param)
        case AlphaChangeRefusedError():
            problems = "".join(f" {problem}." for problem in error.problems[:SHOWN_PROBLEMS])
            return error_response(409, message + problems, code="alpha_change_refused")
        case _:
            status, code, param = _status_of(error)
            headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status == 503 else None
            return error_response(status, message, code=code, param=param, headers=headers)


def _status_of(error: RvecError) -> tuple[int, str, str | None]:
    """The HTTP status, and OpenAI's code and param."""
    match error:
        case UnknownVariantError():
            return 404, "model_not_found", "model"
        case VariantDownError():
            return 503, "model_down", "model"
        case HeldTooLongError():
            return 503, "model_changing", "model"
        case UpstreamError():
            return 502, "upstream_error", None
        case AlphaChangeFailedError():
            return 500, "alpha_change_failed", None
        case _:
            return 500, "internal_error", None


def _why(error: RvecError) -> str:
    return f"Why: {error.why.rstrip('.')}." if error.why else ""
