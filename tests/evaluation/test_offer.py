"""vllm_rvec.evaluation.offer: what an address can do about alpha, from its list of models."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vllm_rvec.errors import ConfigError, FetchError
from vllm_rvec.evaluation.offer import DialOffer, FixedOffer, TurnedOffer, read_offer
from vllm_rvec.vector.dial import AlphaRange

ADDRESS = "http://127.0.0.1:1"


def models(**cards: dict[str, Any] | None) -> bytes:
    data = [{"id": name, "object": "model", **(more or {})} for name, more in cards.items()]
    return json.dumps({"object": "list", "data": data}).encode()


def rvec(alpha: float, vector: str = "v", **more: Any) -> dict[str, Any]:
    return {"rvec": {"alpha": alpha, "vector": vector, "fingerprint": f"blake3:{vector}", **more}}


def test_a_dial_offers_its_range() -> None:
    """Any alpha in it, by the request's own field."""
    offer = read_offer(models(base=rvec(0, alpha_range=[-1, 2])), ADDRESS)
    assert offer == DialOffer("base", AlphaRange(-1, 2), vector="v", fingerprint="blake3:v")
    place = offer.place(0.35, is_random=False)
    assert (place.model, place.alphas, place.problem) == ("base", 0.35, "")
    assert "outside of its -1:2" in offer.place(2.5, is_random=False).problem
    assert "no random vector" in offer.place(1, is_random=True).problem


def test_a_dial_of_ours_has_both_vectors() -> None:
    """Each arm has one of them, and the base neither."""
    offer = DialOffer("base", AlphaRange(-1, 2), "vector", "random")
    assert offer.place(0.5, is_random=False).alphas == {"vector": 0.5}
    assert offer.place(1, is_random=True).alphas == {"random": 1}
    assert offer.place(0, is_random=False).alphas == 0


def test_fixed_variants_offer_their_alphas() -> None:
    """By name; aliases are nobody's."""
    listed = models(
        base=rvec(0), enhanced=rvec(0.5), assistant={"rvec": {"split": {"base": 1}}}, other=None
    )
    offer = read_offer(listed, ADDRESS)
    assert offer == FixedOffer({"base": 0, "enhanced": 0.5}, "v", "blake3:v")
    place = offer.place(0.5, is_random=False)
    assert (place.model, place.alphas) == ("enhanced", None)
    problem = offer.place(1, is_random=False).problem
    assert problem == "no variant has alpha 1; there are 0, 0.5"
    assert offer.place(1, is_random=True).problem


def test_another_vectors_variants_are_not_compared() -> None:
    """A sweep is of one vector."""
    with pytest.raises(ConfigError, match="variants of different vectors"):
        read_offer(models(a=rvec(0.5, "v"), b=rvec(1, "w"), c=rvec(0, "v")), ADDRESS)


def test_a_plain_server_is_the_base_where_one_says_so() -> None:
    """And nothing else; without a word, nothing is assumed."""
    offer = read_offer(models(plain=None), ADDRESS, "plain")
    assert offer.place(0, is_random=False).model == "plain"
    assert offer.place(1, is_random=False).problem
    with pytest.raises(ConfigError, match=r"does not say which alpha(.|\n)*it lists plain"):
        read_offer(models(plain=None), ADDRESS)


@pytest.mark.parametrize("body", [b"", b"<html>", b'{"data": 1}', b'{"data": [{"no": "id"}]}'])
def test_what_is_no_list_of_models_is_said(body: bytes) -> None:
    """Somebody gave the address of something else."""
    with pytest.raises(FetchError, match="something else than a list of models"):
        read_offer(body, ADDRESS)


def test_a_fused_engine_is_brought_to_any_alpha() -> None:
    """Under one name."""
    place = TurnedOffer("swept").place(3, is_random=True)
    assert (place.model, place.alphas, place.problem) == ("swept", None, "")
