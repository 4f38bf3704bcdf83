"""Who gets which variant: shares, stickiness, and that neither changes behind users' backs."""

from __future__ import annotations

import doctest
import hashlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict
from scipy.special import bdtr, bdtrc, chdtrc

from vllm_rvec.errors import ConfigError
from vllm_rvec.router import assignment
from vllm_rvec.router.assignment import (
    Reason,
    assign,
    random_variant,
    sticky_key,
    unit_of,
    user_in,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

MANY = [f"user-{number}" for number in range(100_000)]
SOME = MANY[:2000]

NAMES = ("base", "enhanced@0.25", "enhanced@0.5", "enhanced@1", "enhanced@1.5")

UNLIKELY = 1e-9
"""A right program fails a check about once in a billion times."""

splits = st.lists(
    st.one_of(st.integers(1, 1000), st.floats(0.001, 1000, exclude_min=True)),
    min_size=2,
    max_size=5,
).map(lambda weights: dict(zip(NAMES, weights, strict=False)))
salts = st.text(max_size=8)

GOLDEN_SPLIT = {"base": 50, "enhanced@0.5": 25, "enhanced@1": 24, "tiny": 1}


def deal(keys: list[str], weights: Mapping[str, float], salt: str, experiment: str) -> list[str]:
    return [assign(key, weights, salt=salt, experiment=experiment) for key in keys]


def chance(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - no secret


def check_shares(counts: Mapping[str, int], weights: Mapping[str, float], total: int) -> None:
    """Exact binomial tails: also right where few are expected."""
    for name, weight in weights.items():
        share = weight / sum(weights.values())
        count = counts.get(name, 0)
        assert bdtr(count, total, share) > UNLIKELY, (name, count, share)
        assert count == 0 or bdtrc(count - 1, total, share) > UNLIKELY, (name, count, share)


@settings(max_examples=6)
@given(weights=splits, salt=salts, experiment=salts)
def test_shares_are_within_binomial_bounds(
    weights: dict[str, float], salt: str, experiment: str
) -> None:
    """Over 100,000 keys, for 2 to 5 variants of any weights."""
    check_shares(Counter(deal(MANY, weights, salt, experiment)), weights, len(MANY))


def test_a_small_canary_gets_its_share() -> None:
    """One in a thousand users, and the two others keep their proportion."""
    weights = {"base": 665.7, "enhanced@0.5": 333.3, "enhanced@1": 1}
    check_shares(Counter(deal(MANY, weights, "s", "e")), weights, len(MANY))


@settings(max_examples=40)
@given(weights=splits, salt=salts, which=st.integers(0, 4), factor=st.floats(1, 100))
def test_raising_a_weight_only_adds_users_to_it(
    weights: dict[str, float], salt: str, which: int, factor: float
) -> None:
    """Whoever moves, moves to the raised variant, with any number of variants."""
    raised = list(weights)[which % len(weights)]
    before = deal(SOME, weights, salt, "e")
    after = deal(SOME, weights | {raised: weights[raised] * factor}, salt, "e")
    assert {new for old, new in zip(before, after, strict=True) if old != new} <= {raised}


def test_a_ramp_from_0_to_all_never_takes_a_user_back() -> None:
    """A canary that grows step by step, beside two others, and starts with nobody."""
    got_it: set[str] = set()
    for weight in (0, 1, 5, 25, 100, 1e6):
        weights = {"base": 60, "enhanced@0.5": 40, "enhanced@1": weight}
        dealt = deal(SOME, weights, "s", "e")
        now = {key for key, name in zip(SOME, dealt, strict=True) if name == "enhanced@1"}
        assert now >= got_it
        assert bool(now) is (weight > 0)
        got_it = now


def test_a_new_variant_takes_users_and_moves_no_other() -> None:
    """Between the old variants nobody changes place; and back again when it goes."""
    old = deal(SOME, {"base": 3, "enhanced@0.5": 1}, "s", "e")
    new = deal(SOME, {"base": 3, "enhanced@0.5": 1, "enhanced@1": 2}, "s", "e")
    moved = {b for a, b in zip(old, new, strict=True) if a != b}
    assert moved == {"enhanced@1"}


@settings(max_examples=20)
@given(weights=splits, power=st.integers(-20, 20), salt=salts)
def test_only_relative_weights_count(weights: dict[str, float], power: int, salt: str) -> None:
    """Powers of two scale without rounding: not one user may move."""
    scaled = {name: weight * 2.0**power for name, weight in weights.items()}
    assert deal(SOME, weights, salt, "e") == deal(SOME, scaled, salt, "e")


def test_50_to_50_is_1_to_1() -> None:
    """And 0.5 to 0.5, and in any order."""
    dealt = deal(SOME, {"base": 50, "enhanced@1": 50}, "s", "e")
    assert deal(SOME, {"base": 1, "enhanced@1": 1}, "s", "e") == dealt
    assert deal(SOME, {"enhanced@1": 0.5, "base": 0.5}, "s", "e") == dealt


def test_a_weight_of_0_never_wins() -> None:
    """Not by hashing, nor by chance; though it comes first or last."""
    weights = {"base": 0, "enhanced@1": 0.001, "tiny": 0}
    assert set(deal(SOME, weights, "s", "e")) == {"enhanced@1"}
    rng = chance(1)
    assert {random_variant(weights, rng) for _ in range(1000)} == {"enhanced@1"}


@pytest.mark.parametrize(
    "weights",
    [{}, {"base": 0}, {"base": 1, "x": -1}, {"base": 1, "x": float("nan")}, {"base": float("inf")}],
)
def test_weights_that_no_split_has_are_refused(weights: dict[str, float]) -> None:
    """By both ways to choose."""
    with pytest.raises(ConfigError):
        assign("a", weights, salt="", experiment="")
    with pytest.raises(ConfigError):
        random_variant(weights, chance(1))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("2026-11", "assistant"), ("2026-12", "assistant")),
        (("2026-11", "assistant"), ("2026-11", "coder")),
        (("ab", "c"), ("a", "bc")),
        (("a|b", "c"), ("a", "b|c")),
        (("", "x"), ("x", "")),
    ],
)
def test_experiments_and_salts_are_independent(
    one: tuple[str, str], other: tuple[str, str]
) -> None:
    """Chi-square of the cross table: who got what there says nothing about here."""
    weights = {"base": 5, "enhanced@0.5": 3, "enhanced@1": 2}
    keys = MANY[:50_000]
    pairs = Counter(zip(deal(keys, weights, *one), deal(keys, weights, *other), strict=True))
    rows, columns = Counter[str](), Counter[str]()
    for (row, column), count in pairs.items():
        rows[row] += count
        columns[column] += count
    chi_square = 0.0
    for row in weights:
        for column in weights:
            expected = rows[row] * columns[column] / len(keys)
            chi_square += (pairs[row, column] - expected) ** 2 / expected
    assert chdtrc(4, chi_square) > 1e-4  # the keys are fixed: this is no matter of luck


