"""What holds for every request: keys, error bodies, request ids, the log line."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
from typing import TYPE_CHECKING, Any

import openai
import pytest
from aiohttp import web
from yarl import URL

from vllm_rvec.errors import ConfigError
from vllm_rvec.router import Services, VariantTable, create_client
from vllm_rvec.router.paths import FORWARDED, Kind
from vllm_rvec.router.request import MAX_BODY_BYTES
from vllm_rvec.router.sending import Sender

if TYPE_CHECKING:
    import aiohttp

    from .conftest import StandInEngine, StartRouter

pytestmark = pytest.mark.anyio

LOGGER = "vllm_rvec.router"
KEY = "clé-secrète"


async def post(
    http: aiohttp.ClientSession, url: str | URL, body: Any = None, **options: Any
) -> tuple[aiohttp.ClientResponse, dict[str, Any]]:
    data = body if isinstance(body, bytes) else json.dumps(body or {"model": "base"}).encode()
    async with http.post(url, data=data, **options) as response:
        return response, await response.json()


@pytest.mark.parametrize(
    "path", [p.template for p in FORWARDED if p.kind is Kind.BODY and p.method == "POST"]
)
async def test_inference_paths_are_forwarded(
    http: aiohttp.ClientSession, router_url: str, engine: StandInEngine, path: str
) -> None:
    """Each one reaches the engine under the same path."""
    response, _ = await post(http, router_url + path)
    assert response.status == 200
    assert [(seen.method, seen.target) for seen in engine.seen] == [("POST", path)]


@pytest.mark.parametrize(
    "path",
    [
        "/sleep",
        "/wake_up",
        "/collective_rpc",
        "/update_weights",
        "/pause",
        "/scale_elastic_ep",
        "/v1/load_lora_adapter",
        "/v1/chat/completions/../../../sleep",
        "/v1/chat/completions/",
        "/v1/chat/completions%2f..%2fsleep",
        "//sleep",
        "/",
    ],
)
async def test_everything_else_is_404_in_openais_body(
    http: aiohttp.ClientSession, router_url: str, engine: StandInEngine, path: str
) -> None:
    """Control paths never reach an engine."""
    response, body = await post(http, URL(router_url + path, encoded=True))
    assert response.status == 404
    assert body["error"]["code"] in {"unknown_url", "denied_url"}
    assert not engine.seen


async def test_a_wrong_method_is_405_in_openais_body(
    http: aiohttp.ClientSession, router_url: str
) -> None:
    """With the methods that are right."""
    async with http.get(f"{router_url}/v1/completions") as response:
        assert response.status == 405
        assert response.headers["Allow"] == "POST"
        assert (await response.json())["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_a_body_beyond_64_mib_is_413_in_openais_body(
    http: aiohttp.ClientSession,
    router_url: str,
    engine: StandInEngine,
    is_chunked: bool,
) -> None:
    """Whether or not the client says beforehand how long it is."""

    async def pieces() -> Any:
        for _ in range(MAX_BODY_BYTES // 2**20 + 1):
            yield bytes(2**20)

    headers = {} if is_chunked else {"Content-Length": str(MAX_BODY_BYTES + 2**20)}
    url = f"{router_url}/v1/completions"
    async with http.post(url, data=pieces(), headers=headers) as response:
        assert response.status == 413
        error = (await response.json())["error"]
    assert error["message"] == "The body is larger than 64 MiB."
    assert not engine.seen


async def test_a_body_of_60_mib_passes(
    http: aiohttp.ClientSession, router_url: str, engine: StandInEngine
) -> None:
    """Room for images."""
    body = json.dumps({"image": "A" * (60 * 2**20), "model": "base"}).encode()
    async with http.post(f"{router_url}/v1/chat/completions", data=io.BytesIO(body)) as response:
        assert response.status == 200
    assert engine.seen[0].body == body


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {KEY}"},
        {"Authorization": f"bearer  {KEY}"},
        {"x-api-key": KEY},
    ],
)
async def test_the_key_lets_in(
    http: aiohttp.ClientSession,
    guarded_url: str,
    engine: StandInEngine,
    headers: dict[str, str],
) -> None:
    """As OpenAI's clients show it or as Anthropic's do; the engine gets its own instead."""
    response, _ = await post(http, f"{guarded_url}/v1/messages", headers=headers)
    assert response.status == 200
    assert engine.seen[0].values("authorization") == ["Bearer engine-secret"]
    assert not engine.seen[0].values("x-api-key")


@pytest.fixture
async def guarded_url(start_router: StartRouter, variants: VariantTable) -> str:
    """A router that asks for the key."""
    return await start_router(variants, api_key=KEY)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": KEY},
        {"x-api-key": ""},
        {"x-api-key": "clé"},
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/models", "/nowhere"])
async def test_without_the_key_nothing_is_told(
    http: aiohttp.ClientSession,
    guarded_url: str,
    engine: StandInEngine,
    headers: dict[str, str],
    path: str,
) -> None:
    """401 in OpenAI's body, before the body is read, even for paths that don't exist."""
    response, body = await post(http, guarded_url + path, headers=headers)
    assert response.status == 401
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert body["error"]["code"] == "invalid_api_key"
    assert not engine.seen


async def test_a_key_that_is_not_utf8_is_wrong_not_a_failure(guarded_url: str) -> None:
    """Bytes of any kind can stand in a header."""
    url = URL(guarded_url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\xfe\r\n\r\n")
    assert await reader.readline() == b"HTTP/1.1 401 Unauthorized\r\n"
    writer.close()


async def test_openais_client_raises_for_a_wrong_key(guarded_url: str) -> None:
    """The client sees its own exception."""
    url = f"{guarded_url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()


async def test_health_needs_no_key(http: aiohttp.ClientSession, guarded_url: str) -> None:
    """Probes have none."""
    async with http.get(f"{guarded_url}/health") as response:
        assert response.status == 200


async def test_an_empty_key_is_refused() -> None:
    """It would look like protection."""
    async with create_client() as client:
        with pytest.raises(ConfigError, match="API key is empty"):
            Services.make(VariantTable(["base"]), client, shared_key="")


async def test_a_request_id_is_made_and_sent_both_ways(
    http: aiohttp.ClientSession, router_url: str, engine: StandInEngine
) -> None:
    """One id, in the engine's log and at the client."""
    response, _ = await post(http, f"{router_url}/v1/completions")
    made = response.headers["X-Request-Id"]
    assert re.fullmatch("[0-9a-f]{32}", made), "128 random bits, as vLLM writes its own"
    assert engine.seen[0].values("x-request-id") == [made]


