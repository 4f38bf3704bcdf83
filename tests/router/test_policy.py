"""Which variant answers: names, aliases, splits, wishes, and configurations that follow another."""

from __future__ import annotations

import random
from collections import Counter
from contextlib import ExitStack
from typing import Any

import pytest

from vllm_rvec.errors import ConfigError
from vllm_rvec.router import Routing, UnknownVariantError, Upstream, VariantFacts, VariantTable
from vllm_rvec.router.alphas import AlphaWish
from vllm_rvec.router.assignment import Reason, unit_of
from vllm_rvec.router.limits import VariantBusyError
from vllm_rvec.router.openai_errors import RequestRefusedError
from vllm_rvec.router.policy import Choice, Traffic
from vllm_rvec.router.variants import UnknownAliasError
from vllm_rvec.vector.dial import AlphaRange, Dial

SPLIT = {"base": 50, "enhanced@1": 50}
ALIASES = {"assistant": {"split": SPLIT, "salt": "s"}, "default": "base"}
KEYS = [f"user-{n}" for n in range(300)]


def fused() -> VariantTable:
    """Each variant has an engine of its own."""
    table = VariantTable(["base", "enhanced@0.5", "enhanced@1", "mystery"])
    for name, alpha in (("base", 0.0), ("enhanced@0.5", 0.5), ("enhanced@1", 1.0)):
        table.describe(name, VariantFacts(alpha, "v"))
    return table


def mixed(own_name: str = "own", own_alpha: float | None = 0.7) -> VariantTable:
    """Two variants of a dial with two vectors, and one with an engine of its own."""
    dial = Dial(("a", "b"), {"base": (0.0, 0.0), "enhanced@1": (1.0, 1.0)}, AlphaRange(-1.0, 2.0))
    table = VariantTable(["base", "enhanced@1", own_name], dial)
    table.describe(own_name, VariantFacts(own_alpha, "v"))
    for name in table.names():
        table.set_ready(name, Upstream("http://own" if name == own_name else "http://dial", None))
    return table


def traffic(table: VariantTable | None = None, *, aliases: Any = None, **settings: Any) -> Traffic:
    routing = Routing.model_validate(
        {"aliases": ALIASES if aliases is None else aliases, **settings}
    )
    return Traffic(routing, table or fused(), rng=random.Random(7))  # noqa: S311


def test_a_variants_own_name_is_explicit() -> None:
    """Whatever keys come with it."""
    chosen = traffic().choose("enhanced@1", None, "alice")
    assert chosen == Choice("enhanced@1", Reason.EXPLICIT)
    assert not chosen.is_exposure


def test_an_alias_of_one_is_another_name() -> None:
    """No split, no experiment."""
    chosen = traffic().choose("default", None, "alice")
    assert chosen == Choice("base", Reason.ALIAS, "default")
    assert not chosen.is_exposure


def test_a_split_is_sticky_by_key() -> None:
    """The same in another router; the unit tells who, and not the key."""
    one, other = traffic(), traffic()
    chosen = [one.choose("assistant", None, key) for key in KEYS]
    assert chosen == [other.choose("assistant", None, key) for key in KEYS]
    assert {choice.reason for choice in chosen} == {Reason.STICKY}
    assert [choice.unit for choice in chosen] == [unit_of(key, "s", "assistant") for key in KEYS]
    assert all(choice.is_exposure for choice in chosen)
    counts = Counter(choice.variant for choice in chosen)
    assert 110 < counts["base"] < 190


def test_without_a_key_chance_decides() -> None:
    """And it is an exposure of its own."""
    dealt = traffic()
    chosen = [dealt.choose("assistant", None, None) for _ in range(300)]
    assert {(choice.reason, choice.unit) for choice in chosen} == {(Reason.RANDOM, "")}
    assert all(choice.is_exposure for choice in chosen)
    assert 110 < Counter(choice.variant for choice in chosen)["base"] < 190


def test_another_salt_or_alias_deals_anew() -> None:
    """Two experiments must not be tied together."""
    aliases = {
        "one": {"split": SPLIT, "salt": "s"},
        "two": {"split": SPLIT, "salt": "t"},
        "three": {"split": SPLIT, "salt": "s"},
    }
    dealt = traffic(aliases=aliases)
    one, two, three = ([dealt.choose(name, None, key).variant for key in KEYS] for name in aliases)
    assert one != two
    assert one != three


def test_a_weight_of_0_gets_nobody() -> None:
    """With or without a key; it stays in the split, to be raised later."""
    dealt = traffic(aliases={"assistant": {"split": {"base": 0, "enhanced@1": 1}}})
    chosen = [dealt.choose("assistant", None, key) for key in [*KEYS, *[None] * 50]]
    assert {choice.variant for choice in chosen} == {"enhanced@1"}


def test_raising_a_weight_only_adds_users() -> None:
    """By hand as in the file."""
    dealt = traffic()
    before = {key: dealt.choose("assistant", None, key).variant for key in KEYS}
    dealt.set_weights("assistant", {"base": 50, "enhanced@1": 150})
    after = {key: dealt.choose("assistant", None, key).variant for key in KEYS}
    moved = {key for key in KEYS if before[key] != after[key]}
    assert moved
    assert {after[key] for key in moved} == {"enhanced@1"}


