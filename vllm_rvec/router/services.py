"""What the router's handlers work with, put together; and how another configuration takes hold.

Not here: HTTP (`app`), and where the configuration comes from (`reloading`).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm_rvec.router.config import Routing
from vllm_rvec.router.limits import Limiter
from vllm_rvec.router.owners import ResponseOwners
from vllm_rvec.router.policy import Traffic
from vllm_rvec.router.results import ResultsStore
from vllm_rvec.router.telemetry import AccessLog, Metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import aiohttp

    from vllm_rvec.router.keyring import Keyring
    from vllm_rvec.router.variants import VariantTable

__all__ = ["Services"]


@dataclass(frozen=True, slots=True)
class Services:
    """Each part has one subject; none knows HTTP's side of the others."""

    variants: VariantTable
    """Who answers for which name."""
    client: aiohttp.ClientSession
    """What requests go to upstreams with."""
    traffic: Traffic
    """The configuration that holds now."""
    metrics: Metrics
    """What Prometheus reads."""
    limiter: Limiter
    """What each key has used."""
    owners: ResponseOwners
    """Which engine has which stored response."""
    results: ResultsStore | None
    """Where exposures and outcomes are kept, if anywhere."""
    access_log: AccessLog | None
    """Where a line for each request goes, if anywhere."""
    followers: list[Callable[[], None]] = field(default_factory=list)
    """Called after each change of the configuration."""
    checks: list[Callable[[Keyring], None]] = field(default_factory=list)
    """Called before each; they raise ConfigError for client keys that can't be had."""

    @classmethod
    def make(
        cls,
        variants: VariantTable,
        client: aiohttp.ClientSession,
        routing: Routing | None = None,
        *,
        shared_key: str | None = None,
        rng: random.Random | None = None,
    ) -> Services:
        """Put them together.

        Args:
            variants: May change while they are used.
            client: From `create_client`; the caller closes it.
            routing: As checked against the variants.
            shared_key: A key for all clients.
            rng: Where requests without a key get their chance from; a seam for tests.

        Raises:
            ConfigError: A key is empty or there twice, or a file can't be written.
        """
        routing = routing or Routing()
        traffic = Traffic(
            routing, variants, rng=rng or random.SystemRandom(), shared_key=shared_key
        )
        results = None if routing.results is None else ResultsStore(routing.results)
        access_log = None if routing.access_log is None else AccessLog(routing.access_log)
        made = cls(
            variants,
            client,
            traffic,
            Metrics(),
            Limiter(),
            ResponseOwners(),
            results,
            access_log,
        )
        made.tell()
        return made

    def check(self, routing: Routing) -> None:
        """Find out whether a configuration can be applied.

        Raises:
            ConfigError: Two clients have the same key, or one has the admin's.
        """
        keyring = self.traffic.keyring_of(routing)
        for check in self.checks:
            check(keyring)

    def apply(self, routing: Routing) -> None:
        """Have another configuration from now on; requests under way keep theirs.

        Args:
            routing: As checked against the variants, which have changed before.

        Raises:
            ConfigError: Two clients have the same key, or one has the admin's; nothing has changed.
        """
        self.check(routing)
        self.traffic.replace(routing)
        self.tell()

    def set_weights(self, alias: str, weights: Mapping[str, float]) -> None:
        """Change a split until the configured one changes.

        Raises:
            UnknownAliasError: There is no such alias.
            ConfigError: A variant is not there.
        """
        self.traffic.set_weights(alias, weights)
        self.tell()

    def tell(self) -> None:
        """Let metrics and results know what is configured."""
        for follow in self.followers:
            follow()
        traffic, names = self.traffic, self.variants.names()
        upstreams = {(n, u.base_url) for n in names for u in self.variants.upstreams(n)}
        # Of a dial, the configuration may name others than those listed.
        named = {*names, *traffic.routing.named_variants()}
        self.metrics.allow(named, traffic.routing.aliases, upstreams)
        self.metrics.set_generation(traffic.generation)
        for name, alias in traffic.routing.aliases.items():
            weights = traffic.weights(name)
            self.metrics.set_weights(name, weights)
            if self.results is not None and (alias.is_split or len(weights) > 1):
                self.results.note_split(name, weights)
