"""Whose key a request shows, and that no key or hash shows up anywhere else."""

from __future__ import annotations

import hmac
import re
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
from multidict import CIMultiDict
from pydantic import ValidationError

from vllm_rvec.errors import ConfigError
from vllm_rvec.router.keyring import (
    ClientKey,
    KeyConfig,
    Keyring,
    hash_key,
    make_key,
)

if TYPE_CHECKING:
    from vllm_rvec.router.request import Request

KEYS = {"team-a": "rvec-a", "team-b": "rvec-b"}
CONFIGS = {name: KeyConfig(sha256=hash_key(key)) for name, key in KEYS.items()}
SHARED = "everybody's"


def request_with(**headers: str) -> Request:
    """A request as a keyring looks at it; aiohttp's own mock takes no surrogates."""
    named = CIMultiDict({name.replace("_", "-"): value for name, value in headers.items()})
    return cast("Request", SimpleNamespace(headers=named))


def bearer(key: str) -> Request:
    return request_with(Authorization=f"Bearer {key}")


@pytest.mark.parametrize(("name", "key"), KEYS.items())
def test_each_client_is_known_by_its_key(name: str, key: str) -> None:
    """Shown as OpenAI's clients do, or Anthropic's; `bearer` in any case."""
    ring = Keyring(CONFIGS, None)
    assert ring.identify(bearer(key)) == ClientKey(name)
    assert ring.identify(request_with(authorization=f"bearer  {key} ")) == ClientKey(name)
    assert ring.identify(request_with(x_api_key=key)) == ClientKey(name)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer rvec-"},
        {"Authorization": "Bearer rvec-A"},
        {"Authorization": "Basic rvec-a"},
        {"Authorization": "rvec-a"},
        {"x-api-key": ""},
        {"x-api-key": "é\udcff"},
        {"x-api-key": hash_key("rvec-a")},
        {"cookie": "rvec-a"},
    ],
)
def test_what_is_no_key_is_nobody(headers: dict[str, str]) -> None:
    """Nor is a key's hash a key: whoever reads the file gets in nowhere."""
    ring = Keyring(CONFIGS, SHARED)
    assert ring.identify(request_with(**headers)) is None
    assert not ring.is_open


def test_the_shared_key_lets_in_and_names_nobody() -> None:
    """Many people hold it: no one of them is its user."""
    ring = Keyring(CONFIGS, SHARED)
    assert ring.identify(bearer(SHARED)) == ClientKey(None)
    assert ring.identify(bearer(KEYS["team-a"])) == ClientKey("team-a")
    both = Keyring(CONFIGS, KEYS["team-a"])
    assert both.identify(bearer(KEYS["team-a"])) == ClientKey("team-a")
    assert Keyring({}, "schlüssel").identify(bearer("schlüssel")) == ClientKey(None)


def test_of_two_keys_the_bearer_counts() -> None:
    """One wrong key doesn't spoil a right one; of two right ones the first counts."""
    ring = Keyring(CONFIGS, None)
    both = request_with(Authorization="Bearer rvec-b", x_api_key="rvec-a")
    assert ring.identify(both) == ClientKey("team-b")
    half = request_with(Authorization="Bearer wrong", x_api_key="rvec-a")
    assert ring.identify(half) == ClientKey("team-a")


def test_without_keys_the_ring_is_open() -> None:
    """One key of any kind shuts it."""
    assert Keyring({}, None).is_open
    assert not Keyring(CONFIGS, None).is_open
    assert not Keyring({}, SHARED).is_open


@pytest.mark.parametrize("key", ["wrong", *KEYS.values(), SHARED])
def test_every_hash_is_compared_whatever_was_found(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No early exit, and by `hmac.compare_digest` alone: the time tells nothing."""
    compared: list[bytes] = []
    compare = hmac.compare_digest

    def counting(offered: bytes, expected: bytes) -> bool:
        compared.append(expected)
        return compare(offered, expected)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    Keyring(CONFIGS, SHARED).identify(bearer(key))
    hashes = [hash_key(known) for known in (*KEYS.values(), SHARED)]
    assert [digest.hex() for digest in compared] == hashes


def test_an_upper_case_hash_is_the_same_hash() -> None:
    """Some tools print it so."""
    ring = Keyring({"team-a": KeyConfig(sha256=hash_key("rvec-a").upper())}, None)
    assert ring.identify(bearer("rvec-a")) == ClientKey("team-a")


def test_two_clients_with_one_key_are_refused() -> None:
    """By name; however the hash is written."""
    twice = CONFIGS | {"team-c": KeyConfig(sha256=hash_key("rvec-a").upper())}
    with pytest.raises(ConfigError, match="'team-a' and 'team-c' have the same key"):
        Keyring(twice, None)


def test_an_empty_key_is_refused() -> None:
    """Shared or hashed: it looks like protection and is none."""
    with pytest.raises(ConfigError, match="empty"):
        Keyring({}, "")
    with pytest.raises(ConfigError, match="'team-a' is the empty one"):
        Keyring({"team-a": KeyConfig(sha256=hash_key(""))}, None)


def test_the_configuration_of_a_client_is_found() -> None:
    """Nobody, the shared key and a client that was taken away have none."""
    ring = Keyring(CONFIGS, SHARED)
    assert ring.config_of(ClientKey("team-b")) is CONFIGS["team-b"]
    for client in (None, ClientKey(None), ClientKey("gone")):
        assert ring.config_of(client) is None


def test_no_key_and_no_hash_is_in_any_repr() -> None:
    """Logs and tracebacks print them."""
    ring = Keyring(CONFIGS, SHARED)
    shown = " ".join(
        f"{thing!r} {thing!s}"
        for thing in (ring, CONFIGS["team-a"], ring.identify(bearer("rvec-a")))
    )
    for secret in ("rvec-a", SHARED, hash_key("rvec-a"), hash_key(SHARED)):
        assert secret not in shown


def test_a_key_in_place_of_its_hash_is_refused_and_not_quoted() -> None:
    """The likely mistake; the message must not carry the secret into a log."""
    key, _ = make_key()
    with pytest.raises(ValidationError) as caught:
        KeyConfig(sha256=key)
    assert key not in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"sha256": "ab"},
        {"sha256": hash_key("x") + "\n"},
        {"requests_per_minute": 0},
        {"requests_per_minute": float("inf")},
        {"requests_per_minute": "5"},
        {"max_in_flight": 0},
        {"max_in_flight": True},
        {"max_inflight": 1},
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    """Each alone, beside a hash that is right."""
    with pytest.raises(ValidationError):
        KeyConfig.model_validate({"sha256": hash_key("x")} | wrong)
    right = {"sha256": hash_key("x"), "requests_per_minute": 0.5, "max_in_flight": 1}
    assert KeyConfig.model_validate(right).requests_per_minute == 0.5


def test_every_setting_is_described() -> None:
    """For the schema that editors show."""
    assert all(field.description for field in KeyConfig.model_fields.values())


def test_a_new_key_opens_and_is_never_made_twice() -> None:
    """256 random bits behind a prefix that scanners find; the hash is the key's own."""
    made = [make_key() for _ in range(100)]
    assert len({key for key, _ in made}) == 100
    for key, sha256 in made:
        assert re.fullmatch(r"rvec-[A-Za-z0-9_-]{43}", key)
        assert sha256 == hash_key(key)
    key, sha256 = made[0]
    ring = Keyring({"new": KeyConfig(sha256=sha256)}, None)
    assert ring.identify(bearer(key)) == ClientKey("new")
