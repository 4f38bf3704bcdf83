"""Passing through: bytes, headers, streams, and what happens when either side goes away."""

from __future__ import annotations

import asyncio
import gzip
import json
from typing import TYPE_CHECKING

import aiohttp
import openai
import pytest
from aiohttp import web
from yarl import URL

from vllm_rvec.router import Upstream, VariantTable, create_client, sending

from .conftest import BODY, USER, begin_events, busy_stream, die, wait_for_ever

if TYPE_CHECKING:
    from .conftest import Answer, StandInEngine, StartEngine, StartRouter

pytestmark = pytest.mark.anyio

# --- what passes ------------------------------------------------------------------------------


async def test_the_body_and_the_raw_path_and_query_reach_the_engine_unchanged(
    http: aiohttp.ClientSession, router_url: str, engine: StandInEngine
) -> None:
    """Byte for byte: spaces, escapes, repeated keys."""
    target = "/v1/chat/completions?a=%2F%41&b=+%20;&c&a=%C3%A9"
    async with http.post(URL(router_url + target, encoded=True), data=BODY) as response:
        assert response.status == 200
    assert engine.seen[0].body == BODY
    assert engine.seen[0].target == target


async def test_request_headers_pass_repeated_and_nothing_is_added(
    http: aiohttp.ClientSession, url: str, engine: StandInEngine
) -> None:
    """Only the key, the request's id, and what belongs to the connection are the router's."""
    sent = [("X-Tag", "1"), ("X-Tag", "2"), ("Cookie", "a=b"), ("TE", "trailers")]
    sent += [("X-Hop", "1"), ("Connection", "X-Hop"), ("Content-Type", "application/json")]
    skipped = ("Accept", "Accept-Encoding", "User-Agent")
    async with http.post(url, data=BODY, headers=sent, skip_auto_headers=skipped):
        pass
    seen = engine.seen[0]
    assert seen.values("x-tag") == ["1", "2"]
    assert {name.lower() for name, _ in seen.headers} == {
        "host",
        "x-tag",
        "cookie",
        "content-type",
        "content-length",
        "x-request-id",
        "authorization",
    }
    assert seen.values("host") == [engine.url.removeprefix("http://")]


async def test_status_reason_and_response_headers_pass_repeated(
    http: aiohttp.ClientSession, url: str, engine: StandInEngine
) -> None:
    """An engine's own error is the client's to read."""

    async def answer(_request: web.Request) -> web.StreamResponse:
        response = web.Response(status=429, reason="Slow Down", body=b'{"error": "x"}')
        response.headers.add("X-Tag", "1")
        response.headers.add("X-Tag", "2")
        response.headers["Keep-Alive"] = "timeout=5"
        response.headers["Server"] = "uvicorn"
        return response

    engine.answer = answer
    async with http.post(url, data=BODY) as response:
        assert (response.status, response.reason) == (429, "Slow Down")
        assert await response.read() == b'{"error": "x"}'
        assert response.headers.getall("X-Tag") == ["1", "2"]
        assert response.headers["Server"] == "uvicorn"
        assert response.headers["Content-Length"] == "14"
        assert "Keep-Alive" not in response.headers


async def test_a_compressed_answer_passes_compressed(
    http: aiohttp.ClientSession, url: str, engine: StandInEngine
) -> None:
    """The bytes are the engine's; nothing is unpacked on the way."""
    packed = gzip.compress(b"hello" * 100, mtime=0)

    async def answer(_request: web.Request) -> web.StreamResponse:
        return web.Response(body=packed, headers={"Content-Encoding": "gzip"})

    engine.answer = answer
    async with http.post(url, data=BODY, headers={"Accept-Encoding": "gzip"}) as response:
        assert await response.read() == packed
        assert response.headers["Content-Encoding"] == "gzip"
    assert engine.seen[0].values("accept-encoding") == ["gzip"]


async def test_a_redirect_is_the_clients_to_follow(
    http: aiohttp.ClientSession, url: str, engine: StandInEngine
) -> None:
    """The router asks the engine once and nobody else."""

    async def answer(_request: web.Request) -> web.StreamResponse:
        return web.Response(status=307, headers={"Location": "http://192.0.2.1/"})

    engine.answer = answer
    async with http.post(url, data=BODY, allow_redirects=False) as response:
        assert response.status == 307
        assert response.headers["Location"] == "http://192.0.2.1/"


