"""Which alphas a request gets: of a dial what it asks for, of a fused engine the one it has."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import openai
import pytest
from aiohttp import web

from tests.router.conftest import USER
from vllm_rvec.router import Upstream, VariantDownError, VariantFacts, VariantTable
from vllm_rvec.vector.dial import AlphaRange, Dial

if TYPE_CHECKING:
    import aiohttp
    from multidict import CIMultiDictProxy

    from tests.router.conftest import StandInEngine, StartRouter

pytestmark = pytest.mark.anyio

DIAL = Dial(
    ("reasoning", "style"),
    {"base": (0.0, 0.0), "enhanced@1": (1.0, 1.0), "mixed": (0.7, -0.2), "far": (5.0, 5.0)},
    AlphaRange(-1.0, 2.0),
)


def dial_table(engine: StandInEngine | None = None, dial: Dial = DIAL) -> VariantTable:
    table = VariantTable(list(dial.variants), dial)
    for name, alphas in dial.variants.items():
        table.describe(name, VariantFacts(dial.plain(alphas), "a + b"))
        if engine is not None:
            table.set_ready(name, engine.upstream)
    return table


@pytest.fixture
async def table(engine: StandInEngine) -> VariantTable:
    return dial_table(engine)


@pytest.fixture
async def url(start_router: StartRouter, table: VariantTable) -> str:
    return await start_router(table) + "/v1/chat/completions"


@pytest.fixture
async def fused_url(start_router: StartRouter, variants: VariantTable) -> str:
    variants.describe("base", VariantFacts(0.0, "v"))
    variants.describe("enhanced@1", VariantFacts(1.0, "v"))
    return await start_router(variants) + "/v1/chat/completions"


async def post(
    http: aiohttp.ClientSession, url: str, body: dict[str, Any] | bytes, *headers: str
) -> tuple[int, Any, CIMultiDictProxy[str]]:
    data = body if isinstance(body, bytes) else json.dumps(body)
    sent = [("X-Rvec-Alpha", value) for value in headers]
    async with http.post(url, data=data, headers=sent) as response:
        return response.status, await response.json(), response.headers


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("base", "0"),
        ("enhanced@1", "1"),
        ("far", "5"),
        ("enhanced@0.37", "0.37"),
        ("enhanced@-1", "-1"),
        ("mixed", "reasoning=0.7, style=-0.2"),
    ],
)
async def test_the_engine_is_told_what_a_name_stands_for(
    http: aiohttp.ClientSession, url: str, engine: StandInEngine, name: str, said: str
) -> None:
    """And the client, too; also of names that nobody listed."""
    body = b'{ "model" : %s }\n' % json.dumps(name).encode()
    status, _, headers = await post(http, url, body)
    assert status == 200
    assert engine.seen[0].body == body
    assert engine.seen[0].values("X-Rvec-Alpha") == [said]
    assert (headers["X-Rvec-Variant"], headers["X-Rvec-Alpha"]) == (name, said)


async def test_a_header_goes_before_the_name(
    http: aiohttp.ClientSession, url: str, engine: StandInEngine
) -> None:
    """In its shortest form, in place of the client's; pairs may come in several."""
    await post(http, url, {"model": "base"}, " 0.50")
    await post(http, url, {"model": "base"}, "reasoning=1", "style=0.5")
    told = [seen.values("X-Rvec-Alpha") for seen in engine.seen]
    assert told == [["0.5"], ["reasoning=1, style=0.5"]]


@pytest.mark.parametrize(
    ("alpha", "said"),
    [
        (b"0.35", "0.35"),
        (b"1", "1"),
        (b"[ 0.5, 1e0 ]", "reasoning=0.5, style=1"),
        (b'{"style" : 0.1}', "reasoning=0, style=0.1"),
    ],
)
async def test_a_body_goes_before_all(
    http: aiohttp.ClientSession, url: str, engine: StandInEngine, alpha: bytes, said: str
) -> None:
    """The engine reads it there, byte for byte as it was sent, and the header says the same."""
    body = b'{"model": "mixed",  "alpha" : ' + alpha + b', "x": 1.0e0}\n'
    status, _, headers = await post(http, url, body, "much")
    assert (status, headers["X-Rvec-Alpha"]) == (200, said)
    assert engine.seen[0].body == body
    assert engine.seen[0].values("X-Rvec-Alpha") == [said]


async def test_null_is_no_alpha(
    http: aiohttp.ClientSession, url: str, engine: StandInEngine
) -> None:
    """As for OpenAI's own fields."""
    await post(http, url, {"model": "base", "alpha": None}, "0.2")
    assert engine.seen[0].values("X-Rvec-Alpha") == ["0.2"]


async def test_what_the_engine_says_goes_before_what_the_router_thinks(
    http: aiohttp.ClientSession, url: str, engine: StandInEngine
) -> None:
    """`vllm_xargs` are read only there."""

    async def answer(_request: web.Request) -> web.StreamResponse:
        return web.json_response({}, headers={"X-Rvec-Alpha": "0.9"})

    engine.answer = answer
    body = {"model": "base", "vllm_xargs": {"alpha": 0.9}}
    _, _, headers = await post(http, url, body)
    assert headers["X-Rvec-Alpha"] == "0.9"


