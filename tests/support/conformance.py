"""One request by two ways, straight to an engine and through the router, and what must be same.

What the two answers may differ in is said here once: ids and times, which the engine makes anew for
each request, and the headers that a router adds. All else is compared byte for byte.
"""

from __future__ import annotations

import http.client
import itertools
import json
import re
import ssl
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import anthropic
import httpx
import openai

from vllm_rvec.serve.config import ENGINE_KEY_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Mapping

    import psutil

__all__ = ["Answer", "Case", "Load", "Way", "engine_way", "normalised", "normalised_json"]

TIMEOUT_SECONDS = 60

TLS = ssl.create_default_context()
"""One for all clients: each would take 50 ms to make its own, which plain HTTP has no use for."""

_IDS = rb"id|call_id|item_id|previous_response_id|request_id|response_id|tool_call_id"
_TIMES = rb"created|created_at|completed_at"
_ID = re.compile(rb'"(' + _IDS + rb')":\s*"([^"]+)"')
_TIME = re.compile(rb'"(' + _TIMES + rb')":\s*[0-9.]+')

ROUTERS_OWN_HEADERS = frozenset(
    {
        "x-request-id",
        "x-rvec-alias",
        "x-rvec-alpha",
        "x-rvec-reason",
        "x-rvec-variant",
        "x-accel-buffering",
    }
)
"""What a router adds; a dial engine says `X-Rvec-Alpha` itself, where the request has one."""

CHANGING_HEADERS = frozenset({"date", "content-length"})
"""Another time, and ids of another length."""


@dataclass(frozen=True, slots=True)
class Case:
    """One request, as bytes go over the wire."""

    path: str
    body: Mapping[str, Any] | bytes | None = None
    """None makes it a GET; bytes are sent as they are."""
    status: int = 200
    """What the engine answers, so that two errors are not taken for a success."""
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def content(self) -> bytes | None:
        """The body's bytes."""
        if self.body is None or isinstance(self.body, bytes):
            return self.body
        return json.dumps(self.body).encode()

    @property
    def is_stream(self) -> bool:
        """Whether the answer is to come in events."""
        return isinstance(self.body, dict) and bool(self.body.get("stream"))


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, less what may differ."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


@dataclass(frozen=True, slots=True)
class Way:
    """A way to the engine."""

    root: str
    """The address without `/v1`."""
    key: str = field(repr=False)

    @property
    def bearer(self) -> dict[str, str]:
        """What lets a request in."""
        return {"Authorization": f"Bearer {self.key}"}

    def reply(self, case: Case) -> httpx.Response:
        """Send a request and read its answer to the end, with all that it may differ in."""
        return httpx.request(
            "GET" if case.body is None else "POST",
            self.root + case.path,
            content=case.content,
            headers={"Content-Type": "application/json", **self.bearer, **case.headers},
            timeout=TIMEOUT_SECONDS,
            verify=TLS,
        )

    def send(self, case: Case) -> Answer:
        """Send a request and keep what must be same of its answer."""
        reply = self.reply(case)
        dropped = ROUTERS_OWN_HEADERS | CHANGING_HEADERS
        kept = [(k.lower(), v) for k, v in reply.headers.multi_items() if k.lower() not in dropped]
        return Answer(reply.status_code, tuple(sorted(kept)), normalised(reply.content))

    def open(self, path: str, body: Mapping[str, Any]) -> http.client.HTTPConnection:
        """Send a request and leave its answer unread; the caller goes away by `close`."""
        connection = self.connect()
        headers = {"Content-Type": "application/json", **self.bearer}
        connection.request("POST", path, json.dumps(body), headers)
        return connection

    def connect(self) -> http.client.HTTPConnection:
        """Connect at the first request."""
        return http.client.HTTPConnection(
            self.root.removeprefix("http://"), timeout=TIMEOUT_SECONDS
        )

    def openai_client(self) -> openai.OpenAI:
        """OpenAI's client, as users have it, but that it tries once only."""
        http = openai.DefaultHttpxClient(verify=TLS)
        return openai.OpenAI(base_url=self.root + "/v1", http_client=http, **self._options())

    def async_openai_client(self) -> openai.AsyncOpenAI:
        """Its asynchronous sister."""
        http = openai.DefaultAsyncHttpxClient(verify=TLS)
        return openai.AsyncOpenAI(base_url=self.root + "/v1", http_client=http, **self._options())

    def anthropic_client(self) -> anthropic.Anthropic:
        """Anthropic's client. Its key goes as a token: vLLM's own check knows no `x-api-key`."""
        http = anthropic.DefaultHttpxClient(verify=TLS)
        return anthropic.Anthropic(
            base_url=self.root, http_client=http, **self._anthropic_options()
        )

    def async_anthropic_client(self) -> anthropic.AsyncAnthropic:
        """Its asynchronous sister."""
        http = anthropic.DefaultAsyncHttpxClient(verify=TLS)
        return anthropic.AsyncAnthropic(
            base_url=self.root, http_client=http, **self._anthropic_options()
        )

    def _options(self) -> dict[str, Any]:
        return {"api_key": self.key, "max_retries": 0, "timeout": TIMEOUT_SECONDS}

    def _anthropic_options(self) -> dict[str, Any]:
        return {"auth_token": self.key, "max_retries": 0, "timeout": TIMEOUT_SECONDS}


@dataclass(frozen=True, slots=True)
class Load:
    """What an engine has to do, by its own `/metrics`."""

    running: int
    waiting: int
    generated: int
    """Tokens since it started."""

    @classmethod
    def of(cls, engine: Way) -> Load:
        """Ask it."""
        connection = engine.connect()
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        names = ("num_requests_running", "num_requests_waiting", "generation_tokens_total")
        return cls(*(_sum(text, f"vllm:{name}") for name in names))

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way."""
        return self.running == self.waiting == 0


def engine_way(engine: psutil.Process) -> Way:
    """Find the way to an engine that `serve` started: its port is its own, its key is secret.

    Args:
        engine: Its API server's process.
    """
    command = engine.cmdline()
    port = command[command.index("--port") + 1]
    return Way(f"http://127.0.0.1:{port}", engine.environ()[ENGINE_KEY_VARIABLE])


def normalised(body: bytes) -> bytes:
    r"""Number the ids of an answer in the order in which they first come, and set its times to 0.

    So an id that stands where another belongs still shows.

    >>> normalised(b'{"id":"a7","created":17} {"id":"f0","item_id":"a7"}')
    b'{"id":"1","created":0} {"id":"2","item_id":"1"}'
    """
    numbers = itertools.count(1)
    seen: dict[bytes, int] = {}

    def numbered(match: re.Match[bytes]) -> bytes:
        name, found = match.groups()
        if found not in seen:
            seen[found] = next(numbers)
        return b'"%b":"%d"' % (name, seen[found])

    return _TIME.sub(rb'"\1":0', _ID.sub(numbered, body))


def normalised_json(value: Any) -> str:
    """The same of what a client made of an answer."""
    return normalised(json.dumps(value, separators=(",", ":")).encode()).decode()


def _sum(text: str, metric: str) -> int:
    lines = re.findall(rf"^{re.escape(metric)}{{.*}} ([0-9.e+]+)$", text, re.MULTILINE)
    return round(sum(float(value) for value in lines))
