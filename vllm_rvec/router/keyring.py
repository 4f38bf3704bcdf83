"""Who a request comes from: what it shows as its key, and whose that is.

The file of keys holds hashes only. Plain SHA-256, without salt or stretching, is right here: keys
are 256 random bits (`make_key`), which nobody finds by trying, unlike passwords. What a client may
do with its key is for `limits`.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from vllm_rvec.errors import ConfigError
from vllm_rvec.router.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from vllm_rvec.router.request import Request

__all__ = ["ClientKey", "KeyConfig", "Keyring", "hash_key", "make_key"]

KEY_PREFIX = "rvec-"
"""What our keys begin with, so that scanners for leaked secrets and people know them."""

KEY_BYTES = 32


class KeyConfig(Settings):
    """One client's key, and how much it may ask."""

    sha256: str = Field(pattern="^[0-9a-fA-F]{64}$", repr=False)
    """SHA-256 of the key, in hexadecimal. `vllm-rvec new-key` makes a key and prints this."""

    requests_per_minute: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """How many requests per minute the client may begin; no limit if not given."""

    max_in_flight: int | None = Field(default=None, ge=1)
    """How many of the client's requests may be under way at once; no limit if not given."""


@dataclass(frozen=True, slots=True)
class ClientKey:
    """Whose key a request showed. Holds a name and nothing secret."""

    name: str | None
    """The key's name in the configuration; None for the shared key, which is nobody's own."""


class Keyring:
    """The keys that clients may show.

    Args:
        keys: Each client's key, by the client's name.
        shared_key: A key that any number of clients hold, in plain text; None for none.

    Raises:
        ConfigError: If two clients have the same key, or a key is empty: that would look like
            protection and be none.
    """

    def __init__(self, keys: Mapping[str, KeyConfig], shared_key: str | None) -> None:
        _check_hashes(keys)
        if shared_key == "":
            raise ConfigError(
                "The router's API key is empty.",
                fix="Set a key, or none at all to let everybody in.",
            )
        self._configs = dict(keys)
        self._known = [
            (bytes.fromhex(config.sha256), ClientKey(name)) for name, config in keys.items()
        ]
        if shared_key is not None:
            # Last: of a key that is both, the client's own name says more.
            self._known.append((_digest(shared_key), ClientKey(None)))

    @property
    def is_open(self) -> bool:
        """Whether there are no keys at all, and everybody is let in."""
        return not self._known

    def identify(self, request: Request) -> ClientKey | None:
        """Whose key a request shows.

        Args:
            request: Any request.

        Returns:
            The client; None if the request shows no key that is known. Of an open ring, always
            None: ask `is_open` first.
        """
        # Every key is compared with every hash, whatever was found before: the time it takes tells
        # nothing about which keys there are.
        found = [
            client
            for key in _offered_keys(request)
            for offered in (_digest(key),)
            for expected, client in self._known
            if hmac.compare_digest(offered, expected)
        ]
        return found[0] if found else None

    def shares_key_with(self, other: Keyring) -> bool:
        """Whether a key is in both."""
        return bool({digest for digest, _ in self._known} & {digest for digest, _ in other._known})

    def config_of(self, client: ClientKey | None) -> KeyConfig | None:
        """What is configured for a client.

        Args:
            client: What `identify` gave, from this ring or an older one.

        Returns:
            None where nothing is: the shared key, nobody, or a client that is no longer there.
        """
        return None if client is None or client.name is None else self._configs.get(client.name)


def make_key() -> tuple[str, str]:
    """A new random key.

    Returns:
        The key, for the client, and its SHA-256 in hexadecimal, for the configuration.
    """
    key = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
    return key, hash_key(key)


def hash_key(key: str) -> str:
    """A key's SHA-256 in hexadecimal, as the configuration holds it.

    Args:
        key: The key.
    """
    return _digest(key).hex()


def _check_hashes(keys: Mapping[str, KeyConfig]) -> None:
    owners: dict[str, str] = {}
    for name, config in keys.items():
        sha256 = config.sha256.lower()
        if sha256 == hash_key(""):
            raise ConfigError(
                f"The key of {name!r} is the empty one.",
                why="anybody can show it",
                fix="Make one with `vllm-rvec new-key`.",
            )
        if (owner := owners.setdefault(sha256, name)) != name:
            raise ConfigError(
                f"{owner!r} and {name!r} have the same key.",
                why="their requests could not be told apart",
                fix="Make a key of its own for one of them with `vllm-rvec new-key`.",
            )


def _offered_keys(request: Request) -> Iterator[str]:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        yield token.strip()
    if (key := request.headers.get("x-api-key")) is not None:
        yield key


def _digest(key: str) -> bytes:
    # What is not UTF-8 in a header comes as surrogates.
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