@pytest.mark.parametrize(
    ("body", "header", "words"),
    [
        (b'{"model": "base", "alpha": "1"}', None, "Alpha must be a number"),
        (b'{"model": "base", "alpha": true}', None, "Alpha must be a number"),
        (b'{"model": "base", "alpha": NaN}', None, "Alpha is not finite."),
        (b'{"model": "base", "alpha": 1e999}', None, "Alpha is not finite."),
        (b'{"model": "base", "alpha": [1]}', None, "one for each vector would be 2"),
        (b'{"model": "base", "alpha": {"taste": 1}}', None, "No vector is called taste"),
        (b'{"model": "base"}', "much", "Alpha 'much' is not a number."),
        (b'{"model": "base"}', "", "Alpha '' is not a number."),
        (b'{"model": "base"}', "taste=1", "there are reasoning, style."),
    ],
)
async def test_an_alpha_that_can_not_be_had_is_400(  # noqa: PLR0917 - parameters of the test
    http: aiohttp.ClientSession,
    url: str,
    engine: StandInEngine,
    body: bytes,
    header: str | None,
    words: str,
) -> None:
    """In OpenAI's shape; the engine is not asked."""
    status, answer, headers = await post(http, url, body, *([] if header is None else [header]))
    error = answer["error"]
    assert (status, error["code"], error["param"]) == (400, "invalid_alpha", "alpha")
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]
    assert "X-Rvec-Alpha" not in headers
    assert not engine.seen


@pytest.mark.parametrize("name", ["enhanced@2.1", "enhanced@x", "enhanced@0.5\r\nX-Y: 1", "other"])
async def test_a_name_that_stands_for_nothing_is_404(
    http: aiohttp.ClientSession, url: str, engine: StandInEngine, name: str
) -> None:
    """With the names there are, and the range of the others; an alpha in the body is no name."""
    status, answer, headers = await post(http, url, {"model": name, "alpha": 0.5})
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert "base, enhanced@1, mixed, far, or for enhanced@A with any A in -1:2." in str(answer)
    assert "X-Rvec-Variant" not in headers
    assert not engine.seen


async def test_a_dial_that_is_down_is_down_for_every_name(
    http: aiohttp.ClientSession, url: str, table: VariantTable
) -> None:
    """All of them are one engine."""
    for name in table.names():
        table.set_down(name, "it crashed")
    for name in ("mixed", "enhanced@0.3"):
        status, answer, _ = await post(http, url, {"model": name})
        assert (status, answer["error"]["code"]) == (503, "model_down")
        assert f"`{name}`" in answer["error"]["message"]


async def test_openais_client_sends_alphas(
    start_router: StartRouter, table: VariantTable, engine: StandInEngine
) -> None:
    """In `extra_body` and `extra_headers`."""
    base_url = await start_router(table) + "/v1"
    async with openai.AsyncOpenAI(base_url=base_url, api_key="c", max_retries=0) as client:
        create = client.chat.completions.with_raw_response.create
        raw = await create(model="base", messages=USER, extra_body={"alpha": {"style": 1}})
        assert raw.headers["X-Rvec-Alpha"] == "reasoning=0, style=1"
        raw = await create(model="base", messages=USER, extra_headers={"X-Rvec-Alpha": "0.1"})
        assert raw.headers["X-Rvec-Alpha"] == "0.1"
        with pytest.raises(openai.NotFoundError, match="outside of -1:2"):
            await create(model="base", messages=USER, extra_body={"alpha": 7})
    assert len(engine.seen) == 2


@pytest.mark.parametrize("header", [None, "1", "1.0"])
@pytest.mark.parametrize("alpha", [None, 1, 1.0])
async def test_a_fused_engine_has_the_alpha_that_it_has(
    http: aiohttp.ClientSession,
    fused_url: str,
    engine: StandInEngine,
    alpha: float | None,
    header: str | None,
) -> None:
    """Asking for it does no harm; nothing is added."""
    body = {"model": "enhanced@1", "alpha": alpha}
    status, _, headers = await post(http, fused_url, body, *([] if header is None else [header]))
    assert (status, headers["X-Rvec-Alpha"]) == (200, "1")
    assert not engine.seen[0].values("X-Rvec-Alpha")


@pytest.mark.parametrize(
    ("alpha", "status", "code"),
    [
        (0.5, 404, "alpha_not_found"),
        (10**400, 404, "alpha_not_found"),
        ("1", 400, "invalid_alpha"),
        (True, 400, "invalid_alpha"),
        ([1], 400, "invalid_alpha"),
        ({"v": 1}, 400, "invalid_alpha"),
    ],
)
async def test_a_fused_engine_has_no_other(  # noqa: PLR0917 - parameters of the test
    http: aiohttp.ClientSession,
    fused_url: str,
    engine: StandInEngine,
    alpha: Any,
    status: int,
    code: str,
) -> None:
    """An engine would pass over it without a word; the message says what there is."""
    found, answer, _ = await post(http, fused_url, {"model": "enhanced@1", "alpha": alpha})
    assert (found, answer["error"]["code"]) == (status, code)
    if status == 404:
        assert "There are: base (0), enhanced@1 (1)." in answer["error"]["message"]
        assert "`--mode dial`" in answer["error"]["message"]
    for header, refused in (("0.5", 404), ("much", 400), ("v=1", 400)):
        found, _, _ = await post(http, fused_url, {"model": "enhanced@1"}, header)
        assert found == refused
    assert not engine.seen


