"""Aliases, splits, limits, several upstreams, records and keys, over HTTP.

The parts have tests of their own; here is that they hang together.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sqlite3
import ssl
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp
import openai
import pytest
from aiohttp import web
from cryptography.hazmat.primitives import serialization

from tests.support.certificates import make_certificate
from vllm_rvec.errors import ConfigError
from vllm_rvec.router import (
    Admin,
    Routing,
    Services,
    Upstream,
    VariantFacts,
    VariantTable,
    check_exposure,
    create_client,
    hash_key,
    load_tls,
    proxy,
)
from vllm_rvec.router import answers as upstream_answers
from vllm_rvec.router.assignment import assign, unit_of
from vllm_rvec.router.config import TlsConfig
from vllm_rvec.vector.dial import AlphaRange, Dial

from .conftest import (
    USER,
    StandInEngine,
    answers,
    begin_events,
    chat_event,
    die,
    dies_after,
    run_router,
    sample_of,
    until,
    wait_for_ever,
)
from .test_upstreams import lease

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from contextlib import AsyncExitStack
    from pathlib import Path

    from multidict import CIMultiDictProxy

    from .conftest import Answer, StartEngine

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
NAME = "enhanced@1"
SPLIT = {"base": 50, NAME: 50}
ADMIN_KEY = "admin-secret"
WATCHED = {"interval_seconds": 0.05, "timeout_seconds": 0.2, "failures": 2}
ENDED = "vllm_rvec_router_requests_total"

# --- the stage --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """An answer, read."""

    status: int
    headers: CIMultiDictProxy[str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body."""
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        """OpenAI's error object."""
        return self.json["error"]

    @property
    def marks(self) -> dict[str, str | None]:
        """What it says of who answered."""
        names = ("Variant", "Alias", "Reason", "Alpha")
        return {name.lower(): self.headers.get(f"X-Rvec-{name}") for name in names}


