"""`/v1/rvec/variants`: keys, bodies, the door, and what becomes of clients that go away."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import TYPE_CHECKING, Any

import pytest

from tests.router.conftest import USER, StandInEngine, begin_events
from vllm_rvec.errors import AlphaChangeFailedError, AlphaChangeRefusedError, ConfigError
from vllm_rvec.router import (
    Admin,
    Services,
    VariantFacts,
    VariantTable,
    bind_socket,
    create_app,
    create_client,
    hash_key,
    start_server,
)
from vllm_rvec.vector.alpha import AlphaChange
from vllm_rvec.vector.dial import Dial

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AsyncExitStack

    import aiohttp
    from aiohttp import web

pytestmark = pytest.mark.anyio

ADMIN_KEY, CLIENT_KEY = "admin-secret", "client-secret"
NAME = "enhanced@1"


class Stage:
    """A router whose changes are made by `change`, on a table of two variants."""

    def __init__(self, engine: StandInEngine, dial: Dial | None = None) -> None:
        self.table = VariantTable(["base", NAME], dial)
        for name, alpha in (("base", 0.0), (NAME, 1.0)):
            self.table.set_ready(name, engine.upstream)
            self.table.describe(name, VariantFacts(alpha, "a/vector"))
        self.change: Callable[[str, float], Awaitable[AlphaChange]] = self.at_once
        self.changed: list[tuple[str, float]] = []
        self.url = ""

    def hold(self) -> tuple[asyncio.Event, asyncio.Event]:
        """Have changes say that they have begun, and wait until they may go on."""
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def slowly(name: str, alpha: float) -> AlphaChange:
            begun.set()
            await go_on.wait()
            return await self.at_once(name, alpha)

        self.change = slowly
        return begun, go_on

    async def at_once(self, name: str, alpha: float) -> AlphaChange:
        """Change without a hitch."""
        facts = self.table.facts(name)
        assert facts is not None
        assert isinstance(facts.alpha, float)
        self.table.describe(name, VariantFacts(alpha, facts.vector))
        self.changed.append((name, alpha))
        return AlphaChange(facts.alpha, alpha, 0.5, 2, 7)

    async def start(
        self, resources: AsyncExitStack, *, admin_key: str | None, key: str | None
    ) -> None:
        """Serve."""
        listener = bind_socket("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        client = await resources.enter_async_context(create_client())
        admin = None
        if admin_key is not None:
            admin = Admin.of_hash(hash_key(admin_key), self._change, 0.3)
        services = Services.make(self.table, client, shared_key=key)
        app = create_app(services, admin=admin, is_watching=False)
        runner = await start_server(app, listener, shutdown_timeout=0.2)
        resources.push_async_callback(runner.cleanup)

    async def _change(self, name: str, alpha: float) -> AlphaChange:
        return await self.change(name, alpha)


@pytest.fixture
async def stage(engine: StandInEngine, resources: AsyncExitStack) -> Stage:
    made = Stage(engine)
    await made.start(resources, admin_key=ADMIN_KEY, key=CLIENT_KEY)
    return made


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def put(
    http: aiohttp.ClientSession, stage: Stage, body: Any, key: str = ADMIN_KEY, name: str = NAME
) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body)
    url = f"{stage.url}/rvec/variants/{name}"
    async with http.put(url, data=data, headers=bearer(key)) as response:
        return response.status, await response.json()


async def ask(http: aiohttp.ClientSession, stage: Stage) -> tuple[int, str | None]:
    url, body = f"{stage.url}/chat/completions", {"model": NAME, "messages": USER}
    async with http.post(url, json=body, headers=bearer(CLIENT_KEY)) as response:
        return response.status, response.headers.get("X-Rvec-Alpha")


async def test_a_change_says_what_was_and_what_is(
    http: aiohttp.ClientSession, stage: Stage
) -> None:
    """And from then on answers do."""
    assert await ask(http, stage) == (200, "1")
    status, done = await put(http, stage, {"alpha": 0.7})
    assert status == 200
    assert (done["id"], done["state"], done["vector"]) == (NAME, "ready", "a/vector")
    assert (done["old_alpha"], done["alpha"], done["copies"], done["ranks"]) == (1.0, 0.7, 7, 2)
    assert done["reload_seconds"] == 0.5
    assert stage.changed == [(NAME, 0.7)]
    assert await ask(http, stage) == (200, "0.7")


async def test_the_list_says_how_each_variant_is(http: aiohttp.ClientSession, stage: Stage) -> None:
    """Ready or not; for clients and for the admin."""
    stage.table.set_down("base", "the engine exited")
    for key in (CLIENT_KEY, ADMIN_KEY):
        async with http.get(f"{stage.url}/rvec/variants", headers=bearer(key)) as response:
            base, enhanced = (await response.json())["data"]
        assert (base["state"], base["reason"], base["alpha"]) == ("down", "the engine exited", 0.0)
        assert (enhanced["state"], enhanced["reason"]) == ("ready", None)
    async with http.get(f"{stage.url}/rvec/variants", headers=bearer("wrong")) as response:
        assert response.status == 401


async def test_the_admin_key_opens_nothing_else(http: aiohttp.ClientSession, stage: Stage) -> None:
    """It is no client's key, and a client's key is not it."""
    url = f"{stage.url}/models"
    async with http.get(url, headers=bearer(ADMIN_KEY)) as response:
        assert response.status == 401
    status, body = await put(http, stage, {"alpha": 0.7}, key=CLIENT_KEY)
    assert (status, body["error"]["code"]) == (401, "invalid_admin_key")
    assert not stage.changed


async def test_without_an_admin_key_nobody_changes_anything(
    engine: StandInEngine, resources: AsyncExitStack, http: aiohttp.ClientSession
) -> None:
    """403, with how to enable it."""
    stage = Stage(engine)
    await stage.start(resources, admin_key=None, key=None)
    status, body = await put(http, stage, {"alpha": 0.7})
    assert (status, body["error"]["code"]) == (403, "admin_disabled")
    assert "VLLM_RVEC_ADMIN_KEY" in body["error"]["message"]


def test_an_empty_admin_key_is_refused() -> None:
    """It would look like protection and be none."""
    with pytest.raises(ConfigError, match="empty"):
        Admin.of_hash(hash_key(""), None, 1)


@pytest.mark.parametrize(
    "body",
    [
        {"alpha": True},
        {"alpha": "0.7"},
        {"alpha": None},
        {"alpha": [0.7]},
        {},
        {"alpha": 0.7, "beta": 1},
        {"alpha": 1e39},
        b'{"alpha": NaN}',
        b'{"alpha": Infinity}',
        b'{"alpha": 1e400}',
        b"0.7",
        b"",
        b"{",
    ],
)
async def test_what_is_no_alpha_is_refused(
    http: aiohttp.ClientSession, stage: Stage, body: Any
) -> None:
    """With OpenAI's error body, and nothing is touched."""
    status, answer = await put(http, stage, body)
    assert (status, answer["error"]["code"]) == (400, "invalid_body")
    assert not stage.changed


