"""Which headers pass through. Everything does, except what belongs to one connection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from multidict import CIMultiDict

from vllm_rvec.router.paths import MODEL_HEADERS
from vllm_rvec.vector.dial import ALPHA_HEADER, VARIANT_HEADER

if TYPE_CHECKING:
    from collections.abc import Mapping

    from multidict import CIMultiDictProxy

    from vllm_rvec.router.upstreams import Upstream

__all__ = ["bearer", "request_headers", "response_headers"]

HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""Headers about one connection (RFC 9110, 7.6.1). Each side of the router has its own."""

CLIENT_KEYS = frozenset({"authorization", "x-api-key"})
"""Where clients put their key for the router. No engine ever sees it."""

CORS = frozenset(
    f"access-control-{name}"
    for name in (
        *("allow-origin", "allow-credentials", "allow-methods", "allow-headers"),
        *("expose-headers", "max-age"),
    )
)
"""What a browser's pages may do is for the router to say (`cors`), not for engines."""

CHOSEN = frozenset(
    name.lower() for name in (*MODEL_HEADERS, "Origin", ALPHA_HEADER, VARIANT_HEADER)
)
"""Those that name another model or alpha, which are the router's to choose, and the web page that
asks. vLLM lets every page in by default, and that answer would be the router's."""

REMADE = frozenset({"host", "content-length", "expect"})
"""Made anew for the upstream. The body is here in full by then: `100-continue` has been said."""

NOT_SENT = HOP_BY_HOP | CLIENT_KEYS | CHOSEN | REMADE
NOT_RETURNED = HOP_BY_HOP | CORS
KEEP_ALIVE = ["keep-alive"]
"""What `Connection` says as a rule, which is in `HOP_BY_HOP` already."""


def request_headers(
    headers: CIMultiDictProxy[str],
    upstream: Upstream,
    request_id: str,
    own: Mapping[str, str | None] | None = None,
) -> CIMultiDict[str]:
    """What goes to the upstream.

    Args:
        headers: The client's.
        upstream: Its key, if any, takes the place of the client's.
        request_id: Sent as `X-Request-Id`.
        own: Sent in place of the client's headers of these names; None leaves them out.

    Returns:
        The client's headers in their order, repeated ones repeated.
    """
    passed = CIMultiDict(_without(headers, NOT_SENT))
    for name, value in (own or {}).items():
        if value is not None:
            passed[name] = value
        else:
            passed.popall(name, None)
    passed["X-Request-Id"] = request_id
    passed.update(bearer(upstream))
    return passed


def response_headers(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    """What goes back to the client.

    Args:
        headers: The upstream's.

    Returns:
        Its headers in their order, repeated ones repeated, `Content-Length` included.
    """
    return CIMultiDict(_without(headers, NOT_RETURNED))


def bearer(upstream: Upstream) -> Mapping[str, str]:
    """The header that lets the router in at an upstream.

    Args:
        upstream: The engine.

    Returns:
        `Authorization`, or nothing for an engine without a key.
    """
    if upstream.api_key is None:
        return {}
    return {"Authorization": f"Bearer {upstream.api_key}"}


def _without(headers: CIMultiDictProxy[str], dropped: frozenset[str]) -> list[tuple[str, str]]:
    """The headers, less those dropped and those that `Connection` names as its own."""
    if (named := headers.getall("Connection", ())) and named != KEEP_ALIVE:
        dropped |= {name.strip().lower() for name in ",".join(named).split(",")}
    return [(name, value) for name, value in headers.items() if name.lower() not in dropped]
