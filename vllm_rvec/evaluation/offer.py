"""What an address that is asked can do about alpha: any in a range, or some fixed ones.

Read from `/v1/models`, where routers and engines of ours say of each variant which alpha it has.
Not here: which arms follow from that (`arms`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_rvec.errors import ConfigError, FetchError
from vllm_rvec.vector.alpha import alpha_text
from vllm_rvec.vector.dial import AlphaRange

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["DialOffer", "FixedOffer", "Offer", "Place", "TurnedOffer", "read_offer"]

SHOWN_NAMES = 8


@dataclass(frozen=True, slots=True)
class Place:
    """How one point of the sweep is asked for; or why it can't be."""

    model: str = ""
    """The served name."""
    alphas: float | Mapping[str, float] | None = None
    """Sent as `alpha`; None where the name says it."""
    problem: str = ""
    """Why it can't be had; empty where it can."""


class Offer(Protocol):
    """What can be asked for."""

    @property
    def vector(self) -> str | None:
        """The stored vector, as the address calls it."""

    @property
    def fingerprint(self) -> str | None:
        """Which weights it adds, where the address says it."""

    def place(self, alpha: float, *, is_random: bool) -> Place:
        """Find how an alpha of the vector, or of the random one, is asked for."""


@dataclass(frozen=True, slots=True)
class DialOffer:
    """An engine that answers any alpha in a range, each request its own."""

    model: str
    """A name that it answers to."""
    allowed: AlphaRange
    vector_name: str | None = None
    """Of the vector among several; None where one number is meant for all there are."""
    random_name: str | None = None
    """Of the random vector beside it, if there is one."""
    vector: str | None = None
    fingerprint: str | None = None

    def place(self, alpha: float, *, is_random: bool) -> Place:
        """Ask by the request's `alpha`."""
        if is_random and self.random_name is None:
            return Place(problem="it holds no random vector, which only an engine of our own gets")
        low, high = self.allowed
        if not low <= alpha <= high:
            return Place(problem=f"alpha {alpha_text(alpha)} is outside of its {self.allowed}")
        name = self.random_name if is_random else self.vector_name
        return Place(self.model, alpha if name is None or alpha == 0 else {name: alpha})


@dataclass(frozen=True, slots=True)
class FixedOffer:
    """Variants that have one alpha each."""

    variants: Mapping[str, float]
    """Alpha by served name."""
    vector: str | None = None
    fingerprint: str | None = None

    def place(self, alpha: float, *, is_random: bool) -> Place:
        """Ask by name."""
        if is_random:
            return Place(problem="no variant has a random vector")
        found = next((name for name, of in self.variants.items() if of == alpha), None)
        if found is None:
            there = ", ".join(alpha_text(of) for of in self.variants.values())
            return Place(problem=f"no variant has alpha {alpha_text(alpha)}; there are {there}")
        return Place(found)


@dataclass(frozen=True, slots=True)
class TurnedOffer:
    """A fused engine of our own, which is brought to each alpha in turn."""

    model: str
    vector: str | None = None
    fingerprint: str | None = None
    has_random: bool = True

    def place(self, alpha: float, *, is_random: bool) -> Place:
        """Ask by name, once the engine has this alpha."""
        del alpha
        if is_random and not self.has_random:
            return Place(problem="there is no random vector")
        return Place(self.model)


class _Facts(BaseModel):
    """What a card says of alpha; aliases say other things."""

    model_config = ConfigDict(extra="ignore")

    alpha: float | dict[str, float] | None = None
    alpha_range: tuple[float, float] | None = None
    vector: str | None = None
    fingerprint: str | None = None


class _Card(BaseModel):
    id: str
    rvec: _Facts | None = None


class _CardList(BaseModel):
    data: list[_Card]


@dataclass(slots=True)
class _Found:
    dials: list[_Card] = field(default_factory=list)
    fixed: list[_Card] = field(default_factory=list)


def read_offer(body: bytes, address: str, model: str | None = None) -> Offer:
    """Read the answer of `/v1/models`.

    Args:
        body: As it came.
        address: For messages.
        model: The target's name: a server that says nothing of alpha and has this model is taken
            for alpha 0.

    Raises:
        FetchError: It is no list of models.
        ConfigError: Nothing is known of any alpha, or variants of different vectors are mixed.
    """
    try:
        cards = _CardList.model_validate_json(body).data
    except ValidationError as exc:
        raise FetchError(
            f"{address} answers something else than a list of models.",
            fix="Give the base URL of an OpenAI-compatible server, such as http://localhost:8000.",
        ) from exc
    found = _sorted(cards)
    if found.dials:
        return _dial(found.dials)
    if found.fixed:
        return _fixed(found.fixed, address)
    if model is not None and any(card.id == model for card in cards):
        return FixedOffer({model: 0.0})
    raise ConfigError(
        f"{address} does not say which alpha any of its models has",
        why=f"it lists {_shown(card.id for card in cards) or 'none'}",
        fix="give the address of `vllm-rvec serve` or `route`; or `--model NAME` with one of these "
        "names, to take it for the target at alpha 0",
    )


def _sorted(cards: Sequence[_Card]) -> _Found:
    found = _Found()
    for card in cards:
        if card.rvec is None:
            continue
        if card.rvec.alpha_range is not None:
            found.dials.append(card)
        elif isinstance(card.rvec.alpha, float):
            found.fixed.append(card)
    return found


def _dial(cards: Sequence[_Card]) -> DialOffer:
    first = cards[0]
    facts = first.rvec or _Facts()
    allowed = AlphaRange(*(facts.alpha_range or (0.0, 0.0)))
    return DialOffer(first.id, allowed, vector=facts.vector, fingerprint=facts.fingerprint)


def _fixed(cards: Sequence[_Card], address: str) -> FixedOffer:
    facts = [card.rvec or _Facts() for card in cards]
    vectors = {(one.fingerprint, one.vector) for one in facts if one.alpha}
    if len(vectors) > 1:
        raise ConfigError(
            f"{address} serves variants of different vectors",
            problems=[f"{card.id}: {one.vector}" for card, one in zip(cards, facts, strict=True)],
            why="a sweep compares alphas of one vector",
            fix="serve that vector's variants alone",
        )
    fingerprint, vector = next(iter(vectors), (None, None))
    alphas = {card.id: float(one.alpha) for card, one in zip(cards, facts, strict=True)}  # type: ignore[arg-type]
    return FixedOffer(alphas, vector, fingerprint)


def _shown(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:SHOWN_NAMES]) + (", ..." if len(listed) > SHOWN_NAMES else "")
