"""A stand-in engine on a loopback port, and the router in front of it.

A real engine can't be made to die in the middle of an event or to close a connection at the wrong
moment; this one does what a test tells it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp
import openai
import pytest
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families

from vllm_rvec.router import (
    Admin,
    Routing,
    Services,
    Upstream,
    VariantTable,
    bind_socket,
    create_app,
    create_client,
    start_server,
)

if TYPE_CHECKING:
    import ssl

ENGINE_KEY = "engine-secret"

BODY = b'{ "model" : "base",\n  "emoji": "\xf0\x9f\x98\x80 \\u00e9", "x": 1.0e0, "x": 2 }\n'
"""A body that would change if anything read and wrote it again."""

USER: Any = [{"role": "user", "content": "hi"}]

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Seen:
    """One request as it reached the engine."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes
    connection: object

    def values(self, name: str) -> list[str]:
        """All values of a header."""
        return [value for key, value in self.headers if key.lower() == name.lower()]


class StandInEngine:
    """Records every request and answers as `answer` says."""

    def __init__(self) -> None:
        self.url = ""
        self.seen: list[Seen] = []
        self.answer: Answer = answer_with_chat
        self.asked = asyncio.Event()
        self.aborted = asyncio.Event()

    @property
    def upstream(self) -> Upstream:
        """The engine as the router sees it."""
        return Upstream(self.url, ENGINE_KEY)

    async def start(self) -> web.AppRunner:
        """Serve on a free port; the caller cleans the runner up."""
        app = web.Application(client_max_size=2**30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(
            app,
            handler_cancellation=True,
            shutdown_timeout=0.1,
            auto_decompress=False,
            access_log=None,
        )
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = [(key.decode(), value.decode()) for key, value in request.raw_headers]
        self.seen.append(Seen(request.method, request.raw_path, headers, body, request.transport))
        self.asked.set()
        try:
            return await self.answer(request)
        except asyncio.CancelledError:
            self.aborted.set()
            raise


async def answer_with_chat(request: web.Request) -> web.StreamResponse:
    """A chat completion, or the list of two models for GET /v1/models."""
    if request.path == "/v1/models":
        cards = [
            {"id": name, "object": "model", "created": 1, "owned_by": "vllm", "max_model_len": 64}
            for name in ("base", "enhanced@1")
        ]
        return web.json_response({"object": "list", "data": cards})
    message = {"role": "assistant", "content": "hello"}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return web.json_response(
        {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    )


def chat_event(text: str) -> bytes:
    """One event of a streamed chat completion."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return b"data: " + json.dumps(chunk | {"choices": [choice]}).encode() + b"\n\n"


async def begin_events(request: web.Request, **headers: str) -> web.StreamResponse:
    """Send the head of an event stream."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"} | headers)
    await response.prepare(request)
    return response


def die(request: web.Request) -> web.StreamResponse:
    """Close the engine's connection, with what was sent delivered and no end marked."""
    assert request.transport is not None
    request.transport.close()
    return web.Response()


def dies_after(*chunks: bytes, headers: dict[str, str] | None = None) -> Answer:
    """An engine that sends some chunks of an event stream and dies."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = await begin_events(request, **(headers or {}))
        for chunk in chunks:
            await response.write(chunk)
        die(request)
        return response

    return answer


def answers(status: int, body: bytes = b"{}", **headers: str) -> Answer:
    """An engine that always says the same."""

    async def answer(_request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, body=body, headers=headers)

    return answer


async def wait_for_ever(_request: web.Request) -> web.StreamResponse:
    """Never answer."""
    await asyncio.Event().wait()
    raise AssertionError


async def busy_stream(request: web.Request) -> web.StreamResponse:
    """Never end."""
    response = await begin_events(request)
    while True:
        await response.write(b"data: 1\n\n")
        await asyncio.sleep(0.001)


async def run_router(
    resources: AsyncExitStack,
    services: Services,
    admin: Admin | None,
    *,
    is_watching: bool,
    tls: ssl.SSLContext | None = None,
) -> str:
    """Run a router until the test ends; gives its address without a slash at the end."""
    listener = bind_socket("127.0.0.1", 0)
    scheme = "http" if tls is None else "https"
    url = f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"
    app = create_app(services, admin=admin, is_watching=is_watching)
    runner = await start_server(app, listener, shutdown_timeout=0.2, tls=tls)
    resources.push_async_callback(runner.cleanup)
    return url


def sample_of(text: str, name: str, labels: Mapping[str, str]) -> float:
    """The sum of a metric's samples that have these labels; 0 where there is none."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


async def until(is_so: Callable[[], object], seconds: float = 5) -> None:
    """Wait for what has no event to wait for."""
    async with asyncio.timeout(seconds):
        while not is_so():  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.005)


StartEngine = Callable[[], Awaitable[StandInEngine]]
StartRouter = Callable[..., Awaitable[str]]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def resources() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
async def start_engine(resources: AsyncExitStack) -> StartEngine:
    async def start() -> StandInEngine:
        engine = StandInEngine()
        runner = await engine.start()
        resources.push_async_callback(runner.cleanup)
        return engine

    return start


@pytest.fixture
async def engine(start_engine: StartEngine) -> StandInEngine:
    return await start_engine()


@pytest.fixture
async def variants(engine: StandInEngine) -> VariantTable:
    """Two names, both answered by the one engine."""
    table = VariantTable(["base", "enhanced@1"])
    for name in table.names():
        table.set_ready(name, engine.upstream)
    return table


@pytest.fixture
async def start_router(resources: AsyncExitStack) -> StartRouter:
    """Start a router in front of a table; gives its address without a slash at the end."""

    async def start(
        variants: VariantTable,
        *,
        api_key: str | None = None,
        routing: Routing | None = None,
        admin: Admin | None = None,
        is_watching: bool = False,
    ) -> str:
        client = await resources.enter_async_context(create_client())
        services = Services.make(variants, client, routing, shared_key=api_key)
        return await run_router(resources, services, admin, is_watching=is_watching)

    return start


@pytest.fixture
async def router_url(start_router: StartRouter, variants: VariantTable) -> str:
    return await start_router(variants)


@pytest.fixture
async def url(router_url: str) -> str:
    """Where chat completions are asked for."""
    return f"{router_url}/v1/chat/completions"


@pytest.fixture
async def http(resources: AsyncExitStack) -> aiohttp.ClientSession:
    """A client that shows bytes as they come and gives up rather than hang."""
    session = aiohttp.ClientSession(
        auto_decompress=False,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=20),
    )
    return await resources.enter_async_context(session)


@pytest.fixture
async def ask(router_url: str, resources: AsyncExitStack) -> openai.AsyncOpenAI:
    """The real client, asking the router, once each time."""
    client = openai.AsyncOpenAI(
        base_url=f"{router_url}/v1", api_key="client", max_retries=0, timeout=20
    )
    return await resources.enter_async_context(client)
