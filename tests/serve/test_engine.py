"""One engine, from its launch to its end, with stand-ins and once with the real vLLM."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from typing import TYPE_CHECKING

import aiohttp
import psutil
import pytest

from tests.serve.conftest import KEY, all_gone, pids_in, stand_in_spec, until
from vllm_rvec.errors import EngineStartupError
from vllm_rvec.serve import EngineProcess, describe_exit
from vllm_rvec.serve.plan import EngineSpec, Variant

if TYPE_CHECKING:
    from pathlib import Path


async def started(*flags: str) -> EngineProcess:
    """A ready stand-in, with its three processes."""
    engine = EngineProcess(stand_in_spec("one", *flags))
    await engine.start()
    await engine.wait_until_ready()
    await until(lambda: len(pids_in(engine.last_lines)) == 3, "three processes")
    return engine


async def failure(*flags: str, timeout_seconds: float | None = None) -> EngineStartupError:
    engine = EngineProcess(stand_in_spec("one", *flags))
    await engine.start()
    with pytest.raises(EngineStartupError) as caught:
        await engine.wait_until_ready(timeout_seconds)
    await engine.wait()
    return caught.value


def test_an_engine_becomes_ready_and_is_killed() -> None:
    """While it runs it has an address and a process; after kill() nothing of it is left."""

    async def check() -> None:
        engine = await started("--late", "0.5")
        assert engine.exit_status is None
        url = engine.base_url + "/health"
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            assert response.status == 200
        assert engine.pid in pids_in(engine.last_lines)
        assert engine.pid != engine.guard_pid
        began = time.monotonic()
        engine.kill()
        await engine.wait()
        assert time.monotonic() - began < 5
        assert all_gone(pids_in(engine.last_lines))()
        assert engine.pid is None

    asyncio.run(check())


def test_sigterm_lets_a_request_finish() -> None:
    """terminate() is a drain: the request in flight is answered, the status is 0."""

    async def check() -> None:
        engine = await started()
        async with aiohttp.ClientSession() as session:
            slow = asyncio.create_task(session.get(engine.base_url + "/slow"))
            await until(lambda: "slow request begins" in engine.last_lines, "the request")
            engine.terminate()
            assert (await slow).status == 200
        assert await engine.wait() == 0
        assert "drained" in engine.last_lines
        assert all_gone(pids_in(engine.last_lines))()

    asyncio.run(check())


@pytest.mark.parametrize("victim", ["engine", "guard"])
def test_kill_9_is_noticed_and_leaves_nothing(victim: str) -> None:
    """Whichever process is killed; children that hold the output open do not hide it."""

    async def check() -> None:
        engine = await started()
        pids = pids_in(engine.last_lines)
        target = engine.pid if victim == "engine" else engine.guard_pid
        assert target is not None
        os.kill(target, signal.SIGKILL)
        assert await asyncio.wait_for(engine.wait(), 6) == -signal.SIGKILL
        assert engine.exit_status == -signal.SIGKILL
        assert all_gone(pids)()

    asyncio.run(check())


def test_an_end_before_ready_ends_the_wait_and_says_why() -> None:
    """The error has the status, the last lines and the cause."""
    # Without a child, which may be the last to say something.
    error = asyncio.run(failure("--child", "none", "--fail", "ValueError: the model is too large"))
    assert error.what == "engine 'one' ended with exit status 3 before it was ready"
    assert error.why == "ValueError: the model is too large"
    assert error.exit_status == 3
    assert error.last_lines[-1] == "ValueError: the model is too large"


def test_without_a_cause_the_last_line_is_told() -> None:
    """Better than nothing, and called what it is."""
    error = asyncio.run(failure("--child", "none", "--fail", "so long"))
    assert error.why == "its last line was: so long"


def test_an_engine_that_is_never_ready_is_killed_when_time_is_up() -> None:
    """Only where a time was given."""
    error = asyncio.run(failure("--late", "600", timeout_seconds=1))
    assert error.what == "engine 'one' was not ready after 1 s"
    assert error.exit_status is None


def test_a_killed_start_up_points_to_the_memory() -> None:
    """A bare SIGKILL is most often the kernel's."""

    async def check() -> None:
        engine = EngineProcess(stand_in_spec("one", "--late", "600"))
        await engine.start()
        await until(lambda: engine.pid, "its process")
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(EngineStartupError, match="SIGKILL before it was ready") as caught:
            await engine.wait_until_ready()
        assert "want of memory" in caught.value.fix

    asyncio.run(check())