@dataclass(frozen=True)
class Router:
    """One that runs."""

    url: str
    services: Services
    http: aiohttp.ClientSession

    async def send(
        self, path: str = CHAT, data: Any = None, *, method: str = "POST", **options: Any
    ) -> Reply:
        """Send as it is, and read the answer."""
        async with self.http.request(method, self.url + path, data=data, **options) as answer:
            return Reply(answer.status, answer.headers, await answer.read())

    async def ask(
        self,
        model: str = "assistant",
        *,
        path: str = CHAT,
        headers: Mapping[str, str] | None = None,
        **fields: Any,
    ) -> Reply:
        """Send a body of these fields."""
        return await self.send(path, json.dumps({"model": model, **fields}), headers=headers)

    async def get(self, path: str, **options: Any) -> Reply:
        """Get a path."""
        return await self.send(path, method="GET", **options)

    async def sample(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        text = (await self.get("/metrics")).body.decode()
        return sample_of(text, name, labels)

    async def until_sample(self, count: float, name: str, **labels: str) -> None:
        """Wait for a metric: it is counted when the answer has ended, not when it is read."""
        async with asyncio.timeout(5):
            while await self.sample(name, **labels) != count:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


@pytest.fixture
async def start(
    resources: AsyncExitStack, http: aiohttp.ClientSession
) -> Callable[..., Awaitable[Router]]:
    """Start a router: `start(table, aliases={...}, ...)`, with settings as in the file."""

    async def start(
        table: VariantTable,
        *,
        shared_key: str | None = None,
        is_watching: bool = False,
        tls: ssl.SSLContext | None = None,
        **settings: Any,
    ) -> Router:
        client = await resources.enter_async_context(create_client())
        routing = Routing.model_validate(settings)
        services = Services.make(table, client, routing, shared_key=shared_key)
        admin = Admin.of_hash(hash_key(ADMIN_KEY), None, 1.0)
        url = await run_router(resources, services, admin, is_watching=is_watching, tls=tls)
        return Router(url, services, http)

    return start


@dataclass(frozen=True)
class Pair:
    """Two variants, each with an engine of its own."""

    base: StandInEngine
    enhanced: StandInEngine

    def table(self) -> VariantTable:
        """Of both."""
        table = VariantTable(["base", NAME])
        for name, alpha, engine in (("base", 0.0, self.base), (NAME, 1.0, self.enhanced)):
            table.set_ready(name, engine.upstream)
            table.describe(name, VariantFacts(alpha, "v", fingerprint=f"print-of-{name}"))
        return table

    def of(self, variant: str | None) -> StandInEngine:
        """A variant's engine."""
        return self.base if variant == "base" else self.enhanced


@pytest.fixture
async def pair(start_engine: StartEngine) -> Pair:
    return Pair(await start_engine(), await start_engine())


Start = Any
"""The fixture's function."""


@pytest.fixture
async def router(start: Start, pair: Pair) -> Router:
    """One alias with a split, one that is another name."""
    started: Router = await start(
        pair.table(), aliases={"assistant": {"split": SPLIT, "salt": "s"}, "default": "base"}
    )
    return started


def replicas(*engines: StandInEngine) -> VariantTable:
    """One variant, several upstreams."""
    table = VariantTable(["base"])
    table.set_ready("base", *(engine.upstream for engine in engines))
    return table


def unused() -> tuple[socket.socket, Upstream]:
    """An address on which nobody listens, held."""
    held = socket.socket()
    held.bind(("127.0.0.1", 0))
    return held, Upstream(f"http://127.0.0.1:{held.getsockname()[1]}", None)


async def dies(request: web.Request) -> web.StreamResponse:
    return die(request)


def user_of(variant: str, salt: str = "s") -> str:
    """A key that the split gives to a variant."""
    keys = (f"user-{n}" for n in range(100))
    return next(k for k in keys if assign(k, SPLIT, salt=salt, experiment="assistant") == variant)


# --- names and splits -------------------------------------------------------------------------

KEYED: list[tuple[dict[str, str], dict[str, Any]]] = [
    ({"X-Rvec-Key": "KEY", "X-Session-ID": "no"}, {"user": "no"}),
    ({"x-session-id": "KEY"}, {"user": "no", "prompt_cache_key": "no"}),
    ({}, {"user": "KEY", "prompt_cache_key": "no"}),
    ({}, {"safety_identifier": "KEY", "prompt_cache_key": "no"}),
    ({}, {"prompt_cache_key": "KEY"}),
]


@pytest.mark.parametrize(("headers", "fields"), KEYED)
async def test_a_split_is_sticky_by_what_names_the_user(
    router: Router, pair: Pair, headers: dict[str, str], fields: dict[str, Any]
) -> None:
    """In the documented order, and the answer says so."""
    for variant in SPLIT:
        user = user_of(variant)
        sent = {name: value.replace("KEY", user) for name, value in headers.items()}
        told = {name: value.replace("KEY", user) for name, value in fields.items()}
        for _ in range(2):
            reply = await router.ask(headers=sent, **told)
            assert reply.status == 200
            assert reply.marks == {
                "variant": variant,
                "alias": "assistant",
                "reason": "sticky",
                "alpha": "0" if variant == "base" else "1",
            }
        assert len(pair.of(variant).seen) == 2


async def test_the_name_of_the_key_is_the_last_that_makes_sticky(start: Start, pair: Pair) -> None:
    """A shared key is nobody's own."""
    variant = assign("team", SPLIT, salt="", experiment="assistant")
    router = await start(
        pair.table(),
        shared_key="shared",
        keys={"team": {"sha256": hash_key("own")}},
        aliases={"assistant": {"split": SPLIT}},
    )
    for _ in range(3):
        reply = await router.ask(headers={"Authorization": "Bearer own"})
        assert (reply.marks["variant"], reply.marks["reason"]) == (variant, "sticky")
    reply = await router.ask(headers={"Authorization": "Bearer shared"})
    assert reply.marks["reason"] == "random"


async def test_two_routers_agree(start: Start, pair: Pair) -> None:
    """Nothing is shared but the configuration."""
    aliases = {"assistant": {"split": SPLIT, "salt": "2026-11"}}
    routers = [await start(pair.table(), aliases=aliases) for _ in range(2)]
    chosen = [
        [(await router.ask(user=f"user-{n}")).marks["variant"] for n in range(20)]
        for router in routers
    ]
    assert chosen[0] == chosen[1]
    assert set(chosen[0]) == set(SPLIT)


async def test_without_a_key_chance_decides_and_the_answer_says_so(router: Router) -> None:
    """Request by request."""
    replies = [await router.ask() for _ in range(30)]
    assert {reply.marks["reason"] for reply in replies} == {"random"}
    assert {reply.marks["variant"] for reply in replies} == set(SPLIT)


async def test_a_variants_own_name_goes_past_the_split(router: Router, pair: Pair) -> None:
    """Whoever asks."""
    reply = await router.ask(NAME, user=user_of("base"))
    assert reply.marks == {"variant": NAME, "alias": None, "reason": "explicit", "alpha": "1"}
    assert len(pair.enhanced.seen) == 1


async def test_an_alias_of_one_is_another_name(router: Router, pair: Pair) -> None:
    """Told as such."""
    reply = await router.ask("default", user=user_of(NAME))
    assert reply.marks == {
        "variant": "base",
        "alias": "default",
        "reason": "alias",
        "alpha": "0",
    }
    assert len(pair.base.seen) == 1


async def test_the_body_is_not_rewritten_for_an_alias(router: Router, pair: Pair) -> None:
    """Byte for byte: engines have the alias among their names."""
    body = b'{ "model" : "assistant",\n "x": 1.0e0, "x": 2, "user": "\\u00e9\xf0\x9f\x98\x80" }\n'
    assert (await router.send(data=body)).status == 200
    seen = [*pair.base.seen, *pair.enhanced.seen]
    assert [one.body for one in seen] == [body]
    assert seen[0].target == CHAT


async def test_a_stream_says_who_answers_too(router: Router, pair: Pair) -> None:
    """In its head."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = await begin_events(request)
        await response.write(chat_event("hi") + b"data: [DONE]\n\n")
        return response

    pair.enhanced.answer = answer
    reply = await router.ask(user=user_of(NAME), stream=True)
    assert reply.body == chat_event("hi") + b"data: [DONE]\n\n"
    assert reply.marks == {
        "variant": NAME,
        "alias": "assistant",
        "reason": "sticky",
        "alpha": "1",
    }


async def test_errors_say_who_could_not_answer(router: Router, pair: Pair) -> None:
    """The router's own as well as the engine's; where nobody was chosen, nobody is named."""
    pair.base.answer = answers(400, b'{"error": {"message": "too long"}}')
    reply = await router.ask(user=user_of("base"))
    assert (reply.status, reply.error["message"]) == (400, "too long")
    assert (reply.marks["variant"], reply.marks["alias"]) == ("base", "assistant")
    router.services.variants.set_down(NAME, "it crashed")
    reply = await router.ask(user=user_of(NAME))
    assert (reply.status, reply.error["code"]) == (503, "model_down")
    assert (reply.marks["variant"], reply.marks["reason"]) == (NAME, "sticky")
    reply = await router.ask("ghost")
    assert (reply.status, reply.error["code"]) == (404, "model_not_found")
    assert f"base, {NAME}, assistant, default" in reply.error["message"]
    assert set(reply.marks.values()) == {None}


async def test_openais_client_asks_an_alias(router: Router, pair: Pair) -> None:
    """With its own field for the user, and an alpha in `extra_body`."""
    async with openai.AsyncOpenAI(base_url=f"{router.url}/v1", api_key="c") as client:
        create = client.chat.completions.with_raw_response.create
        raw = await create(model="assistant", messages=USER, user=user_of(NAME))
        assert raw.parse().choices[0].message.content == "hello"
        assert raw.headers["X-Rvec-Variant"] == NAME
        raw = await create(
            model="assistant", messages=USER, user=user_of(NAME), extra_body={"alpha": 0}
        )
        assert raw.headers["X-Rvec-Variant"] == "base"
        assert raw.headers["X-Rvec-Reason"] == "alpha"
        with pytest.raises(openai.NotFoundError) as caught:
            await create(model="assistant", messages=USER, extra_body={"alpha": 0.5})
    assert caught.value.code == "alpha_not_found"


async def test_models_tells_of_aliases(router: Router) -> None:
    """The list and the one card say the same, less the time: what it is, and its weights."""
    cards = {card["id"]: card for card in (await router.get("/v1/models")).json["data"]}
    assert list(cards) == ["base", NAME, "assistant", "default"]
    assert cards[NAME]["rvec"] == {"alpha": 1.0, "vector": "v", "fingerprint": f"print-of-{NAME}"}
    assert cards["assistant"]["rvec"] == {"split": SPLIT}
    assert cards["assistant"]["max_model_len"] == 64
    for name, card in cards.items():
        assert (await router.get(f"/v1/models/{name}")).json == card
    router.services.variants.set_down("base", "gone")
    router.services.variants.set_down(NAME, "gone")
    card = (await router.get("/v1/models/assistant")).json
    assert (card["id"], card["rvec"]) == ("assistant", {"split": SPLIT})


# --- alpha ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["body", "header"])
async def test_an_alpha_picks_the_variant(router: Router, pair: Pair, way: str) -> None:
    """Past the split and past the name."""
    user = user_of("base")
    fields: dict[str, Any] = {"alpha": 1} if way == "body" else {}
    headers = {"X-Rvec-Alpha": "1.0"} if way == "header" else {}
    for model, alias in (("assistant", "assistant"), ("base", None)):
        reply = await router.ask(model, headers=headers, user=user, **fields)
        assert reply.marks == {"variant": NAME, "alias": alias, "reason": "alpha", "alpha": "1"}
    assert len(pair.enhanced.seen) == 2


async def test_an_alpha_that_nobody_has_is_404_with_those_there_are(router: Router) -> None:
    """So that a client can ask again."""
    reply = await router.ask(alpha=0.5)
    assert (reply.status, reply.error["code"], reply.error["param"]) == (
        404,
        "alpha_not_found",
        "alpha",
    )
    assert f"There are: base (0), {NAME} (1)." in reply.error["message"]
    reply = await router.ask(headers={"X-Rvec-Alpha": "much"})
    assert (reply.status, reply.error["code"]) == (400, "invalid_alpha")


@pytest.fixture
async def dial(start: Start, pair: Pair) -> Router:
    """`base` and enhanced@1 of one dial engine, `own` with an engine of its own."""
    spec = Dial(("a", "b"), {"base": (0.0, 0.0), NAME: (1.0, 1.0)}, AlphaRange(-1.0, 2.0))
    table = VariantTable(["base", NAME, "own"], spec)
    for name in ("base", NAME):
        table.set_ready(name, pair.base.upstream)
    table.set_ready("own", pair.enhanced.upstream)
    table.describe("own", VariantFacts(0.7, "v"))
    split = {"enhanced@0.25": 50, "own": 50}
    started: Router = await start(table, aliases={"assistant": {"split": split}, "default": NAME})
    return started


async def test_a_dial_is_told_what_an_alias_stands_for(dial: Router, pair: Pair) -> None:
    """In headers, as it may not know the name; the body stays as it is."""
    body = b'{"model": "default" }'
    reply = await dial.send(data=body)
    assert reply.marks == {"variant": NAME, "alias": "default", "reason": "alias", "alpha": "1"}
    seen = pair.base.seen[0]
    assert seen.body == body
    assert (seen.values("X-Rvec-Variant"), seen.values("X-Rvec-Alpha")) == ([NAME], ["1"])


async def test_a_client_does_not_name_the_dials_variant(dial: Router, pair: Pair) -> None:
    """That header would go past keys, limits and records."""
    headers = {"x-rvec-variant": "base", "X-Rvec-Reason": "sticky"}
    await dial.ask("default", headers=headers)
    await dial.ask(NAME, headers=headers)
    await dial.ask("base", headers=headers, alpha=0.5)
    named = [seen.values("X-Rvec-Variant") for seen in pair.base.seen]
    assert named == [[NAME], [], ["enhanced@0.5"]]


async def test_a_variant_is_one_however_its_alpha_is_spelled(start: Start, pair: Pair) -> None:
    """`enhanced@1.0` must not go past the limit of `enhanced@1`."""
    spec = Dial(("a",), {"base": (0.0,), NAME: (1.0,)}, AlphaRange(-1.0, 2.0))
    table = VariantTable(["base", NAME], spec)
    for name in ("base", NAME):
        table.set_ready(name, pair.base.upstream)
    router = await start(table, variants={NAME: {"max_in_flight": 1}})
    pair.base.answer = wait_for_ever
    first = asyncio.create_task(router.ask(NAME))
    await pair.base.asked.wait()
    reply = await router.ask("enhanced@1.0")
    assert (reply.status, reply.error["code"]) == (503, "model_busy")
    assert reply.marks["variant"] == NAME
    first.cancel()


async def test_a_split_over_a_dial_and_an_engine(dial: Router, pair: Pair) -> None:
    """Which of them it is, the policy doesn't know; only the dial is told its alpha."""
    replies = [await dial.ask(user=f"user-{n}") for n in range(30)]
    chosen = Counter(reply.marks["variant"] for reply in replies)
    assert set(chosen) == {"enhanced@0.25", "own"}
    assert {reply.marks["alpha"] for reply in replies} == {"0.25", "0.7"}
    assert {tuple(seen.values("X-Rvec-Alpha")) for seen in pair.base.seen} == {("0.25",)}
    assert {tuple(seen.values("X-Rvec-Alpha")) for seen in pair.enhanced.seen} == {()}
    assert len(pair.enhanced.seen) == chosen["own"]


async def test_an_alpha_for_an_alias_of_a_dial(dial: Router, pair: Pair) -> None:
    """The dial answers any; an engine that has just this one goes first."""
    reply = await dial.ask(alpha=0.4)
    assert (reply.marks["variant"], reply.marks["alpha"]) == ("enhanced@0.4", "0.4")
    seen = pair.base.seen[0]
    # Some paths of it read the header only.
    said = [*seen.values("X-Rvec-Variant"), *seen.values("X-Rvec-Alpha")]
    assert said == ["enhanced@0.4", "0.4"]
    reply = await dial.ask("base", headers={"X-Rvec-Alpha": "a=0.1, b=0.2"})
    assert (reply.marks["variant"], reply.marks["reason"]) == ("base", "explicit")
    assert pair.base.seen[1].values("X-Rvec-Alpha") == ["a=0.1, b=0.2"]
    assert (await dial.ask(alpha=0.7)).marks["variant"] == "own"
    reply = await dial.ask(alpha=7)
    assert (reply.status, reply.error["code"]) == (404, "alpha_not_found")
    assert "own (0.7), or any alpha in -1:2." in reply.error["message"]


# --- fallback and limits ----------------------------------------------------------------------


async def test_another_stands_in_only_where_that_is_configured(start: Start, pair: Pair) -> None:
    """Labelled, and counted; never for an alpha that somebody asked for."""
    table = pair.table()
    router = await start(
        table,
        aliases={"assistant": {"split": SPLIT, "salt": "s"}},
        variants={NAME: {"fallback": "base"}},
    )
    table.set_down(NAME, "it crashed")
    reply = await router.ask(user=user_of(NAME))
    assert reply.status == 200
    assert reply.marks == {
        "variant": "base",
        "alias": "assistant",
        "reason": "fallback",
        "alpha": "0",
    }
    assert (await router.ask(NAME)).marks["reason"] == "fallback"
    reply = await router.ask(alpha=1)
    assert (reply.status, reply.marks["variant"]) == (503, NAME)
    reply = await router.ask(NAME, headers={"X-Rvec-Alpha": "1"})
    assert (reply.status, reply.marks["reason"]) == (503, "explicit")
    fallbacks = "vllm_rvec_router_fallbacks_total"
    assert await router.sample(fallbacks, to="base") == 2
    await router.until_sample(2, ENDED, variant="base", reason="fallback")
    table.set_ready(NAME, pair.enhanced.upstream)
    table.set_down("base", "it crashed")
    assert (await router.ask("base")).status == 503


async def test_a_fallback_that_can_not_either_is_not_named(start: Start, pair: Pair) -> None:
    """The client is told of what it asked for."""
    table = pair.table()
    router = await start(table, variants={NAME: {"fallback": "base"}})
    table.set_down(NAME, "it crashed")
    table.set_down("base", "out of memory")
    reply = await router.ask(NAME)
    assert (reply.status, reply.headers["Retry-After"]) == (503, "5")
    assert "it crashed" in reply.error["message"]
    assert reply.marks == {"variant": NAME, "alias": None, "reason": "explicit", "alpha": "1"}


async def test_a_fallback_answers_for_one_that_can_not_be_reached_or_is_full(
    start: Start, pair: Pair
) -> None:
    """Whatever kept it from answering; not for what an engine has answered."""
    table = pair.table()
    held, gone = unused()
    with held:
        table.set_ready(NAME, gone)
        router = await start(table, variants={NAME: {"fallback": "base", "max_in_flight": 1}})
        assert (await router.ask(NAME)).marks["reason"] == "fallback"
    table.set_ready(NAME, pair.enhanced.upstream)
    pair.enhanced.answer = wait_for_ever
    first = asyncio.create_task(router.ask(NAME))
    await pair.enhanced.asked.wait()
    assert (await router.ask(NAME)).marks["reason"] == "fallback"
    first.cancel()
    await pair.enhanced.aborted.wait()
    pair.enhanced.answer = answers(500)
    reply = await router.ask(NAME)
    assert (reply.status, reply.marks["variant"]) == (500, NAME)


@pytest.fixture
async def narrow(start: Start, pair: Pair) -> Router:
    """`base` takes one request at a time."""
    started: Router = await start(
        pair.table(),
        aliases={"assistant": {"split": SPLIT, "salt": "s"}},
        variants={"base": {"max_in_flight": 1}},
    )
    return started


async def test_a_variant_that_is_full_is_503_with_retry_after(narrow: Router, pair: Pair) -> None:
    """The other is not; and the place is free with the answer's end."""
    release, quick = asyncio.Event(), pair.base.answer

    async def answer(request: web.Request) -> web.StreamResponse:
        await release.wait()
        return await quick(request)

    pair.base.answer = answer
    first = asyncio.create_task(narrow.ask("base"))
    await pair.base.asked.wait()
    for model, user in (("base", None), ("assistant", user_of("base"))):
        reply = await narrow.ask(model, user=user)
        assert (reply.status, reply.error["code"]) == (503, "model_busy")
        assert reply.headers["Retry-After"] == "1"
        assert reply.marks["variant"] == "base"
    assert (await narrow.ask(NAME)).status == 200
    release.set()
    assert (await first).status == 200
    assert (await narrow.ask("base")).status == 200
    assert await narrow.sample("vllm_rvec_router_errors_total", kind="busy") == 2


@pytest.mark.parametrize("is_stream", [False, True])
async def test_clients_that_leave_give_their_places_back(
    narrow: Router, pair: Pair, is_stream: bool
) -> None:
    """Before the answer and in the middle of it."""
    quick = pair.base.answer

    async def answer(request: web.Request) -> web.StreamResponse:
        if is_stream:
            await begin_events(request)
        return await wait_for_ever(request)

    pair.base.answer = answer
    leaving = asyncio.create_task(narrow.ask("base"))
    await pair.base.asked.wait()
    assert (await narrow.ask("base")).status == 503
    leaving.cancel()
    await pair.base.aborted.wait()
    pair.base.answer = quick
    await until(lambda: narrow.services.traffic.limit("base").in_flight == 0)
    assert (await narrow.ask("base")).status == 200


async def test_requests_that_wait_for_their_answer_are_in_flight(
    router: Router, pair: Pair
) -> None:
    """For a plain answer the head comes at its end: counted from then, none would ever show."""
    pair.base.answer = wait_for_ever
    waiting = asyncio.create_task(router.ask("base"))
    await pair.base.asked.wait()
    in_flight = "vllm_rvec_router_requests_in_flight"
    assert await router.sample(in_flight, variant="base") == 1
    waiting.cancel()
    await pair.base.aborted.wait()
    await router.until_sample(0, in_flight, variant="base")


# --- several upstreams ------------------------------------------------------------------------

RETRIES = "vllm_rvec_router_retries_total"


async def test_the_least_busy_upstream_is_asked(start: Start, pair: Pair) -> None:
    """By requests in flight."""
    router = await start(replicas(pair.base, pair.enhanced))
    pair.base.answer = pair.enhanced.answer = wait_for_ever
    waiting = [asyncio.create_task(router.ask("base")) for _ in range(6)]
    await until(lambda: len(pair.base.seen) + len(pair.enhanced.seen) == 6)
    assert len(pair.base.seen) == len(pair.enhanced.seen) == 3
    for task in waiting:
        task.cancel()


async def test_a_refused_connection_costs_one_request_a_second_try(
    start: Start, pair: Pair
) -> None:
    """The next are not even sent there."""
    held, gone = unused()
    with held:
        table = VariantTable(["base"])
        table.set_ready("base", gone, pair.base.upstream)
        router = await start(table)
        for _ in range(3):
            assert (await router.ask("base")).status == 200
    assert await router.sample(RETRIES, variant="base") == 1
    assert len(pair.base.seen) == 3


@pytest.mark.parametrize(
    "answer", [dies, answers(503, b'{"error": "asleep"}')], ids=["dies", "503"]
)
async def test_one_that_fails_before_its_answer_is_made_up_for_by_another(
    start: Start, pair: Pair, answer: Answer
) -> None:
    """Reset, or 503: the same body, the same id."""
    router = await start(replicas(pair.base, pair.enhanced))
    pair.base.answer = answer
    reply = await router.ask("base", x=[1, 2], headers={"X-Request-Id": "r-1"})
    assert reply.status == 200
    first, second = pair.base.seen[0], pair.enhanced.seen[0]
    assert first.body == second.body
    assert first.values("X-Request-Id") == second.values("X-Request-Id") == ["r-1"]
    assert (len(pair.base.seen), len(pair.enhanced.seen)) == (1, 1)
    assert await router.sample(RETRIES, variant="base") == 1


async def test_a_503_of_all_is_the_engines_own(start: Start, start_engine: StartEngine) -> None:
    """With its body, however many there are: no other is left to ask."""
    engines = [await start_engine() for _ in range(6)]
    for engine in engines:
        engine.answer = answers(503, b'{"error": "overloaded"}', **{"Retry-After": "17"})
    router = await start(replicas(*engines))
    reply = await router.ask("base")
    assert (reply.status, reply.body) == (503, b'{"error": "overloaded"}')
    assert reply.headers["Retry-After"] == "17"
    assert sum(len(engine.seen) for engine in engines) == 4
    router = await start(replicas(engines[0]))
    assert (await router.ask("base")).headers["Retry-After"] == "17"
    assert len(engines[0].seen) == 2


async def test_one_that_was_passed_over_has_nothing_in_flight(start: Start, pair: Pair) -> None:
    """Its answer is done with, while the other's may go on for minutes."""
    router = await start(replicas(pair.base, pair.enhanced))
    pair.base.answer = answers(503)

    async def answer(request: web.Request) -> web.StreamResponse:
        await begin_events(request)
        return await wait_for_ever(request)

    pair.enhanced.answer = answer
    async with router.http.post(router.url + CHAT, data=b'{"model": "base"}') as reply:
        assert reply.status == 200
        load = router.services.variants.load
        assert load.in_flight(pair.enhanced.upstream) == 1
        assert load.in_flight(pair.base.upstream) == 0


@pytest.mark.parametrize("is_stream", [True, False])
async def test_nothing_is_asked_again_after_the_first_byte(
    start: Start, pair: Pair, is_stream: bool
) -> None:
    """What has begun can't be taken back."""

    async def cut(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "100"})
        await response.prepare(request)
        await response.write(b"{")
        return die(request)

    pair.base.answer = dies_after(chat_event("hi")) if is_stream else cut
    router = await start(replicas(pair.base, pair.enhanced))
    if is_stream:
        reply = await router.ask("base", stream=True)
        assert b"upstream_broke_off" in reply.body
    else:
        reply = await router.ask("base")
        assert (reply.status, reply.error["code"]) == (502, "upstream_broke_off")
    assert not pair.enhanced.seen
    broken = {"kind": "broken_stream", "variant": "base"}
    await router.until_sample(1, "vllm_rvec_router_errors_total", **broken)
    assert await router.sample(RETRIES) == 0


