"""The small process between us and one engine: sees to it that all of the engine ends.

    supervisor ──lifeline──> guard ──> API server ──> EngineCore ──> Workers

vLLM is several processes, and each can be killed alone. The guard is the subreaper of them all, so
none gets away from it:

- the lifeline closes (the supervisor is gone, however it went): all end;
- the API server ends: what it leaves behind ends, and the guard takes over its exit status;
- SIGTERM or SIGINT: passed on to the API server as SIGTERM, which lets requests finish;
- the guard itself is killed: the kernel kills the API server (PR_SET_PDEATHSIG), and the
  supervisor kills the rest, which is in the guard's session (`kill_session`).

Run as `python -P guard.py LIFELINE_FD -- COMMAND...`: started by its path it imports nothing of
this package, and so is there in a few hundredths of a second. Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = ["kill_session", "main"]

GRACE_SECONDS = 2.0
"""From SIGTERM to SIGKILL."""
TRACKER_SECONDS = 1.5
"""What Python's resource trackers get to remove shared memory, once their clients are gone."""
KILL_SECONDS = 0.5
"""How long SIGKILL is repeated: a process may fork while its siblings are being killed."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def main(arguments: Sequence[str]) -> int:
    """Run one engine to its end.

    Args:
        arguments: The lifeline's file descriptor, `--`, the engine's command.

    Returns:
        The engine's exit status, 128 + n where signal n ended it.
    """
    lifeline, command = int(arguments[0]), arguments[2:]
    received: list[int] = []
    wake = _wake_on_signals(received)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        engine = _start(command)
    except OSError as exc:
        sys.stderr.write(f"{command[0]}: error: {exc.strerror}\n")
        return 127
    status = _watch(engine, lifeline, wake, received)
    ended = _end_descendants()
    if status is None:
        status = ended.get(engine, -signal.SIGKILL)
    return status if status >= 0 else 128 - status


def kill_session(session: int, *, timeout_seconds: float = 3.0) -> None:
    """Kill every process of a session, also those that it forks meanwhile.

    Args:
        session: The session's id, which is its first process's.
        timeout_seconds: When to give up on processes that the kernel does not let go.
    """
    began = time.monotonic()
    while members := _session_members(session):
        waited_seconds = time.monotonic() - began
        if waited_seconds > timeout_seconds:
            return
        _send(signal.SIGKILL, members, spare_trackers=waited_seconds < TRACKER_SECONDS)
        time.sleep(0.01)


def _session_members(session: int) -> list[psutil.Process]:
    members = []
    for process in psutil.process_iter():
        # A zombie holds nothing, and in a container without an init it stays for ever.
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
    return members


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")


def _wake_on_signals(received: list[int]) -> int:
    """Make signals readable: SIGTERM and SIGINT are noted, a child's end only wakes the loop."""
    wake, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: received.append(number))
    return wake


def _start(command: Sequence[str]) -> int:
    # A process group of its own: an engine that signals its whole group must not hit the guard.
    process = subprocess.Popen(
        command,
        process_group=0,
        preexec_fn=_die_with(os.getpid()),  # noqa: PLW1509 - one thread only
    )
    process.returncode = 0  # reaped in _reap; keeps Popen from doing it, and from warning
    return process.pid


def _die_with(guard: int) -> Callable[[], None]:
    def in_child() -> None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guard:  # the guard was killed before the line above
            os._exit(1)

    return in_child


def _watch(engine: int, lifeline: int, wake: int, received: list[int]) -> int | None:
    """Wait for the engine's end and return its status, or None when the lifeline has closed."""
    with selectors.DefaultSelector() as selector:
        selector.register(lifeline, selectors.EVENT_READ)
        selector.register(wake, selectors.EVENT_READ)
        while True:
            if (status := _reap().get(engine)) is not None:
                return status
            while received:
                received.pop()
                os.kill(engine, signal.SIGTERM)
            readable = {key.fd for key, _ in selector.select()}
            if wake in readable:
                os.read(wake, 4096)
            if lifeline in readable and not os.read(lifeline, 1):
                return None


def _reap() -> dict[int, int]:
    """Collect the children that have ended, the adopted ones too, with their statuses."""
    ended: dict[int, int] = {}
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            ended[pid] = os.waitstatus_to_exitcode(status)
    return ended


def _end_descendants() -> dict[int, int]:
    """End all that is left, gently and then not, within 4 s; returns the statuses."""
    ended: dict[int, int] = {}
    _signal_descendants(signal.SIGTERM)
    if not _wait_until_alone(GRACE_SECONDS, ended):
        _signal_descendants(signal.SIGKILL, spare_trackers=True)
        _wait_until_alone(TRACKER_SECONDS, ended)
    deadline = time.monotonic() + KILL_SECONDS
    while not _wait_until_alone(0.02, ended) and time.monotonic() < deadline:
        _signal_descendants(signal.SIGKILL)
    return ended


def _wait_until_alone(timeout_seconds: float, ended: dict[int, int]) -> bool:
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        ended |= _reap()
        # A subreaper without children has no descendants at all.
        if not _has_children():
            return True
        time.sleep(0.01)
    return False


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _signal_descendants(number: int, *, spare_trackers: bool = False) -> None:
    descendants = psutil.Process().children(recursive=True)
    _send(number, descendants, spare_trackers=spare_trackers)


def _send(number: int, processes: Iterable[psutil.Process], *, spare_trackers: bool) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            # Python's resource tracker removes its clients' shared memory when the last is gone.
            if not (spare_trackers and "resource_tracker" in " ".join(process.cmdline())):
                process.send_signal(number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
