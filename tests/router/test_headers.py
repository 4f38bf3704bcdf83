"""Which headers pass, and which belong to one connection."""

from __future__ import annotations

from multidict import CIMultiDict, CIMultiDictProxy

from vllm_rvec.router import Upstream
from vllm_rvec.router.headers import HOP_BY_HOP, bearer, request_headers, response_headers

ENGINE = Upstream("http://127.0.0.1:8001", "engine-secret")


def headers(*pairs: tuple[str, str]) -> CIMultiDictProxy[str]:
    return CIMultiDictProxy(CIMultiDict(pairs))


def test_other_headers_pass_in_order_and_repeated() -> None:
    """Nothing is merged, sorted or renamed."""
    pairs = [("X-B", "1"), ("accept", "*/*"), ("X-B", "2"), ("Content-Length", "3")]
    assert list(response_headers(headers(*pairs)).items()) == pairs


def test_hop_by_hop_headers_stop_here() -> None:
    """Each connection has its own."""
    given = headers(*((name.title(), "x") for name in HOP_BY_HOP), ("X-Kept", "1"))
    assert list(response_headers(given)) == ["X-Kept"]


def test_headers_that_connection_names_stop_here() -> None:
    """`Connection` may name more headers of the connection, in any spelling."""
    given = headers(("Connection", "close, X-Mine"), ("connection", "x-too"), ("x-mine", "1"))
    assert not response_headers(given)


def test_the_clients_keys_give_way_to_the_engines() -> None:
    """No engine ever sees what a client shows the router."""
    given = headers(("authorization", "Bearer c"), ("X-API-Key", "c"), ("Accept", "a"))
    passed = request_headers(given, ENGINE, "id-1")
    assert list(passed.items()) == [
        ("Accept", "a"),
        ("X-Request-Id", "id-1"),
        ("Authorization", "Bearer engine-secret"),
    ]


def test_an_engine_without_a_key_gets_none() -> None:
    """Not the client's either."""
    open_engine = Upstream("http://127.0.0.1:8001", None)
    assert not bearer(open_engine)
    assert "Authorization" not in request_headers(
        headers(("Authorization", "Bearer c")), open_engine, "id-1"
    )


def test_host_length_and_expect_are_made_anew() -> None:
    """They describe the message on the wire, which is a new one."""
    given = headers(("Host", "router"), ("Content-Length", "1"), ("Expect", "100-continue"))
    assert list(request_headers(given, ENGINE, "i")) == ["X-Request-Id", "Authorization"]


def test_our_own_headers_take_the_clients_place() -> None:
    """All of the client's by that name, in any spelling; None leaves them out."""
    given = headers(("x-mine", "1"), ("X-Kept", "2"), ("X-MINE", "3"), ("X-Gone", "4"))
    passed = request_headers(given, ENGINE, "i", {"X-Mine": "5", "x-gone": None})
    assert passed.getall("X-Mine") == ["5"]
    assert sorted(passed) == ["Authorization", "X-Kept", "X-Mine", "X-Request-Id"]