async def test_an_upstream_that_does_not_even_connect_is_skipped_after_one_try(
    start: Start, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that is gone answers nothing; each request must not wait for it anew."""
    monkeypatch.setattr(upstream_answers, "TIMEOUT", aiohttp.ClientTimeout(connect=0.3))
    with socket.socket() as full, socket.socket() as one, socket.socket() as two:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for client in (one, two):
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        table = VariantTable(["base"])
        gone = Upstream(f"http://127.0.0.1:{full.getsockname()[1]}", None)
        table.set_ready("base", gone, pair.base.upstream)
        router = await start(table)
        assert (await router.ask("base")).status == 200
        assert not table.load.is_well(gone)
        started = time.perf_counter()
        assert (await router.ask("base")).status == 200
        assert time.perf_counter() - started < 0.25


async def test_a_down_upstream_is_skipped_and_taken_back(
    start: Start, pair: Pair, start_engine: StartEngine
) -> None:
    """No request is lost meanwhile, and no second one sent there."""
    held, gone = unused()
    table = VariantTable(["base"])
    table.set_ready("base", gone, pair.base.upstream)
    router = await start(table, is_watching=True, health=WATCHED)
    await until(lambda: not table.load.is_well(gone))
    up = {"variant": "base", "upstream": gone.base_url}
    await router.until_sample(0, "vllm_rvec_router_upstream_up", **up)
    for _ in range(3):
        assert (await router.ask("base")).status == 200
    assert await router.sample(RETRIES) == 0
    port = held.getsockname()[1]
    held.close()
    runner = web.AppRunner(web.Application(), shutdown_timeout=0.1)
    app = runner.app
    asked = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path != "/health":
            asked.set()
        return web.json_response({"id": "1"})

    app.router.add_route("*", "/{path:.*}", answer)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port, reuse_address=True).start()
        await until(lambda: table.load.is_well(gone))
        await router.until_sample(1, "vllm_rvec_router_upstream_up", **up)
        assert (await router.ask("base")).status == 200
        assert asked.is_set()
    finally:
        await runner.cleanup()


async def test_a_hung_upstream_is_skipped_and_taken_back(start: Start, pair: Pair) -> None:
    """It accepts connections and answers nothing, not even about its health."""
    table = replicas(pair.base, pair.enhanced)
    well, pair.base.answer = pair.base.answer, wait_for_ever
    router = await start(table, is_watching=True, health=WATCHED)
    await until(lambda: not table.load.is_well(pair.base.upstream))
    for _ in range(3):
        assert (await router.ask("base")).status == 200
    assert {seen.target for seen in pair.base.seen} == {"/health"}
    pair.base.answer = well
    await until(lambda: table.load.is_well(pair.base.upstream))
    assert (await router.ask("base")).status == 200
    assert pair.base.seen[-1].target != "/health" or len(pair.base.seen) > 3


async def test_readiness_follows_the_upstreams(start: Start, pair: Pair) -> None:
    """`/livez` tells of the process alone."""
    table = replicas(pair.base)
    router = await start(table, is_watching=True, health=WATCHED, shared_key="secret")
    ready = await router.get("/readyz")
    assert (ready.status, ready.json["status"]) == (200, "ready")
    well, pair.base.answer = pair.base.answer, answers(503)
    await until(lambda: not table.load.is_well(pair.base.upstream))
    down = await router.get("/readyz")
    assert (down.status, down.json) == (
        503,
        {"status": "down", "variants": {"base": "its engine can't be reached"}},
    )
    alive = await router.get("/livez")
    assert (alive.status, alive.json) == (200, {"status": "alive"})
    pair.base.answer = well
    await until(lambda: table.load.is_well(pair.base.upstream))
    assert (await router.get("/readyz")).status == 200


# --- stored responses -------------------------------------------------------------------------


class Store:
    """An engine of `/v1/responses` that keeps what it made."""

    def __init__(self, engine: StandInEngine, name: str) -> None:
        self.name = name
        self.ids: set[str] = set()
        self.engine = engine
        engine.answer = self.answer

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Make a response, or give one back."""
        if request.path == RESPONSES:
            asked = json.loads(self.engine.seen[-1].body)
            earlier = asked.get("previous_response_id")
            if earlier is not None and earlier not in self.ids:
                return web.json_response({"error": {"message": "not found"}}, status=404)
            made = f"resp_{self.name}{len(self.ids)}"
            self.ids.add(made)
            return web.json_response({"id": made, "object": "response"})
        found = request.path.split("/")[3]
        if found not in self.ids:
            return web.json_response({"error": {"message": "not found"}}, status=404)
        return web.json_response({"id": found, "object": "response", "path": request.path})


@pytest.fixture
def stores(pair: Pair) -> tuple[Store, Store]:
    return Store(pair.base, "b"), Store(pair.enhanced, "e")


async def test_follow_ups_go_to_the_engine_that_has_the_response(
    router: Router, stores: tuple[Store, Store]
) -> None:
    """By an alias too, whatever the split says of who asks now."""
    first = await router.ask(path=RESPONSES, user=user_of(NAME))
    assert first.marks["variant"] == NAME
    made = first.json["id"]
    follow_up = await router.ask(path=RESPONSES, user=user_of("base"), previous_response_id=made)
    assert follow_up.status == 200
    assert follow_up.marks == {
        "variant": NAME,
        "alias": "assistant",
        "reason": "owner",
        "alpha": "1",
    }
    got = await router.get(f"{RESPONSES}/{made}?stream=false")
    assert (got.json["id"], got.marks["variant"], got.marks["reason"]) == (made, NAME, "owner")
    cancelled = await router.send(f"{RESPONSES}/{made}/cancel")
    assert cancelled.json["path"] == f"{RESPONSES}/{made}/cancel"
    assert not stores[0].engine.seen
    targets = [seen.target for seen in stores[1].engine.seen]
    assert targets[2:] == [f"{RESPONSES}/{made}?stream=false", f"{RESPONSES}/{made}/cancel"]


async def test_follow_ups_go_to_the_replica_that_has_the_response(
    start: Start, pair: Pair, stores: tuple[Store, Store]
) -> None:
    """Though another is less busy."""
    router = await start(replicas(pair.base, pair.enhanced))
    with lease(router.services.variants.load, pair.base.upstream):
        made = (await router.ask("base", path=RESPONSES)).json["id"]
    assert made in stores[1].ids
    with lease(router.services.variants.load, pair.enhanced.upstream):
        reply = await router.ask("base", path=RESPONSES, previous_response_id=made)
    assert reply.status == 200
    assert reply.marks["reason"] == "explicit"
    assert not pair.base.seen


async def test_a_stream_is_found_again(
    router: Router, pair: Pair, stores: tuple[Store, Store]
) -> None:
    """Its id stands in the first event, which may come in pieces."""

    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path != RESPONSES:
            return await stores[1].answer(request)
        response = await begin_events(request)
        created = b'event: response.created\ndata: {"response": {"id": "resp_s", "x": 1}}\n\n'
        await response.write(created[:50])
        await response.write(created[50:])
        return response

    pair.enhanced.answer = answer
    stores[1].ids.add("resp_s")
    await router.ask(NAME, path=RESPONSES, stream=True)
    assert (await router.get(f"{RESPONSES}/resp_s")).marks["reason"] == "owner"
    assert not pair.base.seen


async def test_a_response_that_nobody_knows_is_looked_for_everywhere(
    router: Router, stores: tuple[Store, Store]
) -> None:
    """The router may have been started anew; the engines have not."""
    stores[1].ids.add("resp_old")
    got = await router.get(f"{RESPONSES}/resp_old")
    assert (got.status, got.json["id"]) == (200, "resp_old")
    missing = await router.get(f"{RESPONSES}/resp_none")
    assert (missing.status, missing.error["message"]) == (404, "not found")


async def test_looking_everywhere_goes_past_those_that_fail(
    start: Start, stores: tuple[Store, Store], start_engine: StartEngine
) -> None:
    """One that is down, or hangs and is known to, or answers with an error, may not have it."""
    failing, hung = await start_engine(), await start_engine()
    failing.answer, hung.answer = answers(500), wait_for_ever
    held, gone = unused()
    table = VariantTable(["base"])
    table.set_ready("base", gone, hung.upstream, failing.upstream, stores[1].engine.upstream)
    table.load.note_failure(hung.upstream, seconds=1000)
    router = await start(table)
    stores[1].ids.add("resp_old")
    with held:
        async with asyncio.timeout(5):
            assert (await router.get(f"{RESPONSES}/resp_old")).status == 200
            reply = await router.get(f"{RESPONSES}/resp_none")
    # Not 404: it may be there where nobody could look.
    assert reply.status >= 500


async def test_an_owner_that_is_gone_is_told_as_such(
    router: Router, pair: Pair, stores: tuple[Store, Store]
) -> None:
    """Another engine can't have it."""
    made = (await router.ask(NAME, path=RESPONSES)).json["id"]
    held, gone = unused()
    with held:
        router.services.owners.note(made, NAME, gone.base_url)
        router.services.variants.set_ready(NAME, gone)
        reply = await router.get(f"{RESPONSES}/{made}")
        assert (reply.status, reply.error["code"]) == (502, "upstream_error")
        reply = await router.ask(path=RESPONSES, previous_response_id=made)
        assert (reply.status, reply.error["code"]) == (503, "model_down")
    assert not pair.base.seen


# --- what passes and what does not ------------------------------------------------------------


async def test_a_form_names_an_alias(router: Router, pair: Pair) -> None:
    """Audio comes as multipart; it passes byte for byte."""
    form = aiohttp.FormData()
    form.add_field("file", b"RIFF\x00\r\n--x\r\n", filename="a.wav", content_type="audio/wav")
    form.add_field("model", "assistant")
    reply = await router.send(
        "/v1/audio/transcriptions", form, headers={"X-Rvec-Key": user_of(NAME)}
    )
    assert reply.status == 200
    assert (reply.marks["variant"], reply.marks["reason"]) == (NAME, "sticky")
    assert b"RIFF\x00\r\n--x\r\n" in pair.enhanced.seen[0].body
    assert pair.enhanced.seen[0].values("Content-Type")[0].startswith("multipart/form-data; b")
    empty = aiohttp.FormData({"language": "de"}, default_to_multipart=True)
    reply = await router.send("/v1/audio/translations", empty)
    assert (reply.status, reply.error["code"]) == (400, "missing_model")
    assert "assistant" in reply.error["message"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/collective_rpc"),
        ("POST", "/sleep?level=1"),
        ("POST", "/v1/load_lora_adapter"),
        ("GET", "/version"),
        ("GET", "/v1/realtime"),
        ("PUT", "/v1/rvec/alpha"),
    ],
)
async def test_control_paths_are_denied_with_their_reason(
    router: Router, pair: Pair, method: str, path: str
) -> None:
    """And reach no engine."""
    reply = await router.send(path, b'{"model": "base"}', method=method)
    assert (reply.status, reply.error["code"]) == (404, "denied_url")
    assert "is kept from clients, because it " in reply.error["message"]
    assert not pair.base.seen


