"""How busy and how well each upstream is, and which of several takes the next request.

An upstream that can't be reached is skipped at once. It gets a request again when a check found it
well (`health`), or, as a trial, when it was left alone for a second. Not here: which upstreams a
variant has (`variants`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

__all__ = ["Load", "Upstream"]

TRIAL_SECONDS = 1.0
"""How long an upstream that failed gets no request."""


@dataclass(frozen=True, slots=True)
class Upstream:
    """An engine as the router sees it."""

    base_url: str
    """Where it answers, without `/v1`: `http://127.0.0.1:8001`."""
    api_key: str | None = field(repr=False)
    """What the router sends it as a bearer token. Kept out of `repr`, so out of logs."""

    def url(self, path: str) -> str:
        """Where a path of it is, with its query if it has one."""
        return self.base_url.rstrip("/") + path


@dataclass(slots=True)
class _Condition:
    """One upstream's."""

    in_flight: int = 0
    failed_checks: int = 0
    skipped_until: float = 0.0


class Load:
    """The upstreams' conditions, by their address.

    Args:
        clock: Seconds that only grow; a seam for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._conditions: dict[str, _Condition] = {}

    def least_busy(self, upstreams: Collection[Upstream]) -> Upstream | None:
        """Of those that are well, the one with the fewest requests in flight; None if none is."""
        well = [upstream for upstream in upstreams if self.is_well(upstream)]
        if len(well) < 2:
            return well[0] if well else None
        return min(well, key=self.in_flight)

    def is_well(self, upstream: Upstream) -> bool:
        """Whether it may get a request."""
        condition = self._conditions.get(upstream.base_url)
        return condition is None or condition.skipped_until <= self._clock()

    def in_flight(self, upstream: Upstream) -> int:
        """How many requests it has under way."""
        condition = self._conditions.get(upstream.base_url)
        return 0 if condition is None else condition.in_flight

    def begin(self, upstream: Upstream) -> None:
        """Count a request as under way; `end` it, however it ends."""
        self._condition(upstream).in_flight += 1

    def end(self, upstream: Upstream) -> None:
        """A request that was under way has ended."""
        self._condition(upstream).in_flight -= 1

    def note_failure(self, upstream: Upstream, *, seconds: float = TRIAL_SECONDS) -> None:
        """Skip it for some seconds: it could not be reached."""
        self._condition(upstream).skipped_until = self._clock() + seconds

    def note_check(self, upstream: Upstream, *, is_well: bool, allowed: int, hold: float) -> None:
        """Take in what a check found.

        Args:
            upstream: Which was checked.
            is_well: What was found.
            allowed: How many failures in a row are one too many.
            hold: For how many seconds it is skipped then; the next check comes before.
        """
        condition = self._condition(upstream)
        if is_well:
            condition.failed_checks, condition.skipped_until = 0, 0.0
            return
        condition.failed_checks += 1
        if condition.failed_checks >= allowed or not self.is_well(upstream):
            self.note_failure(upstream, seconds=hold)

    def keep_only(self, upstreams: Collection[Upstream]) -> None:
        """Forget those that are gone and have nothing under way."""
        kept = {upstream.base_url for upstream in upstreams}
        for url in [u for u, c in self._conditions.items() if u not in kept and not c.in_flight]:
            del self._conditions[url]

    def _condition(self, upstream: Upstream) -> _Condition:
        return self._conditions.setdefault(upstream.base_url, _Condition())