async def test_an_alpha_picks_the_variant_that_has_it(
    http: aiohttp.ClientSession, fused_url: str, engine: StandInEngine
) -> None:
    """Whatever the body names; and the answer says who it was."""
    status, _, headers = await post(http, fused_url, {"model": "base", "alpha": 1})
    assert (status, headers["X-Rvec-Variant"], headers["X-Rvec-Reason"]) == (
        200,
        "enhanced@1",
        "alpha",
    )


@pytest.mark.parametrize("said", [({"alpha": 2.5}, None), ({}, "3")])
async def test_an_alpha_out_of_range_is_404(
    http: aiohttp.ClientSession, url: str, engine: StandInEngine, said: tuple[Any, str | None]
) -> None:
    """With the range and those that have names."""
    body, header = said
    status, answer, _ = await post(
        http, url, {"model": "base", **body}, *([] if header is None else [header])
    )
    assert (status, answer["error"]["code"]) == (404, "alpha_not_found")
    assert "is outside of -1:2." in answer["error"]["message"]
    assert "far (5), or any alpha in -1:2." in answer["error"]["message"]
    assert not engine.seen


async def test_a_dials_models_are_those_with_names(
    http: aiohttp.ClientSession, start_router: StartRouter, table: VariantTable
) -> None:
    """Each with what it is; the engine's card is used where it has one, and else its first."""
    async with http.get(await start_router(table) + "/v1/models") as response:
        cards = {card["id"]: card for card in (await response.json())["data"]}
    assert list(cards) == ["base", "enhanced@1", "mixed", "far"]
    assert [card["rvec"]["alpha"] for card in cards.values()] == [
        *(0.0, 1.0),
        {"reasoning": 0.7, "style": -0.2},
        5.0,
    ]
    assert all(card["rvec"]["vector"] == "a + b" for card in cards.values())
    assert all(card["rvec"]["alpha_range"] == [-1, 2] for card in cards.values())
    assert all(card["max_model_len"] == 64 for card in cards.values())


async def test_a_model_that_nobody_listed_is_described(
    http: aiohttp.ClientSession, start_router: StartRouter, table: VariantTable
) -> None:
    """And one out of range is not."""
    url = await start_router(table) + "/v1/models/enhanced@"
    async with http.get(url + "0.37") as response:
        card = await response.json()
    assert (card["id"], card["max_model_len"]) == ("enhanced@0.37", 64)
    assert card["rvec"] == {
        "alpha": 0.37,
        "vector": "a + b",
        "fingerprint": None,
        "alpha_range": [-1, 2],
    }
    async with http.get(url + "3") as response:
        assert response.status == 404
        assert "any A in -1:2" in await response.text()


async def test_a_dial_that_gives_no_cards_gets_bare_ones(
    http: aiohttp.ClientSession, start_router: StartRouter, table: VariantTable, engine: Any
) -> None:
    """As any engine."""

    async def refuse(_request: web.Request) -> web.StreamResponse:
        return web.json_response({}, status=500)

    engine.answer = refuse
    async with http.get(await start_router(table) + "/v1/models/enhanced@0.5") as response:
        card = await response.json()
    assert (card["owned_by"], card["rvec"]["alpha"]) == ("vllm-rvec", 0.5)


def test_a_table_with_a_dial() -> None:
    """All names are one upstream; only those with names are told and listed."""
    table = dial_table()
    assert not table.has("enhanced@9")
    assert table.has("enhanced@0.1")
    with pytest.raises(VariantDownError, match=r"enhanced@0\.1"):
        table.find("enhanced@0.1")
    upstream = Upstream("http://127.0.0.1:1", None)
    for name in table.names():
        table.set_ready(name, upstream)
    assert table.find("enhanced@0.1") is upstream
    assert table.gate("enhanced@0.1") is table.gate("base")
    assert table.facts("enhanced@9") is None
    table.retune("enhanced@1", (0.2, 0.3))
    facts = table.facts("enhanced@1")
    assert facts is not None
    assert facts.alpha == {"reasoning": 0.2, "style": 0.3}
    table.describe("enhanced@1", VariantFacts(1.0, "a + b"))
    assert table.facts("enhanced@1") == facts, "a restarted engine does not undo a change"


def test_without_a_dial_nothing_can_be_retuned() -> None:
    """That takes an engine."""
    with pytest.raises(RuntimeError, match="no dial"):
        VariantTable(["base"]).retune("base", (0.5,))