async def test_unknown_and_down_variants_are_not_changed(
    http: aiohttp.ClientSession, stage: Stage
) -> None:
    """404 and 503, as for any request."""
    status, body = await put(http, stage, {"alpha": 1}, name="other")
    assert (status, body["error"]["code"]) == (404, "model_not_found")
    stage.table.set_down(NAME, "starting")
    status, body = await put(http, stage, {"alpha": 1})
    assert (status, body["error"]["code"]) == (503, "model_down")
    assert not stage.changed


async def test_requests_wait_for_the_change_and_get_the_new_alpha(
    http: aiohttp.ClientSession, stage: Stage, engine: StandInEngine
) -> None:
    """None of them reaches the engine before it is over, and the others' go on meanwhile."""
    begun, go_on = stage.hold()
    change = asyncio.create_task(put(http, stage, {"alpha": 0.7}))
    await begun.wait()
    waiting = asyncio.create_task(ask(http, stage))
    url = f"{stage.url}/rvec/variants/{NAME}"
    async with http.get(url, headers=bearer(CLIENT_KEY)) as response:
        assert (await response.json())["state"] == "changing"
    assert (await put(http, stage, {"alpha": 0.1}))[1]["error"]["code"] == "change_in_progress"
    body = {"model": "base", "messages": USER}
    url = f"{stage.url}/chat/completions"
    async with http.post(url, json=body, headers=bearer(CLIENT_KEY)) as response:
        assert response.status == 200
    assert len(engine.seen) == 1
    assert not waiting.done()
    go_on.set()
    assert (await change)[0] == 200
    assert await waiting == (200, "0.7")
    assert stage.changed == [(NAME, 0.7)]