def test_another_process_gives_the_same_answer() -> None:
    """With another seed for Python's own hashes, and so another order of sets."""
    code = (
        "import json, sys\n"
        "from vllm_rvec.router.assignment import assign, unit_of\n"
        "keys, weights = json.load(sys.stdin)\n"
        "print(json.dumps([[assign(key, weights, salt='s', experiment='e'),"
        " unit_of(key, 's', 'e')] for key in keys]))"
    )
    keys = [*SOME[:500], "", "ü", "😀", "\ud800", "\udcff"]
    mine = [
        [assign(key, GOLDEN_SPLIT, salt="s", experiment="e"), unit_of(key, "s", "e")]
        for key in keys
    ]
    for seed in ("0", "1234"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps([keys, GOLDEN_SPLIT]),
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert json.loads(done.stdout) == mine


def test_users_stay_where_the_last_release_put_them() -> None:
    """Pinned: a change of the hash would reshuffle every running experiment."""
    dealt = deal(MANY[:10_000], GOLDEN_SPLIT, "2026-11", "assistant")
    shown = "".join(name[-1] for name in dealt[:64])
    assert shown == "5e1ee5ee1e515ee1ee51ee115eeeeee1515e115e1115e1ee5eee55e51e151eee"
    assert hashlib.sha256("\n".join(dealt).encode()).hexdigest() == (
        "c9f9acd9a292cb64527b8b2d7e4e9547dbef8e37dd4f9743883d28379d237f56"
    )
    odd = ["", "a", "ü", "\udcff", "\ud800", "x" * 10_000]
    halves = {"base": 1, "enhanced@1": 1}
    assert [name == "base" for name in deal(odd, halves, "s", "e")] == [
        True, False, False, True, False, False,
    ]  # fmt: skip


def test_units_stay_what_they_are() -> None:
    """Pinned: the results of one user must not fall apart in two."""
    assert unit_of("alice", "2026-11", "assistant") == "77c75d99f9a76e22"
    assert doctest.testmod(assignment).failed == 0


@given(key=st.text(), salt=salts, experiment=salts)
def test_a_unit_is_short_and_changes_with_all_it_is_made_of(
    key: str, salt: str, experiment: str
) -> None:
    """16 digits for any text; another key, salt or experiment gives another one."""
    unit = unit_of(key, salt, experiment)
    assert len(unit) == 16
    assert set(unit) <= set("0123456789abcdef")
    others = {
        unit_of(key + "x", salt, experiment),
        unit_of(key, salt + "x", experiment),
        unit_of(key, salt, experiment + "x"),
    }
    assert len({unit} | others) == 4


def test_chance_follows_the_weights() -> None:
    """Without a key; the same generator gives the same choices."""
    weights = {"base": 70.5, "enhanced@0.5": 29, "enhanced@1": 0.5}
    rng = chance(7)
    chosen = [random_variant(weights, rng) for _ in range(20_000)]
    check_shares(Counter(chosen), weights, len(chosen))
    again = chance(7)
    assert [random_variant(weights, again) for _ in range(100)] == chosen[:100]


def test_the_most_explicit_key_counts() -> None:
    """Taken away one by one, each gives way to the next; the last leaves nothing."""
    headers = CIMultiDict({"x-rvec-key": "1", "X-SESSION-ID": "2"})
    assert sticky_key(headers, "3", "4") == "1"
    del headers["X-Rvec-Key"]
    assert sticky_key(headers, "3", "4") == "2"
    del headers["X-Session-ID"]
    assert sticky_key(headers, "3", "4") == "3"
    assert sticky_key(headers, None, "4") == "4"
    assert sticky_key(headers, None, None) is None


def test_a_blank_key_is_none() -> None:
    """All clients that send an empty header would be one user."""
    assert sticky_key({"X-Rvec-Key": " ", "X-Session-ID": ""}, "", " team ") == "team"


def test_a_body_names_its_user_in_three_ways() -> None:
    """In order; what is no text, or blank, is passed over."""
    body: dict[str, object] = {"prompt_cache_key": "3", "safety_identifier": "2", "user": "1"}
    assert user_in(body) == "1"
    assert user_in(body | {"user": None}) == "2"
    assert user_in(body | {"user": 17, "safety_identifier": ["x"]}) == "3"
    assert user_in({"model": "base"}) is None


def test_reasons_are_the_words_of_the_header() -> None:
    """Clients and dashboards read them."""
    assert [f"{reason}" for reason in Reason] == [
        "explicit", "alias", "sticky", "random", "alpha", "fallback", "owner",
    ]  # fmt: skip
