"""The salt of a request: what keeps the cached prefixes of alphas apart."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_rvec.loader.dial.scheduler import salt_of

numbers = st.floats(-2, 2, width=32)
alphas = st.lists(numbers, min_size=2, max_size=2).map(tuple)
salts = st.one_of(st.none(), st.text("rvec 0.5-", min_size=1, max_size=12))


@given(alphas, alphas, salts)
def test_other_alphas_have_another_salt(
    one: tuple[float, ...], other: tuple[float, ...], own: str
) -> None:
    """Whatever salt the client gave; -0.0 is 0.0."""
    if one != other:
        assert salt_of(one, own) != salt_of(other, own)


@given(alphas)
def test_the_targets_own_cache_is_that_of_a_plain_engine(some: tuple[float, ...]) -> None:
    """Alpha 0 adds nothing to what the client gave."""
    zeros = tuple(0.0 for _ in some)
    assert salt_of(zeros, None) == ""
    assert salt_of(zeros, "mine") == "mine"


def test_a_client_cant_salt_its_way_into_anothers_alpha() -> None:
    """A request at 0 that gives the salt of another alpha."""
    stolen = salt_of((0.5,), None)
    assert salt_of((0.0,), stolen) != stolen
