"""/v1/models over all upstreams, and /health."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import openai
import pytest
from aiohttp import web

from vllm_rvec.router import Upstream, VariantTable, models

if TYPE_CHECKING:
    import aiohttp

    from .conftest import StandInEngine, StartEngine, StartRouter

pytestmark = pytest.mark.anyio


async def get(http: aiohttp.ClientSession, url: str) -> tuple[int, Any]:
    async with http.get(url) as response:
        return response.status, await response.json()


async def test_the_list_has_the_engines_own_cards(
    ask: openai.AsyncOpenAI, engine: StandInEngine
) -> None:
    """Every ready variant, each with what its engine says of it."""
    cards = (await ask.models.list()).data
    assert [card.id for card in cards] == ["base", "enhanced@1"]
    assert [card.to_dict()["max_model_len"] for card in cards] == [64, 64]
    assert [seen.target for seen in engine.seen] == ["/v1/models"], "one engine is asked once"
    assert engine.seen[0].values("authorization") == ["Bearer engine-secret"]


async def test_a_variant_that_is_down_is_left_out(
    ask: openai.AsyncOpenAI, variants: VariantTable
) -> None:
    """Clients choose from the list, so it has only what answers."""
    variants.set_down("base", "the engine exited")
    assert [card.id for card in (await ask.models.list()).data] == ["enhanced@1"]


async def hang(_request: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError


async def refuse(_request: web.Request) -> web.StreamResponse:
    return web.json_response({"error": "Unauthorized"}, status=401)


async def break_off(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


@pytest.mark.parametrize("answer", [hang, refuse, break_off])
async def test_one_engine_that_does_not_answer_spoils_only_its_own_cards(
    start_engine: StartEngine,
    start_router: StartRouter,
    http: aiohttp.ClientSession,
    monkeypatch: pytest.MonkeyPatch,
    answer: Any,
) -> None:
    """The list comes, with a bare card for what the table calls ready."""
    monkeypatch.setattr(models, "CARD_SECONDS", 0.2)
    well, ill = await start_engine(), await start_engine()
    ill.answer = answer
    table = VariantTable(["base", "enhanced@1", "third"])
    table.set_ready("base", well.upstream)
    table.set_ready("enhanced@1", ill.upstream)
    table.set_ready("third", Upstream("http://127.0.0.1:9", None))
    status, listing = await get(http, await start_router(table) + "/v1/models")
    assert status == 200
    assert listing["object"] == "list"
    assert [card["id"] for card in listing["data"]] == ["base", "enhanced@1", "third"]
    assert listing["data"][0]["max_model_len"] == 64
    assert set(listing["data"][1]) == {"id", "object", "created", "owned_by"}


async def test_one_model_is_described(ask: openai.AsyncOpenAI) -> None:
    """The engine's card again, by the variant's name."""
    assert (await ask.models.retrieve("enhanced@1")).to_dict()["max_model_len"] == 64


async def test_a_model_that_is_unknown_or_down_is_not_described(
    ask: openai.AsyncOpenAI, variants: VariantTable
) -> None:
    """404 and 503, as for a request that names it. Names may have slashes."""
    variants.set_down("base", "starting")
    with pytest.raises(openai.NotFoundError, match="org/model"):
        await ask.models.retrieve("org/model")
    with pytest.raises(openai.InternalServerError, match="starting") as caught:
        await ask.models.retrieve("base")
    assert caught.value.status_code == 503


async def test_health_follows_the_table(
    http: aiohttp.ClientSession, router_url: str, variants: VariantTable
) -> None:
    """200 as long as one variant is ready; 503 when none is."""
    url = f"{router_url}/health"
    ready = {"base": "ready", "enhanced@1": "ready"}
    assert await get(http, url) == (200, {"status": "ready", "variants": ready})
    variants.set_down("base", "out of memory")
    states = {"base": "out of memory", "enhanced@1": "ready"}
    assert await get(http, url) == (200, {"status": "degraded", "variants": states})
    variants.set_down("enhanced@1", "starting")
    states = {"base": "out of memory", "enhanced@1": "starting"}
    assert await get(http, url) == (503, {"status": "down", "variants": states})
