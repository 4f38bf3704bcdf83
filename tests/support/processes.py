"""Servers as child processes, as a user starts them, and what is left of them afterwards."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import openai
import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

__all__ = ["RunningServer", "engine_processes", "ready_line", "run_serve", "until"]

START_SECONDS = 240
ENGINE_MODULE = "vllm.entrypoints.openai.api_server"


@dataclass(slots=True)
class RunningServer:
    """`python -m vllm_rvec.serve`, ready."""

    process: subprocess.Popen[str]
    """The command itself, the parent of all."""
    base_url: str
    """What an OpenAI client takes, ending in /v1."""
    models: list[str]
    """The names that it printed."""
    log: Path
    """Its stderr."""

    def client(self, **options: Any) -> openai.OpenAI:
        """Return a real OpenAI client for it."""
        given: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": 120} | options
        return openai.OpenAI(base_url=self.base_url, **given)

    def engine(self, variant: str) -> psutil.Process:
        """Return the API server process of the engine that answers for a variant."""
        engines = engine_processes(self.process.pid)
        (found,) = [p for p in engines if _own_name(_command(p)) == variant]
        return found

    def process_family(self) -> list[psutil.Process]:
        """Return the command and every process below it."""
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]


@contextmanager
def run_serve(
    arguments: Sequence[str], log: Path, *, env: Mapping[str, str] | None = None
) -> Iterator[RunningServer]:
    """Run `python -m vllm_rvec.serve` with a free port; stopped by SIGTERM at the end."""
    command = [sys.executable, "-m", "vllm_rvec.serve", "--port", "0", "--json", *arguments]
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, **(env or {})},
        )
    try:
        ready = ready_line(process, log)
        yield RunningServer(process, ready["base_url"], ready["models"], log)
    finally:
        _stop(process)


def engine_processes(ancestor: int) -> list[psutil.Process]:
    """List vLLM's API servers below a process."""
    return [p for p in psutil.Process(ancestor).children(recursive=True) if _is_engine(p)]


def until(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Wait until a condition holds; fail with its name after a deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"after {seconds:g} s still not: {what}")
        time.sleep(0.05)


def ready_line(
    process: subprocess.Popen[str], log: Path, seconds: float = START_SECONDS
) -> dict[str, Any]:
    """Wait for the line of JSON with which a server says that it is ready; fail with its log."""
    assert process.stdout is not None
    selector = selectors.DefaultSelector()
    selector.register(process.stdout, selectors.EVENT_READ)
    if selector.select(seconds) and (line := process.stdout.readline()):
        ready: dict[str, Any] = json.loads(line)
        return ready
    raise AssertionError(f"the server did not become ready:\n{log.read_text()[-4000:]}")


def _is_engine(process: psutil.Process) -> bool:
    command = _command(process)
    # The guard's command line holds the engine's: tell them apart.
    return ENGINE_MODULE in command and not any(part.endswith("guard.py") for part in command)


def _own_name(command: Sequence[str]) -> str:
    """The first of the names that an engine answers to; the others are for the router."""
    return command[command.index("--served-model-name") + 1]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