async def test_one_clients_cookies_do_not_travel_with_anothers_request(
    http: aiohttp.ClientSession, url: str, engine: StandInEngine, variants: VariantTable
) -> None:
    """The router remembers nothing of an engine's answers."""
    # aiohttp's own jar keeps cookies of names, not of addresses.
    variants.set_ready("base", Upstream(engine.url.replace("127.0.0.1", "localhost"), None))

    async def answer(_request: web.Request) -> web.StreamResponse:
        return web.Response(headers={"Set-Cookie": "session=1"})

    engine.answer = answer
    for _ in range(2):
        async with http.post(url, data=BODY, headers={"Cookie": ""}) as response:
            assert response.headers["Set-Cookie"] == "session=1"
    assert engine.seen[1].values("cookie") in ([], [""])


@pytest.mark.parametrize("name", ["base", "enhanced@1"])
async def test_openais_client_gets_its_answer_from_the_variant_it_names(
    start_engine: StartEngine, start_router: StartRouter, name: str
) -> None:
    """`model` picks the engine, and the answer says which variant it was."""
    engines = {"base": await start_engine(), "enhanced@1": await start_engine()}
    table = VariantTable(list(engines))
    for variant, engine in engines.items():
        table.set_ready(variant, engine.upstream)
    url = await start_router(table)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="c", max_retries=0) as client:
        raw = await client.chat.completions.with_raw_response.create(model=name, messages=USER)
    assert raw.parse().choices[0].message.content == "hello"
    assert raw.headers["X-Rvec-Variant"] == name
    assert {variant: len(engine.seen) for variant, engine in engines.items()} == {
        variant: int(variant == name) for variant in engines
    }


async def test_a_base_url_may_have_a_path(
    http: aiohttp.ClientSession, start_router: StartRouter, engine: StandInEngine
) -> None:
    """An engine behind another proxy; a slash at the end does no harm."""
    table = VariantTable(["base"])
    table.set_ready("base", Upstream(f"{engine.url}/engines/1/", None))
    async with http.post(f"{await start_router(table)}/tokenize", data=BODY):
        assert engine.seen[0].target == "/engines/1/tokenize"


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        (b"", "invalid_json", "Invalid JSON"),
        (b'{"model": ', "invalid_json", "Invalid JSON"),
        (b'{"model": "base"} x', "invalid_json", "trailing"),
        (b'\xff{"model": "base"}', "invalid_json", "Invalid JSON"),
        (b"[1]", "invalid_json", "must be a JSON object"),
        (b"{}", "missing_model", "base, enhanced@1"),
        (b'{"model": 7}', "invalid_model", "must be a string"),
        (b'{"model": null}', "invalid_model", "must be a string"),
        (b'{"model": ["base"]}', "invalid_model", "must be a string"),
    ],
)
async def test_a_body_that_names_no_model_is_400(
    http: aiohttp.ClientSession, url: str, body: bytes, code: str, message: str
) -> None:
    """The message says what is wrong, and which names there are."""
    async with http.post(url, data=body) as response:
        assert response.status == 400
        error = (await response.json())["error"]
    assert error["code"] == code
    assert message in error["message"]


async def test_an_unknown_model_is_404_with_the_names_there_are(ask: openai.AsyncOpenAI) -> None:
    """OpenAI's client raises NotFoundError."""
    with pytest.raises(openai.NotFoundError, match="base, enhanced@1") as caught:
        await ask.chat.completions.create(model="enhanced", messages=USER)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert caught.value.type == "invalid_request_error"
    assert "X-Rvec-Variant" not in caught.value.response.headers


async def test_a_variant_that_is_down_is_503_and_says_why(
    ask: openai.AsyncOpenAI, variants: VariantTable, engine: StandInEngine
) -> None:
    """With Retry-After; no engine is asked."""
    variants.set_down("base", "the engine exited with status 1")
    with pytest.raises(openai.InternalServerError, match="exited with status 1") as caught:
        await ask.chat.completions.create(model="base", messages=USER)
    assert caught.value.status_code == 503
    assert int(caught.value.response.headers["Retry-After"]) > 0
    assert caught.value.response.headers["X-Rvec-Variant"] == "base"
    assert not engine.seen


async def test_a_compressed_request_is_415(
    http: aiohttp.ClientSession, url: str, engine: StandInEngine
) -> None:
    """The router would have to unpack it to find `model`; engines don't take it either."""
    headers = {"Content-Encoding": "gzip"}
    async with http.post(url, data=gzip.compress(BODY), headers=headers) as response:
        assert response.status == 415
    assert not engine.seen


