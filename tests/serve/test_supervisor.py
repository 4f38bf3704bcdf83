"""Engines come up in turn, come back alone, and go together."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import pytest

from tests.serve import parent
from tests.serve.conftest import all_gone, pids_in, stand_in_spec, until, wait_for
from vllm_rvec.errors import EngineStartupError
from vllm_rvec.serve import EngineProcess, EngineState, Pace, Supervisor

if TYPE_CHECKING:
    from vllm_rvec.serve import EngineSpec

QUICK = Pace(first_delay_seconds=0.1, longest_delay_seconds=0.4)


class Stage:
    """A supervisor with stand-ins, and a record of all that it did."""

    def __init__(self, *specs: EngineSpec, pace: Pace = QUICK) -> None:
        self.engines: list[EngineProcess] = []
        self.states: list[tuple[str, EngineState]] = []
        self.details: list[str] = []
        self.supervisor = Supervisor(specs, self.launch, self.on_state, pace=pace)

    def launch(self, spec: EngineSpec) -> EngineProcess:
        """Make a stand-in's process, and keep it."""
        engine = EngineProcess(spec)
        self.engines.append(engine)
        return engine

    def on_state(
        self, spec: EngineSpec, state: EngineState, detail: str, _: EngineProcess | None
    ) -> None:
        """Keep a change."""
        self.states.append((spec.name, state))
        self.details.append(detail)

    def is_all_ready(self) -> bool:
        """Tell whether every engine's last state is ready."""
        return set(dict(self.states).values()) == {EngineState.READY}

    def pids(self) -> list[int]:
        """Every process that was ever started here."""
        guards = [engine.guard_pid for engine in self.engines if engine.guard_pid]
        return guards + [pid for engine in self.engines for pid in pids_in(engine.last_lines)]

    async def all_printed(self) -> None:
        """Wait until every engine has all three of its processes."""
        for engine in self.engines:
            await until(lambda e=engine: len(pids_in(e.last_lines)) == 3, "three processes")  # type: ignore[misc]


def test_engines_start_one_after_the_other_and_stop_together() -> None:
    """The second starts when the first is ready; afterwards nothing is left."""

    async def check() -> None:
        stage = Stage(stand_in_spec("a"), stand_in_spec("b"))
        assert await stage.supervisor.start()
        assert stage.states == [
            ("a", EngineState.STARTING),
            ("a", EngineState.READY),
            ("b", EngineState.STARTING),
            ("b", EngineState.READY),
        ]
        await stage.all_printed()
        running = asyncio.create_task(stage.supervisor.run())
        await asyncio.sleep(0)
        await stage.supervisor.stop(5)
        await stage.supervisor.stop(5)
        await running
        assert sorted(stage.states[4:]) == [
            ("a", EngineState.STOPPED),
            ("a", EngineState.STOPPING),
            ("b", EngineState.STOPPED),
            ("b", EngineState.STOPPING),
        ]
        assert [engine.exit_status for engine in stage.engines] == [0, 0]
        assert all_gone(stage.pids())()

    asyncio.run(check())


@pytest.mark.parametrize("victim", ["engine", "guard"])
def test_a_killed_engine_comes_back_and_others_are_undisturbed(victim: str) -> None:
    """Down, starting, ready; its old processes are gone before; the other never noticed."""

    async def check() -> None:
        stage = Stage(stand_in_spec("a"), stand_in_spec("b"))
        await stage.supervisor.start()
        await stage.all_printed()
        running = asyncio.create_task(stage.supervisor.run())
        first, other = stage.engines
        pids = pids_in(first.last_lines)
        target = first.pid if victim == "engine" else first.guard_pid
        assert target is not None
        os.kill(target, signal.SIGKILL)
        await until(
            lambda: (
                stage.states[4:]
                == [
                    ("a", EngineState.DOWN),
                    ("a", EngineState.STARTING),
                    ("a", EngineState.READY),
                ]
            ),
            "its return",
        )
        assert stage.details[4] == "ended with SIGKILL; starts again in 0.1 s"
        assert all_gone(pids)()
        assert other.exit_status is None
        assert stage.engines[2].base_url != first.base_url
        async with aiohttp.ClientSession() as session:
            for engine in (other, stage.engines[2]):
                async with session.get(engine.base_url + "/health") as response:
                    assert response.status == 200
        await stage.supervisor.stop(0)
        await running
        assert all_gone(stage.pids())()

    asyncio.run(check())