async def test_no_header_names_another_model(router: Router, pair: Pair) -> None:
    """SageMaker's takes the place of the body's `model` in vLLM, behind the router's back."""
    headers = {
        "X-Amzn-SageMaker-Adapter-Identifier": NAME,
        "X-Amzn-SageMaker-Session-Id": "1",
        "X-Amzn-Trace-Id": "kept",
    }
    await router.ask("base", path="/invocations", headers=headers)
    names = {name.lower() for name, _ in pair.base.seen[0].headers}
    assert not [name for name in names if "sagemaker" in name]
    assert "x-amzn-trace-id" in names


async def test_headers_that_are_not_utf8_pass(router: Router, pair: Pair) -> None:
    """Latin-1 is old, not wrong: no 500."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(router.url.rpartition(":")[2]))
    body = b'{"model": "assistant"}'
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        b"X-Tag: caf\xe9\r\nX-Rvec-Key: caf\xe9\r\nContent-Length: 22\r\n\r\n" + body
    )
    async with asyncio.timeout(5):
        head = await reader.read()
    writer.close()
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"X-Rvec-Reason: sticky" in head
    assert len(pair.base.seen) + len(pair.enhanced.seen) == 1


# --- shadow -----------------------------------------------------------------------------------

SHADOWS = "vllm_rvec_router_shadow_requests_total"


async def test_a_shadow_gets_a_copy_and_both_replies_are_kept(
    start: Start, pair: Pair, tmp_path: Path
) -> None:
    """The live request is as without it; the copy carries nothing that names or bills anybody."""
    pairs = tmp_path / "pairs.jsonl"
    shadow = {"variant": NAME, "share": 1.0, "record": str(pairs)}
    router = await start(
        pair.table(), aliases={"assistant": {"split": {"base": 1}, "shadow": shadow}}
    )
    pair.enhanced.answer = answers(200, b'{"shadow": true}')
    headers = {"X-Request-Id": "r-1", "Authorization": "Bearer mine", "X-Rvec-Key": "alice"}
    reply = await router.ask(messages=USER, alpha=0, headers=headers)
    assert (reply.status, reply.marks["variant"]) == (200, "base")
    await router.until_sample(1, SHADOWS, alias="assistant", variant=NAME, result="sent")
    copy = pair.enhanced.seen[0]
    assert json.loads(copy.body) == {"model": NAME, "messages": USER, "stream": False}
    assert copy.values("X-Request-Id") == ["r-1-shadow"]
    assert copy.values("Authorization") == ["Bearer engine-secret"]
    assert not copy.values("X-Rvec-Key")
    await until(lambda: pairs.exists() and pairs.read_bytes().endswith(b"\n"))
    (line,) = [json.loads(text) for text in pairs.read_text().splitlines()]
    assert line["request_id"] == "r-1"
    assert line["live"]["body"]["choices"][0]["message"]["content"] == "hello"
    assert line["shadow"]["body"] == {"shadow": True}
    # It is no request of anybody's.
    await router.until_sample(1, ENDED)


async def test_a_hung_shadow_slows_nobody(start: Start, pair: Pair) -> None:
    """Copies beyond the queue are dropped, and counted."""
    shadow = {"variant": NAME, "queue": 2, "concurrency": 1, "timeout_seconds": 0.5}
    router = await start(
        pair.table(), aliases={"assistant": {"split": {"base": 1}, "shadow": shadow}}
    )
    pair.enhanced.answer = wait_for_ever
    started = time.perf_counter()
    for _ in range(10):
        assert (await router.ask()).status == 200
    assert time.perf_counter() - started < 0.5
    assert await router.sample(SHADOWS, result="dropped") == 8
    assert len(pair.enhanced.seen) == 1
    await router.until_sample(2, SHADOWS, result="timed_out")
    await until(lambda: router.services.traffic.limit(NAME).in_flight == 0)


async def test_a_copy_of_a_stream_and_of_the_shadows_own_is_none_of_the_clients_concern(
    start: Start, pair: Pair
) -> None:
    """Named variants have no shadow; neither has what the shadow's variant itself answers."""
    shadow = {"variant": NAME}
    router = await start(
        pair.table(), aliases={"assistant": {"split": SPLIT, "salt": "s", "shadow": shadow}}
    )
    await router.ask("base")
    await router.ask(user=user_of(NAME))
    await router.ask(path="/tokenize", user=user_of("base"))
    pair.base.answer = dies_after(chat_event("hi"))
    broken = await router.ask(user=user_of("base"), stream=True)
    assert b"upstream_broke_off" in broken.body
    await router.until_sample(1, SHADOWS)
    assert len(pair.enhanced.seen) == 2
    assert json.loads(pair.enhanced.seen[1].body)["stream"] is False


