"""Changing alpha from the API server's side: order, limits, and what each failure leaves behind.

The engine here is a stand-in for vLLM's client: a real one can't be made to fail at each step.
"""

from __future__ import annotations

import asyncio
import signal
from argparse import Namespace
from typing import Any

import pytest

from vllm_rvec.errors import AlphaChangeFailedError, AlphaChangeRefusedError, ConfigError

pytestmark = pytest.mark.anyio

WORKER = "vllm_rvec.loader.worker.RvecWorker"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Engine:
    """Does what vLLM's client does, and writes it down."""

    def __init__(self, load_format: str = "rvec", worker: str = WORKER) -> None:
        from vllm.config.load import LoadConfig

        extra = {"vector": "v", "alpha": 1.0}
        self.vllm_config: Any = Namespace(
            load_config=LoadConfig(load_format=load_format, model_loader_extra_config=extra),
            parallel_config=Namespace(worker_extension_cls=worker),
        )
        self.calls: list[str] = []
        self.is_busy = False
        self.problems: list[list[str]] = [[], []]
        self.failing = ""
        self.reload_may_end = asyncio.Event()
        self.reload_may_end.set()
        self.reloading, self.resumed = asyncio.Event(), asyncio.Event()
        self.paused = self.sleeping = False

    async def is_paused(self) -> bool:
        """Say so."""
        return self.paused

    async def is_sleeping(self) -> bool:
        """Say so."""
        return self.sleeping

    async def pause_generation(self, *, mode: str) -> None:
        """Pause, at once or never."""
        self.calls.append(f"pause, {mode}")
        self.paused = True
        if self.is_busy:
            await asyncio.Event().wait()

    async def resume_generation(self) -> None:
        """Go on."""
        self.calls.append("resume")
        self.resumed.set()
        self.paused = False

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> Any:
        """Answer for two ranks."""
        self.calls.append(method)
        if method == self.failing:
            raise RuntimeError("a rank failed")
        if method == "rvec_check":
            return self.problems
        if method == "rvec_reload":
            assert args[0].keys() == {"vector", "alpha"}
            self.reloading.set()
            await self.reload_may_end.wait()
            return [3, 4]
        return None

    async def reset_prefix_cache(self, *, reset_connector: bool) -> bool:
        """Say whether it went."""
        self.calls.append(f"reset, connector {reset_connector}")
        return self.failing != "reset"


WHOLE = [
    "rvec_check",
    "pause, wait",
    "rvec_check",
    "rvec_reload",
    "reset, connector True",
    "resume",
]


def live_alpha(engine: Engine) -> Any:
    from vllm_rvec.loader.live import LiveAlpha

    return LiveAlpha(engine)


async def test_the_order_of_a_change() -> None:
    """Checked, drained, checked, reloaded, caches emptied; only then requests go on."""
    engine = Engine()
    live = live_alpha(engine)
    done = await live.change(0.3, drain_seconds=1)
    assert engine.calls == WHOLE
    assert (done.old_alpha, done.alpha, done.ranks, done.copies) == (1.0, 0.3, 2, 7)
    assert live.alpha == 0.3
    assert (await live.change(1, drain_seconds=1)).old_alpha == 0.3


@pytest.mark.parametrize("alpha", [float("nan"), 1e39])
async def test_no_alpha_is_refused(alpha: float) -> None:
    """Before the engine is asked anything."""
    engine = Engine()
    with pytest.raises(ConfigError):
        await live_alpha(engine).change(alpha, drain_seconds=1)
    assert not engine.calls


async def test_one_ranks_problem_is_enough_to_refuse() -> None:
    """Nothing was paused."""
    engine = Engine()
    engine.problems = [[], ["shard: changed"]]
    with pytest.raises(AlphaChangeRefusedError, match="shard: changed"):
        await live_alpha(engine).change(0.3, drain_seconds=1)
    assert engine.calls == ["rvec_check"]


async def test_requests_that_do_not_end_stop_the_change() -> None:
    """They go on, and so do new ones."""
    engine = Engine()
    engine.is_busy = True
    with pytest.raises(AlphaChangeRefusedError, match=r"within 0.01 s"):
        await live_alpha(engine).change(0.3, drain_seconds=0.01)
    assert engine.calls == ["rvec_check", "pause, wait", "resume"]


