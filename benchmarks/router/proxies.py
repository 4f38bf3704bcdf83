"""How each proxy is set up, started before an engine, watched and ended.

Each starts as its makers' quick start has it, with one upstream: no keys, and neither retries nor
logs turned off (ours has its access log turned on). Only what would call home is off. The
competitors live in environments of their own and see nothing of this process's environment
variables: they are other people's code, and one of them has been shipped with a backdoor
(requirements/litellm.txt).
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from benchmarks.router.load import LoadError, Server, ask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = [
    "OURS",
    "PROXIES",
    "STRAIGHT",
    "Proxy",
    "ProxyError",
    "Running",
    "started",
    "started_engine",
]

ROOT = Path(__file__).resolve().parents[2]

STRAIGHT, OURS = "straight", "ours"

START_SECONDS = 90.0
"""LiteLLM imports for tens of seconds on a busy machine."""

END_SECONDS = 5.0
SHOWN_CHARACTERS = 400


class ProxyError(RuntimeError):
    """A proxy is not there, or does not start."""


@dataclass(frozen=True, slots=True)
class Place:
    """What a proxy is started with."""

    upstream: str
    """The engine's address, without `/v1`."""
    port: int
    folder: Path
    """For its configuration, log and home."""


@dataclass(frozen=True, slots=True)
class Proxy:
    """One way between a client and an engine."""

    name: str
    argv: Callable[[Place], list[str]]
    environment: Path | None = None
    """Of its own, made by `make NAME/.made`; None for ours."""
    variables: Mapping[str, str] | None = None
    """Beside the least there must be."""

    @property
    def missing(self) -> str | None:
        """Why it can't be started, or None."""
        if self.environment is None or (self.environment / ".made").exists():
            return None
        return f"there is no {self.environment.name}: make {self.environment.name}/.made"


@dataclass(frozen=True, slots=True)
class Running:
    """A child that answers."""

    server: Server
    process: psutil.Process

    def resident_bytes(self) -> int:
        """What it and its children have in memory now."""
        processes = [self.process, *self.process.children(recursive=True)]
        return sum(process.memory_info().rss for process in processes)


ROUTE = """\
port: {port}
variants:
  base: {{upstreams: [{{url: "{upstream}"}}]}}
access_log: "-"
"""


def _ours(place: Place) -> list[str]:
    config = place.folder / "route.yaml"
    config.write_text(ROUTE.format(port=place.port, upstream=place.upstream))
    return [sys.executable, "-m", "vllm_rvec", "route", "--config", str(config)]


def _thin(place: Place) -> list[str]:
    program = [sys.executable, "-m", "benchmarks.router.thin"]
    return [*program, place.upstream, str(place.port)]


def _vllm_router(place: Place) -> list[str]:
    address = ["--host", "127.0.0.1", "--port", str(place.port)]
    metrics = ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(_free_port())]
    program = str(ROOT / ".venv-vllm-router" / "bin" / "vllm-router")
    upstream = ["--worker-urls", place.upstream, "--policy", "round_robin"]
    return [program, *upstream, *address, *metrics]


LITELLM = """\
model_list:
  - model_name: base
    litellm_params: {{model: openai/base, api_base: "{upstream}/v1", api_key: none}}
general_settings: {{dangerously_permit_weak_or_unset_master_key: true}}
litellm_settings: {{telemetry: false}}
"""


def _litellm(place: Place) -> list[str]:
    config = place.folder / "litellm.yaml"
    config.write_text(LITELLM.format(upstream=place.upstream))
    address = ["--host", "127.0.0.1", "--port", str(place.port)]
    return [str(ROOT / ".venv-litellm" / "bin" / "litellm"), "--config", str(config), *address]


PROXIES = (
    Proxy(OURS, _ours),
    Proxy("bare aiohttp", _thin),
    Proxy("vllm-router", _vllm_router, ROOT / ".venv-vllm-router"),
    Proxy(
        "LiteLLM",
        _litellm,
        ROOT / ".venv-litellm",
        # Else it fetches its list of prices from GitHub.
        {"LITELLM_LOCAL_MODEL_COST_MAP": "True"},
    ),
)


@contextmanager
def started_engine() -> Iterator[Server]:
    """Start a stand-in engine; end it behind the block."""
    argv = [sys.executable, "-m", "benchmarks.router.stand_in"]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True) as child:
        try:
            assert child.stdout is not None
            yield Server(STRAIGHT, int(child.stdout.readline()))
        finally:
            _end(child)


@contextmanager
def started(proxy: Proxy, engine: Server, folder: Path) -> Iterator[Running]:
    """Start a proxy before an engine and wait until it answers; end it behind the block.

    Args:
        proxy: Which.
        engine: What answers behind it.
        folder: Where it may write; its log stays there.

    Raises:
        ProxyError: It is not installed, or did not answer in time.
    """
    if (why := proxy.missing) is not None:
        raise ProxyError(why)
    place = Place(f"http://{engine.host}", _free_port(), folder)
    log = folder / f"{proxy.name}.log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            proxy.argv(place),
            cwd=ROOT if proxy.environment is None else folder,
            env=_variables(proxy, folder),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as child,
    ):
        try:
            server = Server(proxy.name, place.port)
            _wait_until_answers(server, child, log)
            yield Running(server, psutil.Process(child.pid))
        finally:
            _end(child)


def _variables(proxy: Proxy, folder: Path) -> dict[str, str]:
    path = os.environ.get("PATH", os.defpath)
    least = {"PATH": path, "HOME": str(folder), "TMPDIR": str(folder), "LANG": "C.UTF-8"}
    return least | dict(proxy.variables or {})


def _wait_until_answers(server: Server, child: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    last = ""
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise ProxyError(f"it ended with {child.returncode}: {_tail(log)}")
        try:
            asyncio.run(asyncio.wait_for(ask(server), END_SECONDS))
        except (LoadError, OSError, TimeoutError) as exc:
            last = str(exc)
            time.sleep(0.1)
        else:
            return
    raise ProxyError(f"it did not answer within {START_SECONDS:g} s ({last}): {_tail(log)}")


def _tail(log: Path) -> str:
    return " ".join(log.read_text(errors="replace")[-SHOWN_CHARACTERS:].split())


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a child and its children, which are in a session of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
            child.wait(END_SECONDS)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port