# --- metrics ----------------------------------------------------------------------------------


async def test_metrics_show_what_happened(router: Router, pair: Pair) -> None:
    """By variant, alias and reason; an error inside a 200 stream is one."""

    async def stream(request: web.Request) -> web.StreamResponse:
        response = await begin_events(request)
        for text in ("a", "b", "c"):
            await response.write(chat_event(text))
            await asyncio.sleep(0.01)  # else they come as one
        usage = b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":3}}\n\n'
        await response.write(usage + b"data: [DONE]\n\n")
        return response

    async def fail(request: web.Request) -> web.StreamResponse:
        response = await begin_events(request)
        await response.write(b'data: {"error": {"message": "x"}}\n\ndata: [DONE]\n\n')
        return response

    pair.enhanced.answer = stream
    labels = {"variant": NAME, "alias": "assistant", "reason": "sticky"}
    await router.ask(user=user_of(NAME), stream=True)
    await router.until_sample(1, ENDED, status_class="2xx", **labels)
    prefix = "vllm_rvec_router_"
    assert await router.sample(f"{prefix}time_to_first_token_seconds_count", **labels) == 1
    assert await router.sample(f"{prefix}inter_token_latency_seconds_count", **labels) >= 1
    assert await router.sample(f"{prefix}request_duration_seconds_count", **labels) == 1
    assert await router.sample(f"{prefix}prompt_tokens_total", **labels) == 5
    assert await router.sample(f"{prefix}generation_tokens_total", **labels) == 3
    assert await router.sample(f"{prefix}configuration_generation") == 1
    assert await router.sample(f"{prefix}configured_weight", variant=NAME) == 0.5
    pair.enhanced.answer = fail
    await router.ask(user=user_of(NAME), stream=True)
    await router.until_sample(1, f"{prefix}errors_total", kind="in_stream", variant=NAME)


