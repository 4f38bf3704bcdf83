"""What a request shows as its key, and whether it is the right one."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiohttp import web

__all__ = ["shows_key"]


def shows_key(request: web.Request, expected_key: str) -> bool:
    """Whether a request shows a key, in the way of OpenAI's clients or of Anthropic's.

    Args:
        request: Any request.
        expected_key: The key.
    """
    # Bytes: compare_digest takes no other than ASCII text. What is not UTF-8 in a header comes as
    # surrogates.
    expected = expected_key.encode()
    return any(
        hmac.compare_digest(key.encode("utf-8", "surrogateescape"), expected)
        for key in _offered_keys(request)
    )


def _offered_keys(request: web.Request) -> Iterator[str]:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        yield token.strip()
    if (key := request.headers.get("x-api-key")) is not None:
        yield key