async def test_the_clients_request_id_is_kept(
    http: aiohttp.ClientSession, router_url: str, engine: StandInEngine
) -> None:
    """Also on errors, and the engine's own does not replace it."""

    async def answer(_request: web.Request) -> web.StreamResponse:
        return web.json_response({}, headers={"X-Request-Id": "engine's"})

    engine.answer = answer
    headers = {"X-Request-Id": "mine-1"}
    response, _ = await post(http, f"{router_url}/v1/completions", headers=headers)
    assert response.headers.getall("X-Request-Id") == ["mine-1"]
    assert engine.seen[0].values("x-request-id") == ["mine-1"]
    response, _ = await post(http, f"{router_url}/nowhere", headers=headers)
    assert response.headers["X-Request-Id"] == "mine-1"


async def test_each_request_is_one_log_line_without_query_or_keys(
    http: aiohttp.ClientSession,
    guarded_url: str,
    variants: VariantTable,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Method, path, variant, status, milliseconds; nothing that lets anybody in."""
    caplog.set_level(logging.DEBUG)
    url = guarded_url
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"model": "enhanced@1", "prompt": "private"}
    await post(http, f"{url}/v1/completions?token=private", body, headers=headers)
    await post(http, f"{url}/v1/x%0Aforged?token=private", body, headers=headers)
    variants.set_down("base", "starting")
    await post(http, f"{url}/v1/completions", headers=headers)
    lines = [r.getMessage() for r in caplog.records if r.name == LOGGER]
    assert [line.split()[:4] for line in lines] == [
        ["POST", "/v1/completions", "enhanced@1", "200"],
        ["POST", "/v1/x%0Aforged", "-", "404"],
        ["POST", "/v1/completions", "base", "503"],
    ]
    assert all(line.endswith(" ms") for line in lines)
    assert not {secret for secret in ("private", KEY, "engine-secret") if secret in caplog.text}


@pytest.mark.parametrize("fault", ["\0", "x" * 10_000])
async def test_a_malformed_request_does_not_put_its_key_into_the_log(
    router_url: str, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    """The header that can't be read is not shown."""
    caplog.set_level(logging.DEBUG)
    url = URL(router_url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    key = f"Authorization: Bearer client-secret{fault}"
    writer.write(f"GET /v1/models HTTP/1.1\r\nHost: x\r\n{key}\r\n\r\n".encode())
    assert b" 400 " in await reader.readline()
    writer.close()
    assert "Error handling request" in caplog.text
    assert "client-secret" not in caplog.text


async def test_an_unexpected_exception_is_logged_and_answered_in_openais_body(
    http: aiohttp.ClientSession,
    router_url: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The traceback is for the log, not for the client."""
    caplog.set_level(logging.INFO)

    async def fail(*_args: object) -> None:
        raise ZeroDivisionError("internal detail")

    monkeypatch.setattr(Sender, "send", fail)
    response, body = await post(http, f"{router_url}/v1/completions")
    assert response.status == 500
    assert body["error"]["type"] == "server_error"
    assert "internal detail" not in str(body)
    assert "ZeroDivisionError: internal detail" in caplog.text
