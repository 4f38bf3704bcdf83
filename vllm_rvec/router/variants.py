"""Which variants there are, and which upstream answers for each.

A *variant* is a name that clients ask for (`base`, `enhanced@1`). An *upstream* is an engine as
the router sees it. Several variants may share one upstream. The table is told what is ready and
what is down; it starts, watches and asks nothing itself.

With a dial, one upstream answers for all of them, and for names that nobody listed, such as
`enhanced@0.37`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from vllm_rvec.errors import ConfigError, RvecError, UpstreamError
from vllm_rvec.router.gate import Gate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vllm_rvec.vector.dial import AlphaRange, Alphas, Dial

__all__ = ["UnknownVariantError", "Upstream", "VariantDownError", "VariantFacts", "VariantTable"]

STARTING = "starting"
"""Why a variant is down before anything is known of its engine."""

SHOWN_NAME_CHARACTERS = 100
"""How much of a name that nobody knows goes into a message: it may be 64 MiB of a request."""


@dataclass(frozen=True, slots=True)
class Upstream:
    """An engine as the router sees it."""

    base_url: str
    """Where it answers, without `/v1`: `http://127.0.0.1:8001`."""
    api_key: str | None = field(repr=False)
    """What the router sends it as a bearer token. Kept out of `repr`, so out of logs."""


@dataclass(frozen=True, slots=True)
class VariantFacts:
    """What a variant is, beside its name."""

    alpha: float | Mapping[str, float]
    """The vector's scaling coefficient; of several vectors that differ, each one's by its name."""
    vector: str
    """The stored vector."""
    alpha_range: AlphaRange | None = None
    """Between which alphas requests may choose; None where they can't."""


class UnknownVariantError(RvecError, LookupError):
    """There is no variant of this name.

    Args:
        name: What was asked for.
        names: What there is.
        alpha_range: Of the names that nobody listed, with a dial.
    """

    def __init__(
        self, name: str, names: Sequence[str], alpha_range: AlphaRange | None = None
    ) -> None:
        self.name = name
        self.names = tuple(names)
        self.alpha_range = alpha_range
        super().__init__(
            f"The model `{_shown(name)}` does not exist.", fix=names_there_are(names, alpha_range)
        )


class VariantDownError(UpstreamError):
    """The variant exists, but its engine can't answer now.

    Args:
        name: The variant.
        reason: Why it is down, in a few words.
    """

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self.reason = reason
        super().__init__(
            f"The model `{name}` can't answer now.",
            why=reason,
            fix="Try again in a few seconds.",
        )


def names_there_are(names: Sequence[str], alpha_range: AlphaRange | None) -> str:
    """Tell a client what to ask for."""
    more = f", or for enhanced@A with any A in {alpha_range}" if alpha_range else ""
    return f"Ask for one of: {', '.join(names)}{more}."


