"""One request on its way: what is known of it, for its headers, the log, metrics and results.

Made when it comes, filled in by whoever learns something, and read at its end (`recording`).
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from vllm_rvec.router.telemetry import Observation

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_rvec.router.keyring import ClientKey
    from vllm_rvec.router.policy import Choice
    from vllm_rvec.router.telemetry import ErrorKind, Outcome

__all__ = ["Exchange"]


class Exchange:
    """What is known of a request.

    Args:
        request_id: The client's `X-Request-Id`; one is made where there is none.
    """

    __slots__ = (
        "alpha",
        "body",
        "choice",
        "client",
        "error",
        "is_generating",
        "listeners",
        "request_id",
        "seen",
        "started",
    )

    def __init__(self, request_id: str | None = None) -> None:
        self.request_id = request_id or os.urandom(16).hex()
        """The client's `X-Request-Id`, or the one made for it."""
        self.started = time.perf_counter()
        """When it came."""
        self.client: ClientKey | None = None
        """Whose key it showed."""
        self.choice: Choice | None = None
        """Who answers; None until that is known."""
        self.alpha: str | None = None
        """The alphas, as the answer's header says them; None where they are not known."""
        self.body = b""
        """What was asked."""
        self.is_generating = False
        """Whether it makes text, so that it counts as an exposure."""
        self.seen: Observation | None = None
        """What is measured of an engine's answer; None where none began."""
        self.error: tuple[ErrorKind, str] | None = None
        """Why the router itself refused it: kind, and OpenAI's code."""
        self.listeners: list[Callable[[bytes], None]] = []
        """Who else hears the answer's bytes as they pass."""

    @property
    def variant(self) -> str:
        """Who answers, for the log."""
        return "-" if self.choice is None else self.choice.variant

    def begin(self, status: int, content_type: str) -> None:
        """An engine's answer begins."""
        self.seen = Observation(started=self.started)
        self.seen.head(status, content_type)

    def pass_on(self, data: bytes) -> None:
        """Bytes of the answer are on their way to the client."""
        if self.seen is not None:
            self.seen.chunk(data)
        for listener in self.listeners:
            listener(data)

    def end(self, outcome: Outcome) -> None:
        """The answer has ended."""
        if self.seen is not None:
            self.seen.finish(outcome)
