"""Nothing of an engine outlives its guard, its API server, or the guard's parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Self

import psutil
import pytest

from tests.serve.conftest import STAND_IN, all_gone, is_alive, pids_in, stand_in_spec, wait_for
from vllm_rvec.serve import guard
from vllm_rvec.serve.engine import _free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Guarded:
    """A guard with a stand-in engine; its output goes to a file."""

    def __init__(self, folder: Path, *command: str) -> None:
        self.output = folder / "output"
        lifeline, self.lifeline = os.pipe()
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-P", guard.__file__, str(lifeline), "--", *command],
                pass_fds=(lifeline,),
                stdout=output,
                stderr=output,
                env=dict(stand_in_spec("any").env),
                start_new_session=True,
            )
        os.close(lifeline)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close_lifeline()
        self.process.wait(10)

    def close_lifeline(self) -> None:
        """Be gone, as the guard sees it."""
        if self.lifeline >= 0:
            os.close(self.lifeline)
        self.lifeline = -1

    def lines(self) -> list[str]:
        """What the guard and the engine have printed."""
        return self.output.read_text().splitlines()

    def pids(self) -> list[int]:
        """The engine, its child and its grandchild, once all have started."""
        wait_for(lambda: len(pids_in(self.lines())) == 3, "three processes")
        return pids_in(self.lines())


def stand_in(*flags: str) -> tuple[str, ...]:
    return (
        sys.executable,
        str(STAND_IN),
        "--host",
        "127.0.0.1",
        "--port",
        str(_free_port()),
        *flags,
    )


@pytest.fixture(params=["same-session", "own-session"])
def guarded(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Guarded]:
    """An engine with two descendants that ignore SIGTERM; one may leave the session."""
    with Guarded(tmp_path, *stand_in("--child", request.param)) as running:
        yield running


def test_a_closed_lifeline_ends_everything_within_four_seconds(guarded: Guarded) -> None:
    """The supervisor is gone: so is all of the engine, stubborn descendants included."""
    pids = guarded.pids()
    began = time.monotonic()
    guarded.close_lifeline()
    wait_for(all_gone([*pids, guarded.process.pid]), "all gone", seconds=5)
    assert time.monotonic() - began < 4.5


def test_a_killed_engine_takes_its_descendants_along(guarded: Guarded) -> None:
    """`kill -9` on the API server leaves neither EngineCore nor Workers; the guard says 137."""
    pids = guarded.pids()
    engine = next(pid for pid in pids if psutil.Process(pid).ppid() == guarded.process.pid)
    os.kill(engine, signal.SIGKILL)
    wait_for(all_gone(pids), "all gone", seconds=5)
    assert guarded.process.wait(5) == 128 + signal.SIGKILL


def test_a_killed_guard_takes_the_engine_along(tmp_path: Path) -> None:
    """The kernel ends the engine; what is left is in the guard's session, and can be killed."""
    with Guarded(tmp_path, *stand_in()) as running:
        pids = running.pids()
        engine = next(pid for pid in pids if psutil.Process(pid).ppid() == running.process.pid)
        running.process.kill()
        running.process.wait()
        wait_for(lambda: not is_alive(engine), "the engine's end", seconds=2)
        guard.kill_session(running.process.pid)
        wait_for(all_gone(pids), "all gone", seconds=2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_as_sigterm(tmp_path: Path, number: int) -> None:
    """The engine ends in its own time and with its own status."""
    with Guarded(tmp_path, *stand_in("--child", "none")) as running:
        wait_for(lambda: any("key is" in line for line in running.lines()), "a ready engine")
        running.process.send_signal(number)
        assert running.process.wait(10) == 0
        assert running.lines()[-1] == "drained"


def test_the_engines_status_is_the_guards(tmp_path: Path) -> None:
    """A failure reads the same through the guard."""
    with Guarded(tmp_path, *stand_in("--fail", "bad news")) as running:
        assert running.process.wait(10) == 3
        assert "bad news" in running.lines()


def test_a_command_that_does_not_exist_is_reported(tmp_path: Path) -> None:
    """In a line that reads like any other program's."""
    with Guarded(tmp_path, "/no/such/program") as running:
        assert running.process.wait(10) == 127
        assert running.lines() == ["/no/such/program: error: No such file or directory"]


def test_adopted_processes_are_reaped(tmp_path: Path) -> None:
    """A daemon's intermediate parent does not stay as a zombie below the guard."""
    script = (
        "import subprocess, sys, time\n"
        "subprocess.run([sys.executable, '-c', 'import subprocess, sys\\n"
        'subprocess.Popen([sys.executable, "-c", "print(1)"])\'])\n'
        "print('done', flush=True)\n"
        "time.sleep(600)\n"
    )
    with Guarded(tmp_path, sys.executable, "-c", script) as running:
        wait_for(lambda: {"done", "1"} <= set(running.lines()), "the daemon's end")
        children = psutil.Process(running.process.pid).children
        wait_for(lambda: len(children()) == 1, "only the engine below the guard")


def test_killing_a_session_without_members_returns_at_once() -> None:
    """The usual case: the guard has done its work."""
    process = subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)
    process.wait()
    began = time.monotonic()
    guard.kill_session(process.pid)
    assert time.monotonic() - began < 2


def test_the_guard_is_small() -> None:
    """By its path it imports nothing of ours and nothing heavy: it is there before the engine."""
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[1]); "
        "print([m for m in sys.modules if m.split('.')[0] in {'vllm_rvec','aiohttp','pydantic'}])"
    )
    shown = subprocess.run(
        [sys.executable, "-P", "-c", code, guard.__file__],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() == "[]"