async def test_clients_make_no_series(dial: Router) -> None:
    """Not by names, keys or alphas: `other` stands for all of them."""
    await dial.ask("default", user="alice-secret")
    before = len((await dial.get("/metrics")).body.splitlines())
    for n in range(30):
        await dial.ask(f"enhanced@0.{n + 100}", user=f"alice-{n}")
        await dial.ask(f"ghost-{n}", headers={"X-Request-Id": f"ghost-{n}"})
        await dial.get(f"/ghost-{n}")
    text = (await dial.get("/metrics")).body.decode()
    assert not {word for word in ("ghost", "alice", "0.1") if f'"{word}' in text}
    assert 'variant="other"' in text
    assert len(text.splitlines()) - before < 60


# --- results ----------------------------------------------------------------------------------


async def test_feedback_and_experiments(start: Start, pair: Pair, tmp_path: Path) -> None:
    """What the split dealt, and what it was worth; without prompts, keys or names of users."""
    path = tmp_path / "results.sqlite"
    router = await start(
        pair.table(),
        aliases={"assistant": {"split": SPLIT, "salt": "s"}, "default": "base"},
        results={"path": str(path)},
    )
    ids = {}
    for n in range(20):
        reply = await router.ask(user=f"user-{n}", messages=[{"secret": "prompt"}])
        ids[reply.headers["X-Request-Id"]] = reply.marks["variant"]
    await router.ask("default")
    await router.ask(path="/tokenize", prompt="x")
    for request_id, variant in ids.items():
        vote = "up" if variant == NAME else "down"
        said = json.dumps({"request_id": request_id, "vote": vote})
        assert (await router.send("/v1/rvec/feedback", said)).status == 200
    (found,) = (await router.get("/v1/rvec/experiments")).json["data"]
    assert (found["experiment"], found["measure"], found["outcomes"]) == ("assistant", "votes", 20)
    summary = {one["variant"]: one for one in found["variants"]}
    assert list(summary) == ["base", NAME]
    assert sum(one["units"] for one in summary.values()) == 20
    assert (summary[NAME]["win_rate"]["value"], summary["base"]["win_rate"]["value"]) == (1.0, 0.0)
    assert found["verdict"]
    with closing(sqlite3.connect(path)) as connection:
        dump = "\n".join(connection.iterdump())
    assert unit_of("user-0", "s", "assistant") in dump
    assert not {word for word in ("user-", 'prompt"', "secret") if word in dump}


async def test_a_split_made_by_hand_is_an_experiment_too(
    start: Start, pair: Pair, tmp_path: Path
) -> None:
    """Whoever opens a canary on a plain alias wants to know."""
    router = await start(
        pair.table(),
        aliases={"default": "base"},
        results={"path": str(tmp_path / "results.sqlite")},
    )
    assert (await router.get("/v1/rvec/experiments")).json["data"] == []
    await put(router, "default", {"split": SPLIT})
    for n in range(8):
        await router.ask("default", user=f"user-{n}")
    (found,) = (await router.get("/v1/rvec/experiments")).json["data"]
    shares = [one["configured_share"] for one in found["variants"]]
    assert (found["experiment"], shares) == ("default", [0.5, 0.5])


async def test_feedback_of_an_unknown_request_is_404(
    start: Start, pair: Pair, tmp_path: Path
) -> None:
    """And one that says nothing 400."""
    router = await start(pair.table(), results={"path": str(tmp_path / "results.sqlite")})
    reply = await router.send("/v1/rvec/feedback", b'{"request_id": "r", "vote": "up"}')
    assert (reply.status, reply.error["code"]) == (404, "unknown_request_id")
    for body in (b"{}", b'{"request_id": "r"}', b'{"request_id": "r", "vote": "maybe"}', b"["):
        reply = await router.send("/v1/rvec/feedback", body)
        assert (reply.status, reply.error["code"]) == (400, "invalid_body")


async def test_without_results_there_is_neither(router: Router) -> None:
    """404 says how to have them."""
    for method, path in (("POST", "/v1/rvec/feedback"), ("GET", "/v1/rvec/experiments")):
        said = b'{"request_id": "r", "vote": "up"}'
        reply = await router.send(path, said, method=method)
        assert (reply.status, reply.error["code"]) == (404, "results_disabled")
        assert "results: {path:" in reply.error["message"]


async def test_a_locked_file_stops_feedback_and_nothing_else(
    start: Start, pair: Pair, tmp_path: Path
) -> None:
    """Serving goes on; what was served meanwhile is stored afterwards."""
    path = tmp_path / "results.sqlite"
    router = await start(
        pair.table(),
        aliases={"assistant": {"split": SPLIT}},
        results={"path": str(path)},
    )
    await router.services.results.flush()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        started = time.perf_counter()
        reply = await router.ask(user="alice")
        assert reply.status == 200
        assert time.perf_counter() - started < 0.5
        request_id = reply.headers["X-Request-Id"]
        said = json.dumps({"request_id": request_id, "score": 0.5})
        feedback = asyncio.create_task(router.send("/v1/rvec/feedback", said))
        for _ in range(5):
            assert (await router.ask(user="alice")).status == 200
        refused = await feedback
        assert (refused.status, refused.error["code"]) == (503, "results_unavailable")
        assert refused.headers["Retry-After"]
        connection.execute("ROLLBACK")
    async with asyncio.timeout(5):
        while (await router.send("/v1/rvec/feedback", said)).status != 200:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    (found,) = (await router.get("/v1/rvec/experiments")).json["data"]
    assert sum(one["exposures"] for one in found["variants"]) == 6


# --- changing weights -------------------------------------------------------------------------


async def put(router: Router, alias: str, body: Any, key: str = ADMIN_KEY) -> Reply:
    """Change an alias's weights."""
    headers = {"Authorization": f"Bearer {key}"}
    data = body if isinstance(body, bytes) else json.dumps(body)
    return await router.send(f"/v1/rvec/aliases/{alias}", data, method="PUT", headers=headers)