class VariantTable:
    """The variants and their upstreams. All are down at first: their engines are starting.

    Args:
        names: The variants, in the order in which they are listed to clients.
        dial: What the one upstream answers to, where requests may choose their alphas. Its variants
            are `names`.

    Raises:
        ConfigError: If there is no name, an empty one, or the same one twice.
    """

    def __init__(self, names: Sequence[str], dial: Dial | None = None) -> None:
        _check_names(names)
        self._dial = dial
        self._states: dict[str, Upstream | str] = dict.fromkeys(names, STARTING)
        self._facts: dict[str, VariantFacts] = {}
        self._gates = {name: Gate() for name in names}

    @property
    def dial(self) -> Dial | None:
        """What requests may choose; None where each variant has one alpha."""
        return self._dial

    @property
    def alpha_range(self) -> AlphaRange | None:
        """Between which alphas requests may choose; None where they can't."""
        return None if self._dial is None else self._dial.allowed

    def names(self) -> tuple[str, ...]:
        """All variants, ready or not, in their order; of a dial, those that have been listed."""
        return tuple(self._states)

    def has(self, name: str) -> bool:
        """Whether requests may ask for a name."""
        return self._listed(name) in self._states

    def set_ready(self, name: str, upstream: Upstream) -> None:
        """Send the variant's requests to an upstream from now on.

        Args:
            name: The variant.
            upstream: Who answers; replaces any earlier one.

        Raises:
            UnknownVariantError: If the table was made without this name.
        """
        self._state(name)
        self._states[name] = upstream

    def set_down(self, name: str, reason: str) -> None:
        """Refuse the variant's requests from now on; those under way go on.

        Args:
            name: The variant.
            reason: Why, in a few words. Clients read it.

        Raises:
            UnknownVariantError: If the table was made without this name.
        """
        self._state(name)
        self._states[name] = reason

    def find(self, name: str) -> Upstream:
        """Who answers for a variant.

        Args:
            name: The variant, as the client spells it; with a dial, any that it answers to.

        Returns:
            The upstream that is ready.

        Raises:
            UnknownVariantError: If there is no such variant.
            VariantDownError: If it can't answer now.
        """
        state = self._state(self._listed(name))
        if isinstance(state, str):
            raise VariantDownError(name, state)
        return state

    def down_reason(self, name: str) -> str | None:
        """Why a variant is down, or None when it is ready.

        Args:
            name: The variant.

        Returns:
            The reason given to `set_down`, or "starting".

        Raises:
            UnknownVariantError: If there is no such variant.
        """
        state = self._state(name)
        return state if isinstance(state, str) else None

    def describe(self, name: str, facts: VariantFacts) -> None:
        """Note what a variant is now.

        Args:
            name: The variant.
            facts: Told to clients; replaces any earlier ones.

        Raises:
            UnknownVariantError: If the table was made without this name.
        """
        self._state(name)
        self._facts[name] = facts

    def retune(self, name: str, alphas: Alphas) -> None:
        """Have a variant of a dial stand for other alphas: of requests that come from now on.

        Args:
            name: The variant.
            alphas: One for each vector.

        Raises:
            UnknownVariantError: If the table was made without this name.
        """
        self._state(name)
        if self._dial is None:
            msg = "there is no dial"
            raise RuntimeError(msg)
        self._dial = self._dial.with_variant(name, alphas)

    def facts(self, name: str) -> VariantFacts | None:
        """What a variant is, or None where nobody has said."""
        facts = self._facts.get(self._listed(name))
        if facts is None or self._dial is None:
            return facts
        if (alphas := self._dial.of_model(name)) is None:
            return None
        return replace(facts, alpha=self._dial.plain(alphas), alpha_range=self._dial.allowed)

    def gate(self, name: str) -> Gate:
        """The door before a variant.

        Args:
            name: The variant.

        Raises:
            UnknownVariantError: If there is no such variant.
        """
        listed = self._listed(name)
        self._state(listed)
        return self._gates[listed]

    def unknown(self, name: str) -> UnknownVariantError:
        """The error for a name that requests may not ask for."""
        return UnknownVariantError(name, self.names(), self.alpha_range)

    def _listed(self, name: str) -> str:
        """The name under which a variant's engine is known: one dial answers for all its names."""
        if name in self._states or self._dial is None or self._dial.of_model(name) is None:
            return name
        return next(iter(self._states))

    def _state(self, name: str) -> Upstream | str:
        try:
            return self._states[name]
        except KeyError:
            raise self.unknown(name) from None


def _check_names(names: Sequence[str]) -> None:
    if not names or not all(names):
        raise ConfigError(
            "Every variant needs a name, and there must be one variant.",
            why=f"the names are {list(names)}",
        )
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"Two variants have the same name: {', '.join(repeated)}.",
            why="clients pick the variant by its name",
            fix="Give each its own name.",
        )


def _shown(name: str) -> str:
    return name if len(name) <= SHOWN_NAME_CHARACTERS else name[:SHOWN_NAME_CHARACTERS] + "..."
