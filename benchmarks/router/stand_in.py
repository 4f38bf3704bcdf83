"""A stand-in engine: answers at once, or in as many chunks as the message asks for.

A real engine takes so long that no router's cost would show. Run as a process of its own,
`python -m benchmarks.router.stand_in`; it prints its port. It knows what routers ask engines for
(`/health`, `/v1/models`) and `/v1/chat/completions`, and nothing else. It does not slow down for
slow readers: a whole fast stream is smaller than what a socket holds.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from typing import cast

import uvloop

from benchmarks.router.wire import CONTENT, HEAD_END, body_length, chunk

__all__ = ["StandIn", "main"]

BACKLOG = 4096
ASKED = re.compile(rb"(\d+) chunks, (\d+) ms apart")


def _answer(status: str, body: object) -> bytes:
    text = json.dumps(body).encode()
    head = (
        f"HTTP/1.1 {status}\r\nserver: stand-in\r\n"
        f"content-length: {len(text)}\r\ncontent-type: application/json\r\n\r\n"
    )
    return head.encode() + text


def _event(content: str, reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": content}, "logprobs": None, "finish_reason": reason}
    made = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "base"}
    return chunk(b"data: " + json.dumps(made | {"choices": [choice]}).encode() + b"\n\n")


MODEL = {"id": "base", "object": "model", "created": 1, "owned_by": "vllm", "max_model_len": 4096}
USAGE = {"prompt_tokens": 8, "total_tokens": 16, "completion_tokens": 8}
CHOICE = {
    "index": 0,
    "message": {"role": "assistant", "content": "An answer of some eight tokens, no more."},
    "logprobs": None,
    "finish_reason": "stop",
}
COMPLETION = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "base"}

HEALTHY = b"HTTP/1.1 200 OK\r\nserver: stand-in\r\ncontent-length: 0\r\n\r\n"
MODELS = _answer("200 OK", {"object": "list", "data": [MODEL]})
WHOLE = _answer("200 OK", COMPLETION | {"choices": [CHOICE], "usage": USAGE})
UNKNOWN = _answer("404 Not Found", {"error": {"message": "Not Found", "code": 404}})
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nserver: stand-in\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
EVENTS = (_event(CONTENT.decode() + "en"), _event(CONTENT.decode() + "ens"))
"""In turn: LiteLLM takes a hundred equal ones for a model that has gone astray."""
STREAM_END = _event("", "stop") + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class StandIn(asyncio.Protocol):
    """One connection: a request, its answer, the next request."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self._timer: asyncio.Handle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep what is written to."""
        # uvloop's are not of asyncio's class.
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, _error: Exception | None) -> None:
        """Stop a stream that nobody reads."""
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Answer once the request is whole."""
        self._received += data
        head, separator, body = self._received.partition(HEAD_END)
        if separator and len(body) >= (body_length(head) or 0):
            self._received = b""
            self._begin(head, body)

    def _begin(self, head: bytes, body: bytes) -> None:
        path = head.split(b" ", 2)[1]
        if path != b"/v1/chat/completions":
            self._write({b"/health": HEALTHY, b"/v1/models": MODELS}.get(path, UNKNOWN))
        elif (asked := ASKED.search(body)) and int(asked[1]):
            self._write(STREAM_HEAD)
            self._continue(int(asked[1]), int(asked[2]) / 1000)
        else:
            self._write(WHOLE)

    def _continue(self, chunks: int, pause_seconds: float) -> None:
        """Send the next chunk in the loop's next turn, or later: each is a write of its own."""
        if not chunks:
            self._write(STREAM_END)
            return
        self._write(EVENTS[chunks % 2])
        loop = asyncio.get_running_loop()
        if pause_seconds:
            self._timer = loop.call_later(pause_seconds, self._continue, chunks - 1, pause_seconds)
        else:
            self._timer = loop.call_soon(self._continue, chunks - 1, 0)

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(StandIn, "127.0.0.1", 0, backlog=BACKLOG)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


def main() -> None:
    """Serve until ended."""
    uvloop.run(_serve())


if __name__ == "__main__":
    main()