def test_a_configured_split_that_changes_replaces_weights_set_by_hand() -> None:
    """And only that: a reload for a certificate or a log file must not end an operator's ramp."""
    dealt = traffic()
    dealt.set_weights("assistant", {"base": 1})
    assert dealt.weights("assistant") == {"base": 1}
    assert dealt.choose("assistant", None, "alice").reason is Reason.ALIAS
    assert dealt.generation == 1
    dealt.replace(dealt.routing)
    assert dealt.weights("assistant") == {"base": 1}
    assert dealt.generation == 2
    changed = dealt.routing.aliases["assistant"].model_copy(
        update={"split": {"base": 90.0, "enhanced@1": 10.0}}
    )
    aliases = {**dealt.routing.aliases, "assistant": changed}
    dealt.replace(dealt.routing.model_copy(update={"aliases": aliases}))
    assert dealt.weights("assistant") == {"base": 90.0, "enhanced@1": 10.0}


def test_the_weights_given_are_copied() -> None:
    """Whoever gave them may go on to change them."""
    dealt, weights = traffic(), {"base": 1.0, "enhanced@1": 1.0}
    dealt.set_weights("assistant", weights)
    weights.clear()
    assert dealt.choose("assistant", None, "alice").variant in SPLIT


def test_weights_of_unknown_names_are_refused() -> None:
    """Both errors say what there is, and nothing changes."""
    dealt = traffic()
    with pytest.raises(UnknownAliasError, match="no alias `nobody`") as alias:
        dealt.set_weights("nobody", {"base": 1})
    assert "assistant, default" in alias.value.fix
    with pytest.raises(ConfigError, match="no variant ghost, spirit") as variant:
        dealt.set_weights("assistant", {"base": 1, "ghost": 1, "spirit": 2})
    assert "base, enhanced@0.5, enhanced@1, mystery" in variant.value.fix
    assert dealt.weights("assistant") == SPLIT


def test_unknown_aliases_without_any_are_refused() -> None:
    """The error does not list nothing."""
    with pytest.raises(UnknownAliasError) as caught:
        traffic(aliases={}).weights("assistant")
    assert caught.value.fix == "There are: none."


def test_an_unknown_name_lists_variants_and_aliases() -> None:
    """In their order."""
    with pytest.raises(UnknownVariantError, match="`gpt-4` does not exist") as caught:
        traffic().choose("gpt-4", None, None)
    there = ("base", "enhanced@0.5", "enhanced@1", "mystery", "assistant", "default")
    assert caught.value.names == there
    assert caught.value.fix == f"Ask for one of: {', '.join(there)}."


def test_an_unknown_name_with_a_dial_tells_its_range() -> None:
    """As any alpha in it has a name."""
    with pytest.raises(UnknownVariantError) as caught:
        traffic(mixed()).choose("enhanced@3", None, None)
    assert caught.value.fix.endswith("default, or for enhanced@A with any A in -1:2.")


@pytest.mark.parametrize(
    ("model", "alpha", "expected"),
    [
        ("base", 0, Choice("base", Reason.EXPLICIT)),
        ("base", 1.0, Choice("enhanced@1", Reason.ALPHA)),
        ("assistant", 0.5, Choice("enhanced@0.5", Reason.ALPHA, "assistant")),
        ("assistant", 1, Choice("enhanced@1", Reason.ALPHA, "assistant")),
        ("default", 0.0, Choice("base", Reason.ALPHA, "default")),
    ],
)
def test_a_wish_picks_the_variant_that_has_it(model: str, alpha: float, expected: Choice) -> None:
    """Of all variants, not of the alias's only; no key decides."""
    assert traffic().choose(model, AlphaWish(alpha, None), "alice") == expected
    assert traffic().choose(model, AlphaWish(None, str(alpha)), None) == expected
    assert not expected.is_exposure


def test_of_several_with_this_alpha_the_one_asked_for_is_taken() -> None:
    """Then one of the alias's, then the first."""
    table = VariantTable(["first", "second", "third"])
    for name in table.names():
        table.describe(name, VariantFacts(1.0, "v"))
    dealt = traffic(table, aliases={"a": {"split": {"third": 1, "second": 1}}, "b": "second"})
    wish = AlphaWish(1, None)
    assert dealt.choose("second", wish, None) == Choice("second", Reason.EXPLICIT)
    assert dealt.choose("a", wish, None).variant == "third"
    assert dealt.choose("b", wish, None).variant == "second"


@pytest.mark.parametrize("alpha", [0.25, 7, 1e300])
def test_a_wish_that_nobody_has_lists_those_that_exist(alpha: float) -> None:
    """With their alphas; one whose alpha is not known is none."""
    with pytest.raises(RequestRefusedError, match="No variant has this alpha") as caught:
        traffic().choose("assistant", AlphaWish(alpha, None), None)
    assert (caught.value.status, caught.value.code) == (404, "alpha_not_found")
    assert "base (0), enhanced@0.5 (0.5), enhanced@1 (1). " in caught.value.fix
    assert "mystery" not in caught.value.fix


