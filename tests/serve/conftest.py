"""Stand-in engines, and waiting for processes with a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from vllm_rvec.serve.plan import EngineSpec, Variant

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

STAND_IN = Path(__file__).with_name("stand_in.py")
KEY = "the-engine-key-nobody-may-see"
RUN = "VLLM_RVEC_TEST_RUN"
"""Environment variable of all that this run of pytest starts: other runs' are not our business."""


def stand_in_spec(name: str, *flags: str) -> EngineSpec:
    """Plan a stand-in engine."""
    argv = (sys.executable, str(STAND_IN), *flags)
    env = {**os.environ, "VLLM_API_KEY": KEY}
    return EngineSpec(name, (Variant(name, 1.0),), argv, env)


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; a zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def pids_in(lines: Iterable[str]) -> list[int]:
    """Read the process ids that stand-ins have printed."""
    return [int(line.split()[1]) for line in lines if line.startswith("pid ")]


def wait_for(condition: Callable[[], object], what: str, seconds: float = 15) -> None:
    """Wait until `condition` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


async def until(condition: Callable[[], object], what: str, seconds: float = 15) -> None:
    """Wait until `condition` holds, with the event loop running."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.02)


def all_gone(pids: Iterable[int]) -> Callable[[], bool]:
    """Make the condition that none of these processes runs."""
    numbers = list(pids)
    assert numbers, "no processes to wait for"
    return lambda: not any(is_alive(pid) for pid in numbers)


@pytest.fixture(autouse=True, scope="session")
def _run() -> None:
    os.environ[RUN] = str(os.getpid())


@pytest.fixture(autouse=True)
def _leaves_no_process(_run: None) -> Iterator[None]:
    """Every test here ends with no process that it began, direct or adopted."""
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    yield
    left = [
        process
        for process in psutil.process_iter()
        if process.pid not in before and _is_ours(process)
    ]
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    assert not left


def _is_ours(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        environment = process.environ()
        return (environment.get("VLLM_API_KEY"), environment.get(RUN)) == (KEY, os.environ[RUN])
    return False
