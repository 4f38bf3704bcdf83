"""Asks upstreams for their health, so that one that hangs or comes back is known in time.

Not here: what is made of it (`upstreams`).
"""

from __future__ import annotations

import asyncio
import logging
import math
from typing import TYPE_CHECKING

import aiohttp

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_rvec.router.config import HealthConfig
    from vllm_rvec.router.upstreams import Upstream
    from vllm_rvec.router.variants import VariantTable

__all__ = ["HealthWatch"]

logger = logging.getLogger("vllm_rvec.router")

LONGEST_PAUSE_SECONDS = 1.0
"""Between checks of an upstream that is down."""


class HealthWatch:
    """Checks every upstream again and again.

    Args:
        variants: Who is checked.
        client: What they are asked with.
        config: How often; called each time, as it may change.
        on_state: Told each upstream's state after each check.
    """

    def __init__(
        self,
        variants: VariantTable,
        client: aiohttp.ClientSession,
        config: Callable[[], HealthConfig],
        on_state: Callable[[Upstream, bool], None],
    ) -> None:
        self._variants = variants
        self._client = client
        self._config = config
        self._on_state = on_state
        self._due: dict[Upstream, float] = {}

    async def run(self) -> None:
        """Check until cancelled."""
        loop = asyncio.get_running_loop()
        # Nobody waits for a check: one that hangs must not hold up the others'.
        async with asyncio.TaskGroup() as checks:
            while True:
                there = self._variants.upstreams()
                self._variants.load.keep_only(there)
                self._due = {upstream: self._due.get(upstream, 0.0) for upstream in there}
                for upstream in [u for u, at in self._due.items() if at <= loop.time()]:
                    self._due[upstream] = math.inf  # until this check has ended
                    checks.create_task(self._check(upstream))
                await asyncio.sleep(min(LONGEST_PAUSE_SECONDS, self._config().interval_seconds))

    async def _check(self, upstream: Upstream) -> None:
        config, loop = self._config(), asyncio.get_running_loop()
        was_well = self._variants.load.is_well(upstream)
        is_well, allowed = await self._ask(upstream, config)
        hold = config.interval_seconds + config.timeout_seconds + LONGEST_PAUSE_SECONDS
        self._variants.load.note_check(upstream, is_well=is_well, allowed=allowed, hold=hold)
        if was_well != (now_well := self._variants.load.is_well(upstream)):
            logger.warning("upstream %s is %s", upstream.base_url, "up" if now_well else "down")
        self._on_state(upstream, now_well)
        pause = config.interval_seconds if is_well else LONGEST_PAUSE_SECONDS
        self._due[upstream] = loop.time() + min(pause, config.interval_seconds)

    async def _ask(self, upstream: Upstream, config: HealthConfig) -> tuple[bool, int]:
        """Whether an upstream is well, and how many failures in a row are one too many."""
        try:
            async with self._client.get(
                upstream.url("/health"),
                timeout=aiohttp.ClientTimeout(total=config.timeout_seconds),
            ) as answer:
                # Not every OpenAI-compatible server has this path; one that says so is well.
                return answer.status < 500, config.failures
        except TimeoutError:
            return False, config.failures
        except aiohttp.ClientConnectorError:
            return False, 1  # nobody listens there
        except (aiohttp.ClientError, OSError):
            return False, config.failures