async def test_weights_are_changed_live(router: Router) -> None:
    """From the next request on, until the configured split changes."""
    reply = await put(router, "assistant", {"split": {"base": 0, NAME: 1}})
    assert reply.json == {
        "id": "assistant",
        "object": "rvec.alias",
        "split": {"base": 0.0, NAME: 1.0},
        "old_split": {"base": 50.0, NAME: 50.0},
    }
    for user in (user_of("base"), user_of(NAME)):
        assert (await router.ask(user=user)).marks["variant"] == NAME
    weight = "vllm_rvec_router_configured_weight"
    assert await router.sample(weight, alias="assistant", variant=NAME) == 1
    listed = (await router.get("/v1/rvec/aliases")).json["data"]
    assert [(one["id"], one["split"]) for one in listed] == [
        ("assistant", {"base": 0.0, NAME: 1.0}),
        ("default", {"base": 1.0}),
    ]
    routing = router.services.traffic.routing
    router.services.apply(routing)
    assert (await router.ask(user=user_of("base"))).marks["variant"] == NAME
    changed = routing.aliases["assistant"].model_copy(update={"split": {"base": 3.0, NAME: 1.0}})
    aliases = {**routing.aliases, "assistant": changed}
    router.services.apply(routing.model_copy(update={"aliases": aliases}))
    assert (await router.get("/v1/rvec/aliases/assistant")).json["split"] == changed.split


@pytest.mark.parametrize(
    "body",
    [
        b"no",
        {},
        {"split": {}},
        {"split": {"base": 0}},
        {"split": {"base": -1, NAME: 2}},
        {"split": {"base": "much"}},
        b'{"split": {"base": NaN}}',
        b'{"split": {"base": 1e999}}',
        {"split": {"base": 1e10}},
        {"split": {"base": 1}, "salt": "x"},
    ],
)
async def test_weights_that_choose_nobody_are_refused(router: Router, body: Any) -> None:
    """And nothing changes."""
    reply = await put(router, "assistant", body)
    assert (reply.status, reply.error["code"]) == (400, "invalid_body")
    assert router.services.traffic.weights("assistant") == SPLIT


async def test_weights_are_for_the_admin_and_for_what_is_there(start: Start, pair: Pair) -> None:
    """A client's key, or none, changes nothing."""
    router = await start(pair.table(), shared_key="client", aliases={"assistant": {"split": SPLIT}})
    for key in ("client", "wrong", ""):
        reply = await put(router, "assistant", {"split": {"base": 1}}, key)
        assert (reply.status, reply.error["code"]) == (401, "invalid_admin_key")
    reply = await put(router, "ghost", {"split": {"base": 1}})
    assert (reply.status, reply.error["code"]) == (404, "alias_not_found")
    reply = await put(router, "assistant", {"split": {"base": 1, "ghost": 1}})
    assert (reply.status, reply.error["code"]) == (400, "unknown_variant")
    assert "no variant ghost" in reply.error["message"]
    assert router.services.traffic.weights("assistant") == SPLIT
    assert (await router.get("/v1/rvec/aliases")).status == 401


# --- keys -------------------------------------------------------------------------------------


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def key(text: str, **limits: float) -> dict[str, Any]:
    return {"sha256": hash_key(text), **limits}


async def test_each_key_has_limits_of_its_own(start: Start, pair: Pair) -> None:
    """One client's share is not another's; 429 says when to ask again."""
    router = await start(
        pair.table(), keys={"slow": key("k-slow", requests_per_minute=12), "free": key("k-free")}
    )
    assert (await router.ask("base", headers=bearer("k-slow"))).status == 200
    reply = await router.ask("base", headers=bearer("k-slow"))
    assert (reply.status, reply.error["code"]) == (429, "rate_limit_exceeded")
    assert 1 <= int(reply.headers["Retry-After"]) <= 5
    assert "'slow'" in reply.error["message"]
    for _ in range(3):
        assert (await router.ask("base", headers={"x-api-key": "k-free"})).status == 200
    for headers in ({}, bearer("wrong"), bearer(hash_key("k-free"))):
        assert (await router.ask("base", headers=headers)).status == 401
    assert len(pair.base.seen) == 4
    seen = {value for one in pair.base.seen for _, value in one.headers}
    assert not {value for value in seen if "k-slow" in value or "k-free" in value}
    errors = "vllm_rvec_router_errors_total"
    assert await router.sample(errors, kind="rate_limited") == 1
    assert await router.sample(errors, kind="unauthorized") == 3


async def test_a_keys_rate_is_for_every_path(start: Start, pair: Pair) -> None:
    """Lists cost the router as much as answers; probes are nobody's."""
    router = await start(pair.table(), keys={"slow": key("k", requests_per_minute=12)})
    assert (await router.get("/v1/models", headers=bearer("k"))).status == 200
    assert (await router.get("/v1/models", headers=bearer("k"))).status == 429
    assert (await router.get("/livez", headers=bearer("k"))).status == 200


async def test_a_reload_can_not_make_a_client_the_admin(start: Start, pair: Pair) -> None:
    """The same key for both is refused then, too, and the old keys stay."""
    router = await start(pair.table(), keys={"one": key("k")})
    changed = Routing.model_validate({"keys": {"one": key(ADMIN_KEY)}})
    with pytest.raises(ConfigError, match="admin key is also a client's"):
        router.services.apply(changed)
    assert (await router.get("/v1/models", headers=bearer("k"))).status == 200


async def test_a_client_that_leaves_before_the_answer_is_counted(start: Start, pair: Pair) -> None:
    """With no class of status, as none was ever sent."""
    router = await start(pair.table())
    pair.base.answer = wait_for_ever
    asking = asyncio.create_task(router.ask("base"))
    await pair.base.asked.wait()
    asking.cancel()
    labels = {"variant": "base", "status_class": ""}
    await router.until_sample(1, "vllm_rvec_router_requests_total", **labels)