def test_an_engine_that_ends_while_another_starts_is_seen_at_once() -> None:
    """It is marked down, waits its turn, and nothing counts as started before it is back."""

    async def check() -> None:
        stage = Stage(stand_in_spec("a"), stand_in_spec("b", "--late", "2"))
        starting = asyncio.create_task(stage.supervisor.start())
        await until(lambda: ("b", EngineState.STARTING) in stage.states, "b starts")
        pid = stage.engines[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await until(lambda: ("a", EngineState.DOWN) in stage.states, "a is down")
        assert ("b", EngineState.READY) not in stage.states
        assert await starting
        assert stage.states[-4:] == [
            ("a", EngineState.DOWN),
            ("b", EngineState.READY),
            ("a", EngineState.STARTING),
            ("a", EngineState.READY),
        ]
        await stage.supervisor.stop(0)

    asyncio.run(check())


def test_engines_that_end_together_restart_one_after_the_other() -> None:
    """Each start-up has the machine, and its memory, to itself."""

    async def check() -> None:
        stage = Stage(*(stand_in_spec(name, "--late", "0.5") for name in "abc"))
        assert await stage.supervisor.start()
        for engine in list(stage.engines):
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGKILL)
        await until(lambda: stage.states.count(("c", EngineState.DOWN)) == 1, "all are down")
        await until(lambda: len(stage.engines) == 6 and stage.is_all_ready(), "all are back")
        restarts = [state for _, state in stage.states[6:] if state is not EngineState.DOWN]
        assert restarts == [EngineState.STARTING, EngineState.READY] * 3
        await stage.supervisor.stop(0)

    asyncio.run(check())


def test_a_start_up_failure_stops_the_others_and_is_not_retried() -> None:
    """It would fail again; the error says why."""

    async def check() -> None:
        failing = stand_in_spec("b", "--fail", "RuntimeError: no memory")
        stage = Stage(stand_in_spec("a"), failing, stand_in_spec("c"))
        with pytest.raises(EngineStartupError) as caught:
            await stage.supervisor.start()
        assert (caught.value.why, caught.value.exit_status) == ("RuntimeError: no memory", 3)
        assert "RuntimeError: no memory" in caught.value.last_lines
        assert [name for name, state in stage.states if state is EngineState.STARTING] == ["a", "b"]
        assert all_gone(stage.pids())()

    asyncio.run(check())


