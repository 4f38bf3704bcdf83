"""A stand-in for a server of variants, which can be told to misbehave as no real engine can."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["DIAL_CARD", "Asked", "StandIn", "run_stand_in"]

DIAL_CARD: dict[str, Any] = {
    "id": "base",
    "object": "model",
    "rvec": {"alpha": 0.0, "vector": "v", "fingerprint": "blake3:v", "alpha_range": [-1.0, 2.0]},
}


@dataclass(frozen=True, slots=True)
class Asked:
    """One request for an answer."""

    path: str
    body: dict[str, Any]
    authorization: str | None

    @property
    def text(self) -> str:
        """What the user said last."""
        messages = self.body.get("messages")
        return str(messages[-1]["content"] if messages else self.body["prompt"])


Say = Callable[[Asked], str]
Fail = Callable[[Asked], web.Response | None]


@dataclass(slots=True)
class StandIn:
    """What the server says, what it was asked, and what it shall do wrong."""

    say: Say
    url: str = ""
    cards: list[dict[str, Any]] = field(default_factory=lambda: [DIAL_CARD])
    fail: Fail = lambda _: None
    """Gives a response in place of the answer."""
    asked: list[Asked] = field(default_factory=list)
    """Those that were answered."""
    headers: dict[str, str] = field(default_factory=dict)
    """Of each answer."""
    delay_seconds: float = 0.0
    most_at_once: int = 0
    _under_way: int = 0

    async def models(self, request: web.Request) -> web.Response:
        """List what there is."""
        del request
        return web.json_response({"object": "list", "data": self.cards})

    async def answer(self, request: web.Request) -> web.Response:
        """Answer, or fail as told."""
        self._under_way += 1
        self.most_at_once = max(self.most_at_once, self._under_way)
        try:
            asked = Asked(request.path, await request.json(), request.headers.get("Authorization"))
            await asyncio.sleep(self.delay_seconds)
            if (failure := self.fail(asked)) is not None:
                return failure
            self.asked.append(asked)
            return web.json_response(self._reply(asked), headers=self.headers)
        finally:
            self._under_way -= 1

    def _reply(self, asked: Asked) -> dict[str, Any]:
        text = self.say(asked)
        said = {"message": {"role": "assistant", "content": text}}
        choice = {"text": text} if asked.path.endswith("/v1/completions") else said
        usage = {"prompt_tokens": len(asked.text.split()), "completion_tokens": len(text.split())}
        return {"choices": [{**choice, "finish_reason": "stop"}], "usage": usage}


@contextmanager
def run_stand_in(say: Say) -> Iterator[StandIn]:
    """Run one on the loopback while the block runs, in a thread of its own.

    Args:
        say: Makes the text of an answer.
    """
    server = StandIn(say)
    loop = asyncio.new_event_loop()
    runner = loop.run_until_complete(_start(server))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _start(server: StandIn) -> web.AppRunner:
    app = web.Application()
    app.router.add_get("/v1/models", server.models)
    app.router.add_post("/v1/chat/completions", server.answer)
    app.router.add_post("/v1/completions", server.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    return runner
