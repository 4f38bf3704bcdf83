"""One request on its way: what is known of it, for its headers, the log, metrics and results.

Made when it comes, filled in by whoever learns something, and read at its end (`recording`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aiohttp import web

from vllm_rvec.router.telemetry import Observation

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_rvec.router.keyring import ClientKey
    from vllm_rvec.router.policy import Choice
    from vllm_rvec.router.telemetry import ErrorKind, Outcome

__all__ = ["EXCHANGE", "Exchange"]


@dataclass(slots=True, eq=False)
class Exchange:
    """What is known of a request."""

    request_id: str
    """The client's `X-Request-Id`, or the one made for it."""
    started: float = field(default_factory=time.perf_counter)
    """When it came."""
    client: ClientKey | None = None
    """Whose key it showed."""
    choice: Choice | None = None
    """Who answers; None until that is known."""
    alpha: str | None = None
    """The alphas, as the answer's header says them; None where they are not known."""
    body: bytes = field(default=b"", repr=False)
    """What was asked."""
    is_generating: bool = False
    """Whether it makes text, so that it counts as an exposure."""
    seen: Observation | None = None
    """What is measured of an engine's answer; None where none began."""
    error: tuple[ErrorKind, str] | None = None
    """Why the router itself refused it: kind, and OpenAI's code."""
    listeners: list[Callable[[bytes], None]] = field(default_factory=list)
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


EXCHANGE = web.RequestKey("EXCHANGE", Exchange)