@pytest.mark.parametrize("state", ["paused", "sleeping"])
async def test_an_engine_that_somebody_else_has_stopped_is_left_alone(state: str) -> None:
    """It would be resumed at the end, behind their back."""
    engine = Engine()
    setattr(engine, state, True)
    with pytest.raises(AlphaChangeRefusedError, match="paused or asleep"):
        await live_alpha(engine).change(0.3, drain_seconds=1)
    assert not engine.calls


@pytest.mark.parametrize("step", ["rvec_reload", "reset"])
async def test_after_a_failure_it_never_answers_again(step: str) -> None:
    """Paused for ever, also at the next wish, and the old alpha is not claimed to be back."""
    engine = Engine()
    engine.failing = step
    live = live_alpha(engine)
    for _ in range(2):
        with pytest.raises(AlphaChangeFailedError, match=r"from alpha 1 to 0\.3 failed part-way"):
            await live.change(0.3, drain_seconds=1)
    assert engine.calls.count("rvec_reload") == 1
    assert "resume" not in engine.calls


async def test_a_change_goes_on_when_who_asked_for_it_goes_away() -> None:
    """And a second one is refused meanwhile."""
    engine = Engine()
    engine.reload_may_end.clear()
    live = live_alpha(engine)
    asking = asyncio.create_task(live.change(0.3, drain_seconds=1))
    await engine.reloading.wait()
    asking.cancel()
    with pytest.raises(AlphaChangeRefusedError, match="under way"):
        await live.change(0.5, drain_seconds=1)
    engine.reload_may_end.set()
    await engine.resumed.wait()
    assert live.alpha == 0.3


async def client(engine: Engine, **arguments: Any) -> Any:
    """A server of vLLM's with the plugin, as far as a plugin sees it."""
    import httpx
    from fastapi import FastAPI
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

    from vllm_rvec.loader.admin import AdminPlugin

    app, plugin = FastAPI(), AdminPlugin()
    assert isinstance(plugin, EndpointPlugin)
    plugin.attach_router(app)
    given = Namespace(**({"api_key": ["k"], "api_server_count": 1} | arguments))
    await plugin.init_state(engine, app.state, given)
    transport = httpx.ASGITransport(app)
    return httpx.AsyncClient(transport=transport, base_url="http://engine/v1/rvec")


async def test_the_path_changes_alpha() -> None:
    """PUT changes, GET says."""
    async with await client(Engine()) as http:
        assert (await http.get("/alpha")).json() == {"alpha": 1.0}
        done = await http.put("/alpha", json={"alpha": 0.3})
        assert (done.status_code, done.json()["old_alpha"]) == (200, 1.0)
        assert (await http.get("/alpha")).json() == {"alpha": 0.3}


@pytest.mark.parametrize(
    "body", [b"", b"{}", b'{"alpha": true}', b'{"alpha": NaN}', b'{"alpha": 1, "x": 1}', b"[1]"]
)
async def test_a_wrong_body_is_a_400(body: bytes) -> None:
    """In OpenAI's form."""
    async with await client(engine := Engine()) as http:
        answer = await http.put("/alpha", content=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_body")
        assert engine.calls == ["rvec_note_files"]


@pytest.mark.parametrize(
    ("engine", "arguments", "why"),
    [
        ({"load_format": "auto"}, {}, "its load format is auto"),
        ({}, {"api_key": None}, "no API key"),
        ({}, {"api_server_count": 2}, "several API servers"),
        ({"worker": ""}, {}, f"--worker-extension-cls {WORKER}"),
        ({"worker": "vllm_rvec.checkpoint.stamps.FileStamps"}, {}, "--worker-extension-cls"),
    ],
)
async def test_where_it_can_not_be_done_safely_it_is_not(
    engine: dict[str, str],
    arguments: dict[str, Any],
    why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """403, and what to do."""
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    made = Engine(**engine)
    async with await client(made, **arguments) as http:
        answer = await http.put("/alpha", json={"alpha": 0.3})
        assert answer.status_code == 403
        assert why in answer.json()["error"]["message"]
    assert not made.calls


async def test_a_failed_server_ends_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """After it has said so: nobody else may be there to end it."""
    from vllm_rvec.loader import admin

    monkeypatch.setattr(admin, "ANSWER_SECONDS", 0.05)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    engine = Engine()
    engine.failing = "rvec_reload"
    async with await client(engine) as http:
        answer = await http.put("/alpha", json={"alpha": 0.3})
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "alpha_change_failed")
        assert not ended.is_set()
        await asyncio.wait_for(ended.wait(), 5)
    asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)