async def test_a_body_that_cannot_be_read_is_400(
    http: aiohttp.ClientSession, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever aiohttp finds wrong with the way it came."""

    async def fail(_request: web.BaseRequest) -> bytes:
        raise web.RequestPayloadError

    monkeypatch.setattr(web.BaseRequest, "read", fail)
    async with http.post(url, data=BODY) as response:
        assert response.status == 400
        assert (await response.json())["error"]["code"] == "invalid_body"


# --- the pool ---------------------------------------------------------------------------------


async def test_no_answer_takes_too_long() -> None:
    """Reasoning takes minutes; only connecting has a limit."""
    async with create_client() as client:
        assert (client.timeout.total, client.timeout.sock_read) == (None, None)
        assert client.timeout.connect == 5
        assert isinstance(client.connector, aiohttp.TCPConnector)
        assert client.connector.limit == 0


async def test_idle_connections_are_dropped_before_the_engine_closes_them(
    http: aiohttp.ClientSession,
    start_router: StartRouter,
    engine: StandInEngine,
    variants: VariantTable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An engine of vLLM does so after 5 s. What was kept for too long is not used again."""
    assert sending.IDLE_CONNECTION_SECONDS < 5
    monkeypatch.setattr(sending, "IDLE_CONNECTION_SECONDS", 0.05)
    url = await start_router(variants)
    for _ in range(2):
        async with http.post(f"{url}/v1/completions", data=BODY) as response:
            await response.read()
        await asyncio.sleep(0.2)
    first, second = engine.seen
    assert first.connection is not second.connection


async def test_two_hundred_requests_at_once_get_their_own_answers(
    http: aiohttp.ClientSession, url: str, engine: StandInEngine
) -> None:
    """All are under way together, and none gets another's answer."""
    together = asyncio.Barrier(200)

    async def answer(request: web.Request) -> web.StreamResponse:
        response = await begin_events(request)
        await together.wait()
        await response.write(b"data: " + await request.read() + b"\n\n")
        return response

    async def ask(number: int) -> bytes:
        body = json.dumps({"model": "base", "n": number}).encode()
        async with http.post(url, data=body) as response:
            return (await response.read()).removeprefix(b"data: ")

    engine.answer = answer
    answers = await asyncio.gather(*map(ask, range(200)))
    assert [json.loads(text)["n"] for text in answers] == list(range(200))


# --- the client goes away ---------------------------------------------------------------------


async def idle_stream(request: web.Request) -> web.StreamResponse:
    await begin_events(request)
    return await wait_for_ever(request)


@pytest.mark.parametrize("answer", [wait_for_ever, idle_stream, busy_stream])
async def test_a_client_that_leaves_ends_the_generation(
    url: str,
    engine: StandInEngine,
    caplog: pytest.LogCaptureFixture,
    answer: Answer,
) -> None:
    """Whether the answer streams, streams nothing yet, or does not stream."""
    engine.answer = answer
    caplog.set_level("INFO", "vllm_rvec.router")
    address = URL(url)
    reader, writer = await asyncio.open_connection(address.host, address.port)
    head = f"POST {address.path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(BODY)}\r\n\r\n"
    writer.write(head.encode() + BODY)
    async with asyncio.timeout(5):
        await engine.asked.wait()
        if answer is not wait_for_ever:
            await reader.readuntil(b"\r\n\r\n")
        writer.transport.abort()
        await engine.aborted.wait()
    assert " base 499 " in caplog.text
    assert "Traceback" not in caplog.text


# --- the engine goes away before it answers ---------------------------------------------------


async def test_a_stale_connection_is_not_the_clients_problem(
    http: aiohttp.ClientSession, url: str, engine: StandInEngine
) -> None:
    """An engine may close an idle connection just as a request comes: it is sent again."""
    answer = engine.answer

    async def answer_once_per_connection(request: web.Request) -> web.StreamResponse:
        earlier = [seen.connection for seen in engine.seen[:-1]]
        return die(request) if request.transport in earlier else await answer(request)

    engine.answer = answer_once_per_connection
    for _ in range(2):
        async with http.post(url, data=BODY) as response:
            assert response.status == 200
            await response.read()
    first, stale, fresh = engine.seen
    assert first.connection is stale.connection
    assert fresh.connection is not stale.connection
    assert stale.body == fresh.body == BODY
    assert stale.values("x-request-id") == fresh.values("x-request-id")


async def test_the_second_try_takes_no_pooled_connection(
    http: aiohttp.ClientSession, url: str, engine: StandInEngine
) -> None:
    """When one idle connection is stale the others are too."""
    answer, together = engine.answer, asyncio.Barrier(3)

    async def fill_pool(request: web.Request) -> web.StreamResponse:
        await together.wait()
        return await answer(request)

    async def post() -> int:
        async with http.post(url, data=BODY) as response:
            await response.read()
            return response.status

    engine.answer = fill_pool
    await asyncio.gather(post(), post(), post())
    pooled = [seen.connection for seen in engine.seen]

    async def answer_fresh(request: web.Request) -> web.StreamResponse:
        return die(request) if request.transport in pooled else await answer(request)

    engine.answer = answer_fresh
    assert await post() == 200
    assert len(engine.seen) == 5


async def test_connections_are_used_again(
    http: aiohttp.ClientSession, url: str, engine: StandInEngine
) -> None:
    """Requests one after the other share a connection to the engine."""
    for _ in range(3):
        async with http.post(url, data=BODY) as response:
            await response.read()
    assert len({id(seen.connection) for seen in engine.seen}) == 1


async def test_an_engine_that_fails_twice_is_503(
    ask: openai.AsyncOpenAI, engine: StandInEngine
) -> None:
    """One more try, not for ever."""

    async def answer(request: web.Request) -> web.StreamResponse:
        return die(request)

    engine.answer = answer
    with pytest.raises(openai.InternalServerError, match="can't be reached") as caught:
        await ask.chat.completions.create(model="base", messages=USER)
    assert caught.value.status_code == 503
    assert caught.value.response.headers["X-Rvec-Variant"] == "base"
    assert len(engine.seen) == 2


async def test_an_engine_that_is_not_there_is_503_without_its_address(
    http: aiohttp.ClientSession, start_router: StartRouter
) -> None:
    """Where engines are is not the client's business."""
    table = VariantTable(["base"])
    table.set_ready("base", Upstream("http://127.0.0.1:9", None))
    url = await start_router(table)
    async with http.post(f"{url}/v1/completions", data=BODY) as response:
        assert response.status == 503
        assert response.headers["Retry-After"]
        assert "127.0.0.1" not in await response.text()


@pytest.mark.parametrize("tries", [1, 2])
async def test_a_variant_found_to_be_down_meanwhile_is_503(
    ask: openai.AsyncOpenAI, engine: StandInEngine, variants: VariantTable, tries: int
) -> None:
    """The reason is known by then, so the client gets it, with Retry-After."""

    async def answer(request: web.Request) -> web.StreamResponse:
        if len(engine.seen) == tries:
            variants.set_down("base", "out of memory")
        return die(request)

    engine.answer = answer
    with pytest.raises(openai.InternalServerError, match="out of memory") as caught:
        await ask.chat.completions.create(model="base", messages=USER)
    assert caught.value.status_code == 503
    assert "Retry-After" in caught.value.response.headers
    assert len(engine.seen) == tries


async def test_the_second_try_goes_to_an_engine_that_has_taken_over(
    ask: openai.AsyncOpenAI,
    engine: StandInEngine,
    start_engine: StartEngine,
    variants: VariantTable,
) -> None:
    """A restarted engine has another port: the table is asked anew."""
    successor = await start_engine()

    async def answer(request: web.Request) -> web.StreamResponse:
        variants.set_ready("base", successor.upstream)
        return die(request)

    engine.answer = answer
    await ask.chat.completions.create(model="base", messages=USER)
    assert len(engine.seen) == 1
    assert len(successor.seen) == 1


async def test_an_upstream_that_does_not_speak_http_is_502(
    http: aiohttp.ClientSession, start_router: StartRouter, caplog: pytest.LogCaptureFixture
) -> None:
    """Something else listens on the engine's port. The log does not tell the key it was shown."""

    async def talk(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example ESMTP\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
        table = VariantTable(["base"])
        port = server.sockets[0].getsockname()[1]
        table.set_ready("base", Upstream(f"http://127.0.0.1:{port}", "engine-secret"))
        url = await start_router(table)
        async with http.post(f"{url}/v1/completions?token=private", data=BODY) as response:
            assert response.status == 502
            assert (await response.json())["error"]["code"] == "upstream_error"
    assert "no HTTP from http://127.0.0.1" in caplog.text
    assert not {secret for secret in ("engine-secret", "private") if secret in caplog.text}
