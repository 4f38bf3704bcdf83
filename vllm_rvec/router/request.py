"""A client's request, as every handler gets it: aiohttp's, and what the router knows of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aiohttp import web

from vllm_rvec.router.exchange import Exchange
from vllm_rvec.vector.dial import ALPHA_HEADER, VARIANT_HEADER

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["MAX_BODY_BYTES", "Request"]

MAX_BODY_BYTES = 64 * 2**20
"""Room for the base64 images of a multimodal request."""


class Request(web.BaseRequest):
    """One request. aiohttp's low-level server makes it."""

    ATTRS = web.BaseRequest.ATTRS | {"cors_marks", "exchange", "match_info"}

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, client_max_size=MAX_BODY_BYTES, **options)
        self.exchange = Exchange(self.headers.get("X-Request-Id"))
        """What becomes of it."""
        self.match_info: Mapping[str, str] = {}
        """The parts of its path that a route has names for."""
        self.cors_marks: Mapping[str, str] | None = None
        """What goes onto the answer for a web page that may ask."""

    def mark(self, response: web.StreamResponse) -> None:
        """Say on an answer, errors included, which request it belongs to and who answered.

        Args:
            response: Whose head has not gone out.
        """
        headers, exchange = response.headers, self.exchange
        if self.cors_marks is not None:
            headers.extend(self.cors_marks)  # `Vary` may be there
        headers["X-Request-Id"] = exchange.request_id
        if (choice := exchange.choice) is not None:
            headers[VARIANT_HEADER] = choice.variant
            headers["X-Rvec-Reason"] = choice.reason.value
            if choice.alias is not None:
                headers["X-Rvec-Alias"] = choice.alias
        if exchange.alpha is not None:
            # An engine that says them itself knows best: `vllm_xargs` are read only there.
            headers.setdefault(ALPHA_HEADER, exchange.alpha)