def test_a_command_that_can_not_run_is_a_startup_error() -> None:
    """Said by the guard, in one line."""

    async def check() -> None:
        spec = EngineSpec("one", (Variant("one", 1.0),), ("/no/such/program",), os.environ)
        engine = EngineProcess(spec)
        await engine.start()
        with pytest.raises(EngineStartupError) as caught:
            await engine.wait_until_ready()
        assert caught.value.why == "No such file or directory"
        assert caught.value.exit_status == 127

    asyncio.run(check())


def test_awkward_output_is_pumped() -> None:
    """Lines beyond any buffer, bytes that are not UTF-8, progress bars."""
    seen: list[str] = []

    async def check() -> None:
        spec = stand_in_spec("one", "--flood", "--child", "none")
        engine = EngineProcess(spec, lambda name, line: seen.append(f"{name}: {line}"))
        await engine.start()
        await engine.wait_until_ready()
        engine.kill()
        await engine.wait()

    asyncio.run(check())
    assert sum(line.count("a") for line in seen if set(line[5:]) == {"a"}) == 300_000
    rest = [line for line in seen if "aaa" not in line]
    assert rest[2:6] == ["one: \ufffd\ufffd broken", "one: step 1", "one: step 2", "one: last"]


def test_a_display_that_fails_does_not_stop_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    """Its lines are still taken in; the failure is logged once."""

    def broken(_name: str, _line: str) -> None:
        msg = "stderr is gone"
        raise OSError(msg)

    async def check() -> EngineProcess:
        engine = EngineProcess(stand_in_spec("one", "--child", "none"), broken)
        await engine.start()
        await engine.wait_until_ready()
        engine.terminate()
        assert await engine.wait() == 0
        return engine

    engine = asyncio.run(check())
    assert engine.last_lines[-1] == "drained"
    assert caplog.text.count("stderr is gone") == 1


def test_the_key_is_in_the_environment_only() -> None:
    """Not in a command line that ps shows, not in a repr, not in a line that the engine prints."""

    async def check() -> None:
        engine = await started()
        assert engine.api_key == KEY
        for pid in (engine.guard_pid, engine.pid):
            assert KEY not in " ".join(psutil.Process(pid).cmdline())
        await until(lambda: "key is [api key]" in engine.last_lines, "the engine's indiscretion")
        assert KEY not in "\n".join(engine.last_lines)
        assert KEY not in repr(engine) + repr(engine.spec)
        engine.kill()
        await engine.wait()

    asyncio.run(check())


def test_an_event_loop_that_ends_takes_the_engine_along() -> None:
    """Even when nobody stopped it: the task that follows it is cancelled, the lifeline closes."""
    pids: list[int] = []

    async def check() -> None:
        engine = await started()
        assert engine.guard_pid is not None
        pids.extend([engine.guard_pid, *pids_in(engine.last_lines)])

    asyncio.run(check())
    deadline = time.monotonic() + 5
    while not all_gone(pids)():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("status", "words"),
    [(0, "exit status 0"), (2, "exit status 2"), (-9, "SIGKILL"), (-99, "signal 99")],
)
def test_exits_are_described(status: int, words: str) -> None:
    """In words that people search for."""
    assert describe_exit(status) == words


@pytest.mark.engine
def test_a_flag_that_vllm_does_not_know_is_named(tmp_path: Path) -> None:
    """The real vLLM's refusal comes through in one line."""

    async def check() -> EngineStartupError:
        argv = (
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(tmp_path), "--no-such-flag=1"),
        )
        engine = EngineProcess(EngineSpec("real", (Variant("real", 1.0),), argv, os.environ))
        await engine.start()
        with pytest.raises(EngineStartupError) as caught:
            await engine.wait_until_ready()
        return caught.value

    error = asyncio.run(check())
    assert error.exit_status == 2
    assert error.why == "unrecognized arguments: --no-such-flag=1"
