"""How much at once: a client's requests per minute and in flight, and a variant's in flight.

Who the client is, is for `keyring`. The counts are this process's own: several routers behind one
address each allow the whole of it.
"""

from __future__ import annotations

import math
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from vllm_rvec.errors import RvecError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vllm_rvec.router.keyring import ClientKey, KeyConfig

__all__ = ["InFlightLimit", "Limiter", "RateLimitedError", "VariantBusyError"]

BURST_SECONDS = 5.0
"""How many seconds' worth of its rate a client may send at once, after a rest: enough for a page
that opens with a few requests, and little beside a minute's worth."""

BUSY_RETRY_SECONDS = 1
"""When to ask again if too many requests are in flight. A place is free with the next answer that
ends, and nobody knows when; OpenAI's client tries three times in all."""

MAX_RETRY_SECONDS = 86_400
"""The longest wait that is told, for keys of less than a request per day."""

ROUNDING = 1e-9
"""Sums of floats: who waits exactly as long as it was told must not be sent away again."""


class RateLimitedError(RvecError):
    """A client that asks more than its key may.

    Args:
        what: Which limit it met.
        retry_after_seconds: When it may ask again; at least 1.
    """

    status: ClassVar[int] = 429
    code: ClassVar[str] = "rate_limit_exceeded"

    def __init__(self, what: str, retry_after_seconds: int) -> None:
        self.retry_after_seconds = retry_after_seconds
        super().__init__(what, fix=f"Try again in {retry_after_seconds} s.")


class VariantBusyError(RvecError):
    """A variant that answers as many requests as it may already.

    Args:
        variant: Its name.
        max_in_flight: How many that is.
    """

    status: ClassVar[int] = 503
    code: ClassVar[str] = "model_busy"

    def __init__(self, variant: str, max_in_flight: int) -> None:
        self.variant = variant
        self.max_in_flight = max_in_flight
        self.retry_after_seconds = BUSY_RETRY_SECONDS
        super().__init__(
            f"The model {variant!r} is busy.",
            why=f"{max_in_flight} requests are in flight, as many as it takes",
            fix=f"Try again in {BUSY_RETRY_SECONDS} s.",
        )


class Limiter:
    """Holds every client to its key's limits.

    Keeps what each has used by the key's name: it outlives a reload of the configuration, and a
    changed limit holds from the next request on.

    Args:
        clock: Seconds that only go forward. Not the time of day, which people and NTP set.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._used: dict[str, _Used] = {}

    @contextmanager
    def admit(self, client: ClientKey | None, config: KeyConfig | None) -> Iterator[None]:
        """Let one request in and count it until its answer has ended, however it ends.

        A request that is refused uses nothing up.

        Args:
            client: Whose request it is. Nobody's, and the shared key's, has no limits.
            config: The client's limits now; None for none.

        Raises:
            RateLimitedError: The client has too many in flight, or asks too fast.
        """
        if client is None or client.name is None or config is None:
            yield
            return
        used = self._used.get(client.name)
        if used is None:
            used = self._used[client.name] = _Used(self._clock())
        used.check_in_flight(client.name, config.max_in_flight)
        used.take_token(client.name, config.requests_per_minute, self._clock())
        used.in_flight += 1
        try:
            yield
        finally:
            used.in_flight -= 1

    def in_flight(self, name: str) -> int:
        """How many of a client's requests are under way.

        Args:
            name: The key's name.
        """
        used = self._used.get(name)
        return 0 if used is None else used.in_flight


class InFlightLimit:
    """One variant's limit on requests under way.

    Args:
        variant: Its name, for the error.
        max_in_flight: How many; None for no limit.
    """

    def __init__(self, variant: str, max_in_flight: int | None) -> None:
        self.max_in_flight = max_in_flight
        """May be set at any time; those inside stay."""
        self._variant = variant
        self._in_flight = 0

    @property
    def in_flight(self) -> int:
        """How many are under way; counted also where there is no limit."""
        return self._in_flight

    def take(self) -> Callable[[], None]:
        """Be under way.

        Returns:
            What gives the place back; to be called once, however it ends.

        Raises:
            VariantBusyError: As many are under way as may be.
        """
        if self.max_in_flight is not None and self._in_flight >= self.max_in_flight:
            raise VariantBusyError(self._variant, self.max_in_flight)
        self._in_flight += 1
        return self._give_back

    def _give_back(self) -> None:
        self._in_flight -= 1


class _Used:
    """What one client has used: a token bucket, full at first, and a count."""

    def __init__(self, now: float) -> None:
        self.in_flight = 0
        self._tokens = math.inf  # the first look caps it at the burst of that day's rate
        self._looked_at = now

    def check_in_flight(self, name: str, most: int | None) -> None:
        if most is not None and self.in_flight >= most:
            raise RateLimitedError(
                f"The key {name!r} may have {most} requests in flight.", BUSY_RETRY_SECONDS
            )

    def take_token(self, name: str, per_minute: float | None, now: float) -> None:
        if per_minute is None:
            # What was not limited was not used up: a limit that comes later begins full.
            self._tokens = math.inf
            return
        per_second = per_minute / 60
        burst = max(1.0, per_second * BURST_SECONDS)
        # Never less than 0, whatever the clock does.
        gained = max(0.0, now - self._looked_at) * per_second
        self._tokens = min(burst, self._tokens + gained)
        self._looked_at = now
        missing = 1 - self._tokens
        if missing > ROUNDING:
            wait_seconds = min(missing * 60 / per_minute - ROUNDING, MAX_RETRY_SECONDS)
            raise RateLimitedError(
                f"The key {name!r} may send {per_minute:g} requests per minute.",
                max(1, math.ceil(wait_seconds)),
            )
        self._tokens = max(0.0, self._tokens - 1)