async def test_a_stream_under_way_ends_first(
    http: aiohttp.ClientSession, stage: Stage, engine: StandInEngine
) -> None:
    """All of it comes at the old alpha; one that takes longer than allowed stops the change."""
    go_on = asyncio.Event()

    async def stream(request: web.Request) -> web.StreamResponse:
        response = await begin_events(request)
        await response.write(b"data: 1\n\n")
        await go_on.wait()
        await response.write(b"data: [DONE]\n\n")
        return response

    engine.answer = stream
    url, body = f"{stage.url}/chat/completions", {"model": NAME, "messages": USER, "stream": True}
    async with http.post(url, json=body, headers=bearer(CLIENT_KEY)) as response:
        assert await response.content.readany() == b"data: 1\n\n"
        status, answer = await put(http, stage, {"alpha": 0.7})
        assert (status, answer["error"]["code"]) == (409, "alpha_change_refused")
        assert not stage.changed
        change = asyncio.create_task(put(http, stage, {"alpha": 0.7}))
        await asyncio.sleep(0.05)
        assert not stage.changed
        go_on.set()
        assert await response.content.read() == b"data: [DONE]\n\n"
        assert response.headers["X-Rvec-Alpha"] == "1"
    assert (await change)[0] == 200


async def test_a_client_that_goes_away_does_not_stop_a_change(
    http: aiohttp.ClientSession, stage: Stage
) -> None:
    """It goes on to its end, and the door opens."""
    begun, go_on = stage.hold()
    change = asyncio.create_task(put(http, stage, {"alpha": 0.7}))
    await begun.wait()
    change.cancel()
    await asyncio.sleep(0.1)
    assert stage.table.gate(NAME).is_shut
    go_on.set()
    assert await ask(http, stage) == (200, "0.7")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (AlphaChangeRefusedError("no", problems=["a: changed"]), (409, "alpha_change_refused")),
        (AlphaChangeFailedError("broken"), (500, "alpha_change_failed")),
        (RuntimeError("a bug"), (500, "internal_error")),
    ],
)
async def test_a_change_that_does_not_come_about_opens_the_door(
    http: aiohttp.ClientSession,
    stage: Stage,
    error: Exception,
    expected: tuple[int, str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The client is told which of the two it was, requests go on, and no key is logged."""

    async def fail(_name: str, _alpha: float) -> AlphaChange:
        raise error

    stage.change = fail
    with caplog.at_level(logging.INFO):
        status, body = await put(http, stage, {"alpha": 0.7})
    assert (status, body["error"]["code"]) == expected
    assert ("a: changed" in body["error"]["message"]) == (status == 409)
    assert await ask(http, stage) == (200, "1")
    assert "not changed" in caplog.text
    assert ADMIN_KEY not in caplog.text


DIAL = Dial(("reasoning", "style"), {"base": (0.0, 0.0), NAME: (1.0, 1.0)})


@pytest.fixture
async def dial_stage(engine: StandInEngine, resources: AsyncExitStack) -> Stage:
    made = Stage(engine, DIAL)
    await made.start(resources, admin_key=ADMIN_KEY, key=CLIENT_KEY)
    return made


async def test_a_dial_is_turned_at_once(
    http: aiohttp.ClientSession, dial_stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    """No engine is asked, and the name stands for something else; which is logged."""
    status, done = await put(http, dial_stage, {"alpha": 0.7})
    assert (status, done["id"], done["state"], done["vector"]) == (200, NAME, "ready", "a/vector")
    assert (done["old_alpha"], done["alpha"], done["alpha_range"]) == (1.0, 0.7, [-1.0, 2.0])
    assert (done["ranks"], done["copies"]) == (0, 0)
    assert (done["reload_seconds"], done["drain_seconds"], done["seconds"]) == (0.0, 0.0, 0.0)
    assert not dial_stage.changed
    assert await ask(http, dial_stage) == (200, "0.7")
    assert f"{NAME} is no longer what its name says: its alpha is 0.7" in caplog.text
    status, done = await put(http, dial_stage, {"alpha": {"style": 0.5}})
    assert (status, done["old_alpha"]) == (200, 0.7)
    assert done["alpha"] == {"reasoning": 0.0, "style": 0.5}
    assert await ask(http, dial_stage) == (200, "reasoning=0, style=0.5")


async def test_requests_under_way_do_not_hold_up_a_dial(
    http: aiohttp.ClientSession, dial_stage: Stage, engine: StandInEngine
) -> None:
    """They go on with what they have, and the next ones have the new alpha."""
    go_on = asyncio.Event()
    answer = engine.answer

    async def wait(request: web.Request) -> web.StreamResponse:
        await go_on.wait()
        return await answer(request)

    engine.answer = wait
    early = asyncio.create_task(ask(http, dial_stage))
    await engine.asked.wait()
    assert (await put(http, dial_stage, {"alpha": 0.7}))[0] == 200
    late = asyncio.create_task(ask(http, dial_stage))
    go_on.set()
    assert (await early, await late) == ((200, "1"), (200, "0.7"))
    assert [seen.values("X-Rvec-Alpha") for seen in engine.seen] == [["1"], ["0.7"]]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"alpha": 2.5}, "invalid_alpha"),
        ({"alpha": None}, "invalid_alpha"),
        ({"alpha": "1"}, "invalid_alpha"),
        ({"alpha": {"taste": 1}}, "invalid_alpha"),
        (b'{"alpha": NaN}', "invalid_alpha"),
        ({}, "invalid_body"),
        ({"alpha": 1, "beta": 1}, "invalid_body"),
        (b"{", "invalid_body"),
    ],
)
async def test_a_dial_is_not_turned_beyond_its_range(
    http: aiohttp.ClientSession, dial_stage: Stage, body: Any, code: str
) -> None:
    """400, and nothing has changed."""
    status, answer = await put(http, dial_stage, body)
    assert (status, answer["error"]["code"]) == (400, code)
    assert await ask(http, dial_stage) == (200, "1")


async def test_only_names_that_are_listed_can_be_changed(
    http: aiohttp.ClientSession, dial_stage: Stage
) -> None:
    """The others say themselves what they are; and keys are asked for as ever."""
    status, answer = await put(http, dial_stage, {"alpha": 1}, name="enhanced@0.3")
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    status, _ = await put(http, dial_stage, {"alpha": 1}, key=CLIENT_KEY)
    assert status == 401


async def test_a_dial_that_is_down_can_be_turned(
    http: aiohttp.ClientSession, dial_stage: Stage, engine: StandInEngine
) -> None:
    """It takes no engine, and lasts over a restart."""
    dial_stage.table.set_down(NAME, "starting")
    assert (await put(http, dial_stage, {"alpha": 0.4}))[0] == 200
    dial_stage.table.set_ready(NAME, engine.upstream)
    assert await ask(http, dial_stage) == (200, "0.4")