@pytest.mark.parametrize("wish", [AlphaWish("1", None), AlphaWish(True, None)])
@pytest.mark.parametrize("table", [fused(), mixed()], ids=["fused", "mixed"])
def test_a_wish_that_is_no_number_is_400(table: VariantTable, wish: AlphaWish) -> None:
    """Also where each variant has but one alpha."""
    with pytest.raises(RequestRefusedError) as caught:
        traffic(table).choose("base", wish, None)
    assert (caught.value.status, caught.value.code) == (400, "invalid_alpha")


@pytest.mark.parametrize(
    ("model", "alpha", "variant"),
    [
        ("base", 0.7, "own"),
        ("own", 0.7, "own"),
        ("own", 0.25, "enhanced@0.25"),
        ("own", {"a": 0.7, "b": 0.7}, "own"),
        ("base", 1, "enhanced@1"),
        ("own", [1, 1], "enhanced@1"),
        ("enhanced@0.3", 0.3, "enhanced@0.3"),
        ("enhanced@1", {"a": 0.5}, "enhanced@1"),
        ("own", {"a": 0.5}, "base"),
        ("assistant", {"a": 0.5}, "base"),
    ],
)
def test_a_wish_where_some_have_engines_of_their_own(model: str, alpha: Any, variant: str) -> None:
    """One that has just these alphas goes first; all others are the dial's."""
    table = mixed()
    assert traffic(table).choose(model, AlphaWish(alpha, None), None).variant == variant


@pytest.mark.parametrize("own_alpha", [None, 0.4])
def test_a_wish_never_comes_to_an_engine_of_another_alpha(own_alpha: float | None) -> None:
    """Even if that is called like the alpha: the dial has it."""
    table = mixed("enhanced@0.5", own_alpha)
    chosen = traffic(table).choose("base", AlphaWish(0.5, None), None)
    assert table.is_of_dial(chosen.variant)


def test_a_wish_beyond_the_dial_may_be_an_engines_own() -> None:
    """A range is the dial's; an engine has what it has."""
    table = mixed("far", 5.0)
    assert traffic(table).choose("base", AlphaWish(5, None), None).variant == "far"
    with pytest.raises(RequestRefusedError, match="Alpha 6 is outside of -1:2") as caught:
        traffic(table).choose("base", AlphaWish(6, None), None)
    assert caught.value.status == 404
    assert "far (5), or any alpha in -1:2." in caught.value.fix


def test_a_split_may_name_alphas_that_nobody_listed() -> None:
    """The dial answers to them."""
    split = {"base": 1, "enhanced@0.25": 1}
    dealt = traffic(mixed(), aliases={"assistant": {"split": split}})
    assert {dealt.choose("assistant", None, key).variant for key in KEYS} == set(split)
    dealt.set_weights("assistant", {"enhanced@0.75": 1})
    assert dealt.choose("assistant", None, "alice").variant == "enhanced@0.75"


def test_those_in_flight_are_counted_on_under_another_configuration() -> None:
    """A reload must not let twice as many in."""
    dealt = traffic(variants={"base": {"max_in_flight": 1}})
    with ExitStack() as held:
        held.callback(dealt.limit("base").take())
        dealt.replace(Routing.model_validate({"variants": {"base": {"max_in_flight": 2}}}))
        held.callback(dealt.limit("base").take())
        with pytest.raises(VariantBusyError):
            dealt.limit("base").take()
        dealt.replace(Routing())
        held.callback(dealt.limit("base").take())
        assert dealt.limit("base").in_flight == 3
    assert dealt.limit("base").in_flight == 0


def test_a_dials_name_that_only_the_limits_list_has_its_limit() -> None:
    """It may stand under `variants` as it may stand in a split."""
    policy = {"enhanced@0.25": {"max_in_flight": 1, "fallback": "base"}}
    dealt = traffic(mixed(), variants=policy)
    assert dealt.fallback("enhanced@0.25") == "base"
    dealt.limit("enhanced@0.25").take()
    with pytest.raises(VariantBusyError):
        dealt.limit("enhanced@0.25").take()


def test_names_that_clients_make_up_are_not_kept() -> None:
    """A dial answers to millions of names."""
    dealt = traffic(mixed())
    for n in range(100):
        give_back = dealt.limit(f"enhanced@0.{n + 100}").take()
        give_back()
    assert len(dealt._limits) <= 3


def test_a_variant_without_a_policy_has_neither_limit_nor_fallback() -> None:
    """Nothing is taken for granted."""
    assert traffic().fallback("base") is None
    assert traffic().limit("base").max_in_flight is None


def test_a_configuration_with_one_key_twice_changes_nothing() -> None:
    """It is refused as a whole."""
    dealt = traffic()
    keys = {name: {"sha256": "ab" * 32} for name in ("one", "two")}
    with pytest.raises(ConfigError, match="have the same key"):
        dealt.replace(Routing.model_validate({"keys": keys}))
    assert dealt.weights("assistant") == SPLIT
    assert dealt.keyring.is_open
    assert dealt.generation == 1