def test_a_failing_restart_is_tried_again_ever_more_slowly(tmp_path: Path) -> None:
    """Twice the delay each time, up to the longest; once it works again it is ready again."""

    async def check() -> None:
        broken = tmp_path / "broken"
        spec = stand_in_spec(
            "a", "--child", "none", "--fail", "OSError: gone", "--fail-if", str(broken)
        )
        stage = Stage(spec)
        await stage.supervisor.start()
        running = asyncio.create_task(stage.supervisor.run())
        broken.touch()
        pid = stage.engines[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await until(lambda: stage.states.count(("a", EngineState.DOWN)) == 4, "four attempts")
        broken.unlink()
        await until(lambda: stage.states[-1] == ("a", EngineState.READY), "its return")
        downs = [
            d
            for d, (_, state) in zip(stage.details, stage.states, strict=True)
            if state is EngineState.DOWN
        ]
        assert [detail.rsplit(" ", 2)[1] for detail in downs[:4]] == ["0.1", "0.2", "0.4", "0.4"]
        assert "exit status 3 before it was ready: OSError: gone" in downs[1]
        await stage.supervisor.stop(0)
        await running

    asyncio.run(check())


def test_health_for_a_while_resets_the_delay() -> None:
    """An engine that ends once a day is back in a second; one that ends at once is not."""
    now = 0.0
    lives = [1.0, 1.0, 1.0, 61.0, 1.0]

    class Ended(EngineProcess):
        async def start(self) -> None:
            pass

        async def wait_until_ready(self, startup_timeout_seconds: float | None = None) -> None:
            pass

        async def wait(self) -> int:
            nonlocal now
            now += lives.pop(0)
            return 1

    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if not lives:
            await asyncio.Event().wait()

    async def check() -> None:
        supervisor = Supervisor(
            [stand_in_spec("a")], Ended, lambda *_: None, sleep=sleep, clock=lambda: now
        )
        await supervisor.start()
        running = asyncio.create_task(supervisor.run())
        await until(lambda: not lives and len(slept) == 5, "five ends")
        await supervisor.stop(0)
        await running

    asyncio.run(check())
    assert slept == [1, 2, 4, 1, 2]


def test_stop_during_start_ends_it() -> None:
    """start() returns False; the engine that was starting is gone, the next never starts."""

    async def check() -> None:
        stage = Stage(stand_in_spec("a", "--late", "600"), stand_in_spec("b"))
        starting = asyncio.create_task(stage.supervisor.start())
        await until(lambda: stage.engines and stage.engines[0].guard_pid, "its start")
        await stage.all_printed()
        await stage.supervisor.stop(30)
        assert await starting is False
        assert len(stage.engines) == 1
        assert all_gone(stage.pids())()
        assert await stage.supervisor.start() is False

    asyncio.run(check())


@pytest.mark.parametrize("moment", ["start", "run"])
def test_cancelling_leaves_nothing(moment: str) -> None:
    """The caller's own end is the engines' end."""

    async def check() -> None:
        stage = Stage(stand_in_spec("a", *(["--late", "600"] if moment == "start" else [])))
        if moment == "run":
            await stage.supervisor.start()
        task = asyncio.create_task(getattr(stage.supervisor, moment)())
        await asyncio.sleep(0)  # a task that never ran can't clean up after itself
        await until(lambda: stage.engines and stage.engines[0].guard_pid, "its start")
        await stage.all_printed()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert all_gone(stage.pids())()

    asyncio.run(check())


def test_an_engine_that_ignores_sigterm_is_killed_after_the_drain() -> None:
    """Time to finish is limited."""

    async def check() -> None:
        stage = Stage(stand_in_spec("a", "--stubborn"), pace=Pace(teardown_seconds=0.5))
        await stage.supervisor.start()
        await stage.all_printed()
        began = time.monotonic()
        await stage.supervisor.stop(0.5)
        assert 1 <= time.monotonic() - began < 6
        assert stage.details[-1] == "killed after 1 s"
        assert all_gone(stage.pids())()

    asyncio.run(check())


def test_cancelling_stop_cuts_the_drain_short() -> None:
    """A second Ctrl-C."""

    async def check() -> None:
        stage = Stage(stand_in_spec("a", "--stubborn"))
        await stage.supervisor.start()
        await stage.all_printed()
        stopping = asyncio.create_task(stage.supervisor.stop(600))
        await until(lambda: ("a", EngineState.STOPPING) in stage.states, "the drain has begun")
        stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopping
        await asyncio.wait_for(stage.supervisor.stop(0), 6)
        assert all_gone(stage.pids())()

    asyncio.run(check())


def test_a_callback_that_fails_leaves_nothing() -> None:
    """The failure is the caller's to see; the engines are gone."""

    async def check() -> None:
        stage = Stage(stand_in_spec("a"))
        await stage.supervisor.start()
        await stage.all_printed()
        running = asyncio.create_task(stage.supervisor.run())

        def fail(*_: object) -> None:
            msg = "no more"
            raise OSError(msg)

        stage.supervisor._on_state = fail
        stage.engines[0].terminate()
        with pytest.raises(OSError, match="no more"):
            await running
        await until(all_gone(stage.pids()), "all gone", seconds=5)

    asyncio.run(check())


def test_a_killed_parent_leaves_no_process_within_five_seconds(tmp_path: Path) -> None:
    """`kill -9` on the supervisor's process: the lifelines close, the guards clear up."""
    output = tmp_path / "output"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", parent.__name__, "a", "b"],
            stdout=file,
            cwd=Path(__file__).parents[2],
        )

    def lines() -> list[str]:
        return output.read_text().splitlines()

    wait_for(lambda: "all ready" in lines() and len(pids_in(lines())) == 6, "ready", seconds=30)
    guards = [int(line.split()[3]) for line in lines() if " ready " in line]
    process.kill()
    process.wait()
    wait_for(all_gone([*pids_in(lines()), *guards]), "all gone", seconds=5)
