"""Which variant answers a request: the names, aliases, splits and limits that hold now.

Knows no HTTP. A variant may have an engine of its own or share a dial with others; only a wish for
another alpha needs to know which. Not here: how a split deals users (`assignment`), and which of a
variant's upstreams takes the request (`variants`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_rvec.errors import ConfigError
from vllm_rvec.router.assignment import Reason, assign, random_variant, unit_of
from vllm_rvec.router.config import Routing
from vllm_rvec.router.keyring import Keyring
from vllm_rvec.router.limits import InFlightLimit
from vllm_rvec.router.variants import UnknownAliasError, UnknownVariantError, names_there_are

if TYPE_CHECKING:
    import random
    from collections.abc import Mapping

    from vllm_rvec.router.alphas import AlphaWish
    from vllm_rvec.router.config import AliasConfig
    from vllm_rvec.router.variants import VariantTable

__all__ = ["Choice", "Traffic"]


@dataclass(frozen=True, slots=True)
class Choice:
    """Who answers a request, and why."""

    variant: str
    reason: Reason
    alias: str | None = None
    """The name that was asked for, where it is an alias."""
    unit: str = ""
    """A hash of what made it sticky; empty where nothing did."""

    @property
    def is_exposure(self) -> bool:
        """Whether the split chose, so that it counts in the experiment."""
        return self.reason in {Reason.STICKY, Reason.RANDOM}


class Traffic:
    """The configuration that holds now, and what was changed of it since.

    Args:
        routing: As checked against the variants.
        variants: What there is.
        shared_key: A key for all clients, beside those of `routing`.
        rng: Where requests without a key get their chance from.

    Attributes:
        routing: The configuration.
        keyring: The keys that clients may show.
        generation: How often it was replaced, plus 1.
    """

    def __init__(
        self,
        routing: Routing,
        variants: VariantTable,
        *,
        rng: random.Random,
        shared_key: str | None = None,
    ) -> None:
        self._variants = variants
        self._rng = rng
        self._shared_key = shared_key
        self._limits: dict[str, InFlightLimit] = {}
        self._weights: dict[str, dict[str, float]] = {}
        self.routing = Routing()
        self.generation = 0
        self.replace(routing)

    def replace(self, routing: Routing) -> None:
        """Have another configuration from now on.

        Weights that were set by hand stay where the configured split is what it was: a reload for
        another reason, such as a new log file or certificate, must not end an operator's ramp.

        Args:
            routing: As checked against the variants, which must have been replaced before.

        Raises:
            ConfigError: Two clients have the same key; nothing has changed.
        """
        self.keyring = self.keyring_of(routing)
        old = self.routing.aliases
        self._weights = {
            name: self._weights[name]
            if name in old and old[name].split == alias.split
            else dict(alias.split)
            for name, alias in routing.aliases.items()
        }
        self.routing = routing
        for name, policy in routing.variants.items():
            self.limit(name).max_in_flight = policy.max_in_flight
        for name in self._limits.keys() - routing.variants.keys():
            self._limits[name].max_in_flight = None
        self.generation += 1

    def keyring_of(self, routing: Routing) -> Keyring:
        """The keys that clients may show under a configuration.

        Raises:
            ConfigError: Two clients have the same key.
        """
        return Keyring(routing.keys, self._shared_key)

    def alias(self, name: str) -> AliasConfig | None:
        """An alias's configuration; None where the name is none."""
        return self.routing.aliases.get(name)

    def weights(self, alias: str) -> Mapping[str, float]:
        """An alias's weights, as they are now.

        Raises:
            UnknownAliasError: There is none of this name.
        """
        try:
            return self._weights[alias]
        except KeyError:
            named = ", ".join(self._weights) or "none"
            raise UnknownAliasError(
                f"There is no alias `{alias[:100]}`.", fix=f"There are: {named}."
            ) from None

    def set_weights(self, alias: str, weights: Mapping[str, float]) -> None:
        """Change a split until the configured one changes.

        Raises:
            UnknownAliasError: There is no such alias.
            ConfigError: A variant is not there.
        """
        self.weights(alias)
        if unknown := [name for name in weights if not self._variants.has(name)]:
            raise ConfigError(
                f"There is no variant {', '.join(unknown)}.",
                fix=names_there_are(self._variants.names(), self._variants.alpha_range),
            )
        self._weights[alias] = dict(weights)

    def limit(self, variant: str) -> InFlightLimit:
        """A variant's limit on requests in flight; names of a dial that nobody listed have none."""
        known = self._limits.get(variant)
        if known is None:
            known = InFlightLimit(variant, None)
            if variant in self._variants.names() or variant in self.routing.variants:
                self._limits[variant] = known
        return known

    def fallback(self, variant: str) -> str | None:
        """Who stands in for a variant that can't answer."""
        policy = self.routing.variants.get(variant)
        return None if policy is None else policy.fallback

    def unknown(self, name: str) -> UnknownVariantError:
        """The error for a name that is neither a variant's nor an alias."""
        names = [*self._variants.names(), *self.routing.aliases]
        return UnknownVariantError(name, names, self._variants.alpha_range)

    def choose(self, model: str, wish: AlphaWish | None, key: str | None) -> Choice:
        """Find the variant for a request.

        Args:
            model: What it names: a variant or an alias.
            wish: The alphas that it asks for, if it does.
            key: What its choice is to be sticky by, if anything.

        Raises:
            UnknownVariantError: There is neither.
            RequestRefusedError: No variant has these alphas.
        """
        alias = self.alias(model)
        if alias is None:
            if not self._variants.has(model):
                raise self.unknown(model)
            # One variant, one limit and one fallback, however its alpha is spelled.
            model = self._variants.canonical(model)
        if wish is not None:
            preferred = (model,) if alias is None else tuple(self._weights[model])
            variant = wish.variant(self._variants, preferred)
            reason = Reason.EXPLICIT if variant == model else Reason.ALPHA
            return Choice(variant, reason, model if alias else None)
        if alias is None:
            return Choice(model, Reason.EXPLICIT)
        return self._deal(model, alias, key)

    def _deal(self, name: str, alias: AliasConfig, key: str | None) -> Choice:
        weights = self._weights[name]
        if len(weights) == 1:
            return Choice(next(iter(weights)), Reason.ALIAS, name)
        if key is None:
            return Choice(random_variant(weights, self._rng), Reason.RANDOM, name)
        variant = assign(key, weights, salt=alias.salt, experiment=name)
        return Choice(variant, Reason.STICKY, name, unit_of(key, alias.salt, name))