async def test_a_body_that_never_ends_is_given_up(
    router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that stays half-sent must not stay for ever."""
    monkeypatch.setattr(proxy, "BODY_SECONDS", 0.1)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
    port = int(router.url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head)
    async with asyncio.timeout(5):
        assert (await reader.readline()).startswith(b"HTTP/1.1 408")
    writer.close()


@pytest.mark.parametrize("status", [400, 404, 413, 422, 500])
async def test_an_engines_error_goes_through_as_it_is(
    router: Router, pair: Pair, status: int
) -> None:
    """Status, body and type; vLLM 0.32 itself answers no 422 to a body (it makes them 400)."""
    body = b'{"error":{"message":"m","type":"t","param":null,"code":1}}'
    pair.base.answer = answers(status, body, **{"Content-Type": "application/json"})
    reply = await router.ask("base")
    assert (reply.status, reply.body) == (status, body)


async def test_a_key_has_so_many_in_flight(start: Start, pair: Pair) -> None:
    """A client that leaves gives its place back."""
    router = await start(pair.table(), keys={"one": key("k", max_in_flight=1)})
    quick, pair.base.answer = pair.base.answer, wait_for_ever
    first = asyncio.create_task(router.ask("base", headers=bearer("k")))
    await pair.base.asked.wait()
    reply = await router.ask(NAME, headers=bearer("k"))
    assert (reply.status, reply.headers["Retry-After"]) == (429, "1")
    first.cancel()
    await pair.base.aborted.wait()
    pair.base.answer = quick
    await until(lambda: router.services.limiter.in_flight("one") == 0)
    assert (await router.ask("base", headers=bearer("k"))).status == 200


async def test_keys_are_replaced_while_requests_are_under_way(start: Start, pair: Pair) -> None:
    """An old key is out at once; what it has begun ends."""
    router = await start(pair.table(), keys={"old": key("k-old")})
    release, quick = asyncio.Event(), pair.base.answer

    async def answer(request: web.Request) -> web.StreamResponse:
        await release.wait()
        return await quick(request)

    pair.base.answer = answer
    under_way = asyncio.create_task(router.ask("base", headers=bearer("k-old")))
    await pair.base.asked.wait()
    keys = {"new": key("k-new"), "other": key("k-other")}
    router.services.apply(Routing.model_validate({"keys": keys}))
    release.set()
    assert (await under_way).status == 200
    assert (await router.ask("base", headers=bearer("k-old"))).status == 401
    for now in ("k-new", "k-other"):
        assert (await router.ask("base", headers=bearer(now))).status == 200
    twice = Routing.model_validate({"keys": {"a": key("same"), "b": key("same")}})
    with pytest.raises(ConfigError):
        router.services.apply(twice)
    assert (await router.ask("base", headers=bearer("k-new"))).status == 200
    assert await router.sample("vllm_rvec_router_configuration_generation") == 2


# --- browsers ---------------------------------------------------------------------------------

PREFLIGHT = {
    "Origin": "https://app.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type",
}


def cors_of(reply: Reply) -> dict[str, str]:
    return {name: v for name, v in reply.headers.items() if name.lower().startswith("access-co")}


async def engine_for_all_origins(request: web.Request) -> web.StreamResponse:
    """As vLLM's: its default lets every page in."""
    headers = {}
    if "Origin" in request.headers:
        headers["Access-Control-Allow-Origin"] = "*"
        headers["Access-Control-Allow-Credentials"] = "true"
    return web.json_response({"id": "1"}, headers=headers)


async def test_no_web_page_may_ask_by_default(router: Router, pair: Pair) -> None:
    """Whatever the engine says: it does not know who may reach the router."""
    pair.base.answer = engine_for_all_origins
    preflight = await router.send(method="OPTIONS", headers=PREFLIGHT)
    assert preflight.status == 405
    reply = await router.ask("base", headers={"Origin": "https://app.example"})
    assert reply.status == 200
    assert cors_of(preflight) == cors_of(reply) == {}


@pytest.mark.parametrize("allowed", ["https://app.example", "*"])
async def test_pages_of_named_origins_may_ask(start: Start, pair: Pair, allowed: str) -> None:
    """Also on errors, which the page wants to read; never with credentials."""
    pair.base.answer = engine_for_all_origins
    router = await start(pair.table(), shared_key="k", cors_origins=[allowed])
    preflight = await router.send(method="OPTIONS", headers=PREFLIGHT)
    assert preflight.status == 204
    assert preflight.headers["Access-Control-Allow-Origin"] == "https://app.example"
    assert "POST" in preflight.headers["Access-Control-Allow-Methods"]
    assert preflight.headers["Access-Control-Allow-Headers"] == "authorization, content-type"
    origin = {"Origin": "https://app.example"}
    for headers, status in ((origin | bearer("k"), 200), (origin, 401)):
        reply = await router.ask("base", headers=headers)
        assert reply.status == status
        assert reply.headers.getall("Access-Control-Allow-Origin") == ["https://app.example"]
        assert "X-Rvec-Variant" in reply.headers["Access-Control-Expose-Headers"]
        assert reply.headers["Vary"] == "Origin"
        assert "Access-Control-Allow-Credentials" not in reply.headers


async def test_pages_of_other_origins_may_not(start: Start, pair: Pair) -> None:
    """Neither one that only begins the same."""
    router = await start(pair.table(), cors_origins=["https://app.example"])
    for origin in ("https://app.example.evil", "http://app.example", "null"):
        preflight = await router.send(method="OPTIONS", headers=PREFLIGHT | {"Origin": origin})
        assert (preflight.status, cors_of(preflight)) == (405, {})
        assert cors_of(await router.ask("base", headers={"Origin": origin})) == {}


# --- TLS, exposure ----------------------------------------------------------------------------


def write_certificate(folder: Path, name: str) -> TlsConfig:
    certificate, key = make_certificate(folder, name)
    return TlsConfig(certificate=str(certificate), key=str(key))


def trusting(config: TlsConfig) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=config.certificate)


async def test_https(start: Start, pair: Pair, tmp_path: Path) -> None:
    """And plain HTTP is not answered there."""
    config = write_certificate(tmp_path, "one")
    router = await start(pair.table(), tls=load_tls(config))
    reply = await router.send(data=b'{"model": "base"}', ssl=trusting(config))
    assert (reply.status, reply.marks["variant"]) == (200, "base")
    with pytest.raises(aiohttp.ClientError):
        await router.http.get(router.url.replace("https", "http") + "/livez")


async def test_certificates_are_changed_under_a_running_server(
    start: Start, pair: Pair, tmp_path: Path
) -> None:
    """New connections get the new one; a pair that does not fit changes nothing."""
    one, two = (write_certificate(tmp_path, name) for name in ("one", "two"))
    context = load_tls(one)
    router = await start(pair.table(), tls=context)
    close = {"Connection": "close"}
    assert (await router.get("/livez", ssl=trusting(one), headers=close)).status == 200
    for bad in (
        TlsConfig(certificate=two.certificate, key=one.key),
        TlsConfig(certificate=two.certificate, key=str(tmp_path / "none.key")),
    ):
        with pytest.raises(ConfigError):
            load_tls(bad, context)
        assert (await router.get("/livez", ssl=trusting(one), headers=close)).status == 200
    load_tls(two, context)
    assert (await router.get("/livez", ssl=trusting(two), headers=close)).status == 200
    with pytest.raises(aiohttp.ClientConnectorCertificateError):
        await router.get("/livez", ssl=trusting(one), headers=close)


def test_a_certificate_that_can_not_be_used_is_refused(tmp_path: Path) -> None:
    """Which file it is, and what may be wrong with it; nobody is asked for a password."""
    one, two = (write_certificate(tmp_path, name) for name in ("one", "two"))
    with pytest.raises(ConfigError, match=r"two\.key can't be used") as caught:
        load_tls(TlsConfig(certificate=one.certificate, key=two.key))
    assert "MISMATCH" in caught.value.why.upper()
    with pytest.raises(ConfigError) as caught:
        load_tls(TlsConfig(certificate=str(tmp_path / "none.crt"), key=one.key))
    assert caught.value.why == "No such file or directory"
    private = serialization.load_pem_private_key((tmp_path / "one.key").read_bytes(), None)
    (tmp_path / "locked.key").write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(ConfigError) as caught:
        load_tls(TlsConfig(certificate=one.certificate, key=str(tmp_path / "locked.key")))
    assert "password" in caught.value.why


@pytest.mark.parametrize(
    ("host", "is_open", "is_insecure"),
    [
        ("127.0.0.1", True, False),
        ("localhost", True, False),
        ("127.8.8.8", True, False),
        ("::1", True, False),
        ("0.0.0.0", False, False),
        ("0.0.0.0", True, True),
    ],
)
def test_what_may_be_exposed(host: str, is_open: bool, is_insecure: bool) -> None:
    """This machine; anything with a key; anything that is meant."""
    check_exposure(host, Routing(insecure=is_insecure), has_shared_key=not is_open)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "nobody.invalid"])
def test_nobody_is_let_in_by_accident(host: str) -> None:
    """Without a key, beyond this machine."""
    with pytest.raises(ConfigError, match="would let anybody on the network in") as caught:
        check_exposure(host, Routing(), has_shared_key=False)
    assert "--insecure" in caught.value.fix


# --- the access log ---------------------------------------------------------------------------


async def test_each_request_is_one_line(
    start: Start, pair: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Who asked for what and who answered; neither keys nor queries nor bodies."""
    caplog.set_level(logging.DEBUG, "vllm_rvec.router")
    path = tmp_path / "access.jsonl"
    router = await start(
        pair.table(),
        aliases={"assistant": {"split": SPLIT, "salt": "s"}},
        keys={"team": key("k-secret")},
        access_log=str(path),
    )
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    headers = bearer("k-secret") | {
        "X-Request-Id": "r-1",
        "traceparent": f"00-{trace}-00f067aa0ba902b7-01",
        "X-Rvec-Key": user_of(NAME),
    }
    await router.ask(path=f"{CHAT}?q=query-secret", headers=headers, x="body-secret")
    await router.ask("ghost", headers=bearer("k-secret"))
    await router.ask("base", headers=bearer("wrong-secret"))
    pair.base.answer = wait_for_ever
    leaving = asyncio.create_task(router.ask("base", headers=bearer("k-secret")))
    await pair.base.asked.wait()
    leaving.cancel()
    await pair.base.aborted.wait()
    await until(lambda: path.read_bytes().count(b"\n") == 4)
    served, unknown, refused, left = [json.loads(line) for line in path.read_text().splitlines()]
    expected = {
        "request_id": "r-1",
        "method": "POST",
        "path": CHAT,
        "status": 200,
        "variant": NAME,
        "alias": "assistant",
        "reason": "sticky",
        "alpha": "1",
        "key": "team",
        "error": None,
        "client": "127.0.0.1",
        "trace_id": trace,
    }
    assert served.items() >= expected.items()
    assert served["duration_ms"] > 0
    assert (unknown["status"], unknown["error"], unknown["variant"]) == (
        404,
        "model_not_found",
        None,
    )
    assert (refused["status"], refused["error"], refused["key"]) == (401, "invalid_api_key", None)
    assert (left["status"], left["variant"]) == (None, "base")
    told = path.read_text() + caplog.text
    assert not [word for word in ("k-secret", "query-secret", "body-secret") if word in told]
    assert "wrong-secret" not in told
    assert pair.enhanced.seen[0].values("traceparent") == [headers["traceparent"]]
