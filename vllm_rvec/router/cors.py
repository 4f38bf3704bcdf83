"""Which web pages may ask from a browser (CORS); none unless configured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import hdrs, web

if TYPE_CHECKING:
    from collections.abc import Collection

    from vllm_rvec.router.request import Request

__all__ = ["answer_preflight"]

EXPOSED = "X-Request-Id, X-Rvec-Variant, X-Rvec-Alias, X-Rvec-Reason, X-Rvec-Alpha, Retry-After"

PREFLIGHT_SECONDS = "600"


def answer_preflight(request: Request, origins: Collection[str]) -> web.Response | None:
    """Answer a browser's question, or note what goes onto the answer for a page that may ask.

    Never with credentials: keys go in a header that the page sets itself.

    Args:
        request: Any.
        origins: `https://app.example.com`, or `*` for all.

    Returns:
        The answer to a preflight; None for any other request.
    """
    origin = request.headers.get(hdrs.ORIGIN) if origins else None
    if origin is None or not ({origin, "*"} & set(origins)):
        return None
    marks: dict[str, str] = {hdrs.ACCESS_CONTROL_ALLOW_ORIGIN: origin, hdrs.VARY: hdrs.ORIGIN}
    if request.method == "OPTIONS" and hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers:
        return web.Response(status=204, headers={**marks, **_preflight(request)})
    marks[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = EXPOSED
    request.cors_marks = marks
    return None


def _preflight(request: Request) -> dict[str, str]:
    asked = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS, "")
    return {
        hdrs.ACCESS_CONTROL_ALLOW_METHODS: "GET, POST, PUT",
        hdrs.ACCESS_CONTROL_ALLOW_HEADERS: asked,
        hdrs.ACCESS_CONTROL_MAX_AGE: PREFLIGHT_SECONDS,
    }
