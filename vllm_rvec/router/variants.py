"""Which variants there are, and which upstream answers for each.

A *variant* is a name that clients ask for (`base`, `enhanced@1`). An *upstream* is an engine as
the router sees it. Several variants may share one upstream. The table is told what is ready and
what is down; it starts, watches and asks nothing itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm_rvec.errors import ConfigError, RvecError, UpstreamError
from vllm_rvec.router.gate import Gate

if TYPE_CHECKING:
    from collections.abc import Sequence

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

    alpha: float
    """The vector's scaling coefficient."""
    vector: str
    """The stored vector."""


class UnknownVariantError(RvecError, LookupError):
    """There is no variant of this name.

    Args:
        name: What was asked for.
        names: What there is.
    """

    def __init__(self, name: str, names: Sequence[str]) -> None:
        self.name = name
        self.names = tuple(names)
        super().__init__(
            f"The model `{_shown(name)}` does not exist.",
            fix=f"Ask for one of: {', '.join(names)}.",
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


class VariantTable:
    """The variants and their upstreams. All are down at first: their engines are starting.

    Args:
        names: The variants, in the order in which they are listed to clients.

    Raises:
        ConfigError: If there is no name, an empty one, or the same one twice.
    """

    def __init__(self, names: Sequence[str]) -> None:
        _check_names(names)
        self._states: dict[str, Upstream | str] = dict.fromkeys(names, STARTING)
        self._facts: dict[str, VariantFacts] = {}
        self._gates = {name: Gate() for name in names}

    def names(self) -> tuple[str, ...]:
        """All variants, ready or not, in their order."""
        return tuple(self._states)

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
            name: The variant, as the client spells it.

        Returns:
            The upstream that is ready.

        Raises:
            UnknownVariantError: If there is no such variant.
            VariantDownError: If it can't answer now.
        """
        state = self._state(name)
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

    def facts(self, name: str) -> VariantFacts | None:
        """What a variant is, or None where nobody has said."""
        return self._facts.get(name)

    def gate(self, name: str) -> Gate:
        """The door before a variant.

        Args:
            name: The variant.

        Raises:
            UnknownVariantError: If there is no such variant.
        """
        self._state(name)
        return self._gates[name]

    def _state(self, name: str) -> Upstream | str:
        try:
            return self._states[name]
        except KeyError:
            raise UnknownVariantError(name, self.names()) from None


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
