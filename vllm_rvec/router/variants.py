"""Which variants there are, and which upstream answers for each.

A *variant* is a name that clients ask for (`base`, `enhanced@1`). An *upstream* is an engine as
the router sees it. A variant may have several, and several variants may share one. The table is
told what is ready and what is down; it starts, watches and asks nothing itself.

With a dial, the same upstreams answer for all variants that it has, and for names that nobody
listed, such as `enhanced@0.37`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vllm_rvec.errors import ConfigError, RvecError, UpstreamError
from vllm_rvec.router.gate import Gate
from vllm_rvec.router.upstreams import Load, Upstream

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from vllm_rvec.vector.dial import AlphaRange, Alphas, Dial

__all__ = [
    "UNREACHABLE",
    "UnknownAliasError",
    "UnknownVariantError",
    "VariantDownError",
    "VariantFacts",
    "VariantTable",
    "names_there_are",
]

UNREACHABLE = "its engine can't be reached"

STARTING = "starting"
"""Why a variant is down before anything is known of its engine."""

SHOWN_NAME_CHARACTERS = 100
"""How much of a name that nobody knows goes into a message: it may be 64 MiB of a request."""


@dataclass(frozen=True, slots=True)
class VariantFacts:
    """What a variant is, beside its name."""

    alpha: float | Mapping[str, float] | None
    """The vector's scaling coefficient; of several vectors that differ, each one's by its name.
    None where nobody has said."""
    vector: str | None
    """The stored vector."""
    alpha_range: AlphaRange | None = None
    """Between which alphas requests may choose; None where they can't."""
    fingerprint: str | None = None
    """Which weights these are, where it is known."""


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


class UnknownAliasError(RvecError, LookupError):
    """There is no alias of this name."""


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
        dial: What the dial's upstreams answer to, where requests may choose their alphas. Its
            variants are among `names`; others have engines of their own.

    Raises:
        ConfigError: If there is no name, an empty one, or the same one twice.
    """

    def __init__(self, names: Sequence[str], dial: Dial | None = None) -> None:
        _check_names(names)
        self.load = Load()
        """How busy and how well each upstream is."""
        self._dial = dial
        self._states: dict[str, tuple[Upstream, ...] | str] = dict.fromkeys(names, STARTING)
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

    def canonical(self, name: str) -> str:
        """The listed name of a variant: with a dial, `enhanced@0.50` is `enhanced@0.5`.

        Args:
            name: One that requests may ask for.
        """
        if name in self._states or self._dial is None:
            return name
        alphas = self._dial.of_model(name)
        known = (n for n, a in self._dial.variants.items() if a == alphas and n in self._states)
        return next(known, name)

    def is_of_dial(self, name: str) -> bool:
        """Whether a variant's alphas are each request's own."""
        return self._dial is not None and (
            name in self._dial.variants
            or (name not in self._states and self._dial.of_model(name) is not None)
        )

    def reconfigure(self, names: Sequence[str], dial: Dial | None) -> None:
        """Have other variants from now on; those that stay keep their state.

        Args:
            names: As for the table.
            dial: As for the table.

        Raises:
            ConfigError: As for the table; nothing has changed.
        """
        _check_names(names)
        self._dial = dial
        self._states = {name: self._states.get(name, STARTING) for name in names}
        self._facts = {name: facts for name, facts in self._facts.items() if name in self._states}
        self._gates = {name: self._gates.get(name) or Gate() for name in names}

    def set_ready(self, name: str, *upstreams: Upstream) -> None:
        """Send the variant's requests to these upstreams from now on.

        Args:
            name: The variant.
            upstreams: Who answers; replace any earlier ones.

        Raises:
            UnknownVariantError: If the table was made without this name.
        """
        self._state(name)
        self._states[name] = upstreams

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

    def find(self, name: str, *, tried: Collection[Upstream] = ()) -> Upstream:
        """Who answers for a variant: of its upstreams that are well, the least busy one.

        Args:
            name: The variant, as the client spells it; with a dial, any that it answers to.
            tried: Upstreams that this request has failed with; taken only where there is no other.

        Returns:
            The upstream.

        Raises:
            UnknownVariantError: If there is no such variant.
            VariantDownError: If it can't answer now.
        """
        state = self._state(self._listed(name))
        if isinstance(state, str):
            raise VariantDownError(name, state)
        found = self.load.least_busy([u for u in state if u not in tried])
        if found is None:
            found = self.load.least_busy(state)
        if found is None:
            raise VariantDownError(name, UNREACHABLE)
        return found

    def upstreams(self, name: str | None = None) -> tuple[Upstream, ...]:
        """Every upstream, or those of one variant, each once, well or not.

        Raises:
            UnknownVariantError: If there is no such variant.
        """
        states = self._states.values() if name is None else [self._state(self._listed(name))]
        return tuple(dict.fromkeys(u for s in states if not isinstance(s, str) for u in s))

    def down_reason(self, name: str) -> str | None:
        """Why a variant is down, or None when it is ready.

        Args:
            name: The variant.

        Returns:
            The reason given to `set_down`, "starting", or that no upstream can be reached.

        Raises:
            UnknownVariantError: If the table was made without this name.
        """
        state = self._state(name)
        if isinstance(state, str):
            return state
        return None if self.load.least_busy(state) else UNREACHABLE

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
        if facts is None or self._dial is None or not self.is_of_dial(name):
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
        """The name under which a variant's engines are known: a dial answers for all its names."""
        if name in self._states or self._dial is None or self._dial.of_model(name) is None:
            return name
        return next((listed for listed in self._dial.variants if listed in self._states), name)

    def _state(self, name: str) -> tuple[Upstream, ...] | str:
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
