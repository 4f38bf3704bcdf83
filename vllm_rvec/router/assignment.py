"""Which variant of a split a request gets: by its key, always the same; without a key, by chance.

Pure functions of what they are given, so that every replica and every restart agrees. Where weights
come from, which variants are up and what is recorded is for others.

Weighted rendezvous hashing (Thaler and Ravishankar 1998; the weights as in the logarithmic method
of Schindelhauer and Schomaker, "Weighted Distributed Hash Tables", 2005): each variant draws a
number u in (0, 1) for the key, and the lowest -ln(u) / weight wins, as in a race of exponential
clocks. A variant wins with probability weight / sum of weights. A greater weight improves that
variant's own score and no other: raising it only ever adds users to it, however many variants there
are.
"""

from __future__ import annotations

import enum
import hashlib
import math
from typing import TYPE_CHECKING

from vllm_rvec.errors import ConfigError

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable, Mapping

__all__ = ["KEY_HEADERS", "Reason", "assign", "random_variant", "sticky_key", "unit_of", "user_in"]

KEY_HEADERS = ("X-Rvec-Key", "X-Session-ID")
"""Headers that name who asks, or within what; the first that says something counts."""

USER_FIELDS = ("user", "safety_identifier", "prompt_cache_key")
"""Fields of OpenAI's bodies that name who asks; the first that says something counts."""

UNIT_HEX_DIGITS = 16
"""64 bits: among a million users, two share a unit with a probability of 3e-8."""


class Reason(enum.StrEnum):
    """Why a variant answered: the value of `X-Rvec-Reason`."""

    EXPLICIT = "explicit"
    """The request named the variant."""

    ALIAS = "alias"
    """The request named an alias that is just another name."""

    STICKY = "sticky"
    """A split chose by the request's key: the same key gets the same variant."""

    RANDOM = "random"
    """A split chose by chance: the request had no key."""

    ALPHA = "alpha"
    """The request asked for this alpha."""

    FALLBACK = "fallback"
    """The chosen variant could not answer, and this one is configured to stand in for it."""

    OWNER = "owner"
    """The request follows up on a response that this variant made."""


def assign(key: str, weights: Mapping[str, float], *, salt: str, experiment: str) -> str:
    """The variant that a key gets; the same in every process and on every machine.

    Args:
        key: Who asks (`sticky_key`). Any text.
        weights: Each variant's relative weight: 50 and 50 is the same as 1 and 1. A weight of 0
            never wins. The order doesn't matter.
        salt: Another salt deals all users anew.
        experiment: The alias. Two experiments deal their users independently of each other.

    Returns:
        One of the names in `weights`.

    Raises:
        ConfigError: If a weight is negative or not finite, or none is above 0.

    >>> assign("alice", {"base": 50, "enhanced@1": 50}, salt="2026-11", experiment="assistant")
    'base'
    """
    # The name decides between equal scores: they need an answer, and come once in 2**53 or so.
    _, winner = min(
        (_score(key, variant, salt, experiment) / weight, variant)
        for variant, weight in _in_the_running(weights).items()
    )
    return winner


def random_variant(weights: Mapping[str, float], rng: random.Random) -> str:
    """A variant by chance, as often as its weight says: for a request without a key.

    Args:
        weights: As for `assign`.
        rng: Where chance comes from.

    Returns:
        One of the names in `weights`.

    Raises:
        ConfigError: As for `assign`.
    """
    running = _in_the_running(weights)
    return rng.choices(list(running), list(running.values()))[0]


def sticky_key(
    headers: Mapping[str, str], body_user: str | None, client_name: str | None
) -> str | None:
    """Who asks, as far as the request says: what `assign` makes sticky.

    Args:
        headers: The request's headers; names in any case, as aiohttp has them.
        body_user: Who asks by the request's body (`user_in`).
        client_name: The name of the client's own key. None for a key that clients share: behind
            that is no one user.

    Returns:
        The first that says something of `X-Rvec-Key`, `X-Session-ID`, the body, the client; None
        if none does.
    """
    named = (*(headers.get(name) for name in KEY_HEADERS), body_user, client_name)
    return _first_said(named)


def user_in(body: Mapping[str, object]) -> str | None:
    """Who asks by a body's `user`, `safety_identifier` or `prompt_cache_key`, in this order.

    Args:
        body: The body, as JSON gave it. What is no text in it is passed over.

    >>> user_in({"user": " ", "prompt_cache_key": "thread-7"})
    'thread-7'
    """
    return _first_said(body.get(field) for field in USER_FIELDS)


def unit_of(key: str, salt: str, experiment: str) -> str:
    """What stands in the results for a key: the same for the same key, and not the key.

    A pseudonym, not anonymity: who knows the salt can find out whether a key they guess is there.

    Args:
        key: Who asks.
        salt: The experiment's salt.
        experiment: The alias: units of two experiments can't be brought together.

    Returns:
        16 hexadecimal digits.

    >>> unit_of("alice", "2026-11", "assistant")
    '77c75d99f9a76e22'
    """
    return _digest(salt, experiment, key).hex()[:UNIT_HEX_DIGITS]


def _first_said(candidates: Iterable[object]) -> str | None:
    for candidate in candidates:
        if isinstance(candidate, str) and (said := candidate.strip()):
            return said
    return None


def _in_the_running(weights: Mapping[str, float]) -> dict[str, float]:
    if not all(0 <= weight < math.inf for weight in weights.values()):  # NaN fails this, too
        raise ConfigError("A split's weights are numbers that are not negative.")
    running = {variant: weight for variant, weight in weights.items() if weight > 0}
    if not running:
        raise ConfigError(
            "A split has no variant with a weight above 0.",
            why="no request could be answered",
            fix="Give at least one variant a weight.",
        )
    return running


def _score(key: str, variant: str, salt: str, experiment: str) -> float:
    """-ln(u): exponentially distributed with mean 1."""
    # 53 bits are what a float holds. Integers are divided exactly and then rounded, so that the
    # quotient is neither 0 nor 1.
    drawn = int.from_bytes(_digest(salt, experiment, variant, key)[:8]) >> 11
    return -math.log((drawn + 1) / (2**53 + 1))


def _digest(*parts: str) -> bytes:
    """SHA-256 of some texts, with their lengths: `a|b` and `c` must not be `a` and `b|c`."""
    # Bytes that are not UTF-8 come from headers as lone surrogates, and JSON may have some.
    encoded = [part.encode("utf-8", "surrogatepass") for part in parts]
    return hashlib.sha256(b"".join(b"%d:%s|" % (len(part), part) for part in encoded)).digest()
