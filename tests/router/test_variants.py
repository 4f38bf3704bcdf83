"""The table of variants: what is ready, what is down, and what it says."""

from __future__ import annotations

import pytest

from vllm_rvec.errors import ConfigError, UpstreamError
from vllm_rvec.router import UnknownVariantError, Upstream, VariantDownError, VariantTable

ENGINE = Upstream("http://127.0.0.1:8001", "engine-secret")


def test_every_variant_is_down_and_starting_at_first() -> None:
    """Nothing is ready before somebody says so."""
    table = VariantTable(["base", "enhanced@1"])
    assert table.names() == ("base", "enhanced@1")
    assert [table.down_reason(name) for name in table.names()] == ["starting", "starting"]
    with pytest.raises(VariantDownError, match="starting"):
        table.find("base")


def test_a_ready_variant_is_found() -> None:
    """`find` gives the upstream that `set_ready` named last."""
    table = VariantTable(["base"])
    table.set_ready("base", Upstream("http://127.0.0.1:1", None))
    table.set_ready("base", ENGINE)
    assert table.find("base") is ENGINE
    assert table.down_reason("base") is None


def test_two_variants_may_share_one_upstream() -> None:
    """Only the name tells variants apart."""
    table = VariantTable(["base", "enhanced@1"])
    for name in table.names():
        table.set_ready(name, ENGINE)
    assert table.find("base") is table.find("enhanced@1")


def test_a_variant_that_went_down_says_why() -> None:
    """The reason reaches the error, as text and as a fact."""
    table = VariantTable(["base"])
    table.set_ready("base", ENGINE)
    table.set_down("base", "the engine exited with status 1")
    with pytest.raises(VariantDownError, match="the engine exited with status 1") as caught:
        table.find("base")
    assert (caught.value.name, caught.value.reason) == ("base", "the engine exited with status 1")
    assert isinstance(caught.value, UpstreamError)


def test_a_reason_may_be_empty() -> None:
    """Down without a reason is still down."""
    table = VariantTable(["base"])
    table.set_down("base", "")
    with pytest.raises(VariantDownError):
        table.find("base")


@pytest.mark.parametrize("call", ["find", "down_reason", "set_down", "set_ready"])
def test_an_unknown_name_is_an_error_that_lists_the_names(call: str) -> None:
    """Names are fixed when the table is made; a typing error must not add one."""
    table = VariantTable(["base", "enhanced@1"])
    arguments = {"set_down": ("why",), "set_ready": (ENGINE,)}.get(call, ())
    with pytest.raises(UnknownVariantError, match="base, enhanced@1") as caught:
        getattr(table, call)("enhanced", *arguments)
    assert caught.value.name == "enhanced"
    assert isinstance(caught.value, LookupError)


def test_a_long_unknown_name_is_cut_in_the_message() -> None:
    """A client can't make the router repeat megabytes."""
    with pytest.raises(UnknownVariantError) as caught:
        VariantTable(["base"]).find("x" * 10_000)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("names", [[], [""], ["base", ""]])
def test_a_table_needs_names(names: list[str]) -> None:
    """No variant, or one without a name, is a mistake in the configuration."""
    with pytest.raises(ConfigError, match="needs a name"):
        VariantTable(names)


def test_a_name_given_twice_is_refused() -> None:
    """Clients could not tell which one answers."""
    with pytest.raises(ConfigError, match="same name: base"):
        VariantTable(["base", "enhanced@1", "base"])


def test_the_key_of_an_upstream_is_not_in_its_repr() -> None:
    """What is logged must not let anybody in."""
    assert "engine-secret" not in repr(ENGINE)
    assert "8001" in repr(ENGINE)
