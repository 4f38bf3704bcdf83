"""The process between the sweep and one run of a model's code: ends all of it, says how it went.

    running ──stdin: the job──> guard ──> init ──> inside
                                guard <──pipe: the verdict── inside

Where the kernel gives namespaces, `init` is the first process of its own: when it ends, the kernel
kills whatever the code has left, however it was forked. Where it doesn't, the guard is the
subreaper of all its descendants (as serve's guard is of an engine's), and kills until there are
none. If the sweep dies, the kernel kills the guard, and with it the rest.

Prints one line of JSON: `is_passed`, `note`, `layers`.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from . import inside, kernel

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["main"]

MAX_VERDICT_BYTES: Final = 1 << 16
"""More than that is no verdict, but code that found the pipe."""
KILL_SECONDS: Final = 3.0
"""How long SIGKILL is repeated: a process may fork while its siblings are being killed."""
SETUP_SECONDS: Final = 60.0
"""How long it may take to the code's beginning, a few hundredths of a second otherwise."""
SCRATCH: Final = "size=64m,nr_inodes=4096,mode=777"
"""Of the folder that the code works in, where it can be one in memory."""


def main() -> int:
    """Run one job to its end.

    Returns:
        0 if there is a verdict, whatever it is.
    """
    job = json.loads(sys.stdin.buffer.read())
    kernel.die_with_parent(job["parent"])
    kernel.become_subreaper()
    is_apart = "namespaces" in job["layers"] and _enter_namespaces()
    kernel.hide_from_tracing()
    run = _Run(job, is_apart)
    verdict = run.to_the_end()
    sys.stdout.write(json.dumps(verdict))
    sys.stdout.flush()
    return 0


def _enter_namespaces() -> bool:
    """Be alone: no network, no other processes, mounts of one's own. False where that's refused."""
    flags = (
        kernel.CLONE_NEWPID
        | kernel.CLONE_NEWNET
        | kernel.CLONE_NEWNS
        | kernel.CLONE_NEWIPC
        | kernel.CLONE_NEWUTS
    )
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        with suppress(OSError):
            kernel.unshare(flags)
            return True
    try:
        kernel.unshare(flags | kernel.CLONE_NEWUSER)
        kernel.map_own_user(uid, gid)
    except OSError:
        return False
    return True


class _Run:
    """One run of the code and its tests."""

    def __init__(self, job: dict[str, Any], is_apart: bool) -> None:
        self._job = job
        self._is_apart = is_apart
        self._verdict, self._verdict_in = os.pipe()
        self._token_out, self._token_in = os.pipe()
        # Only init holds the other end: it closes when init ends.
        self._life, self._life_in = os.pipe()

    def to_the_end(self) -> dict[str, Any]:
        guard = os.getpid()
        init = os.fork()
        if init == 0:
            self._be_init(guard)
        for end in (self._verdict_in, self._token_out, self._life_in):
            os.close(end)
        # Made after the fork, and read by the harness after the tests: until then it's in no memory
        # that the code could look into.
        token = secrets.token_hex(16).encode()
        os.write(self._token_in, token)
        os.close(self._token_in)
        said, is_late = self._listen()
        status = self._end(init)
        return _verdict(said, token, status, is_late)

    def _be_init(self, guard: int) -> None:
        """Never returns: start the code, reap, and end as it ends."""
        try:
            kernel.die_with_parent(0 if self._is_apart else guard)
            if self._is_apart:
                _own_files()
            child = os.fork()
            if child == 0:
                os.close(self._life_in)
                inside.run(self._job, self._verdict_in, self._token_out, is_apart=self._is_apart)
            os.close(self._verdict_in)
            while (ended := os.wait())[0] != child:
                pass
            status = os.waitstatus_to_exitcode(ended[1])
            os._exit(status if status >= 0 else 128 - status)
        finally:
            os._exit(inside.BROKEN)

    def _listen(self) -> tuple[bytes, bool]:
        """Read what is said until init has ended, too much was said, or the time is over.

        The code's time begins with the line before it, however busy the machine is till then.
        """
        said, deadline = b"", time.monotonic() + SETUP_SECONDS
        open_ends = {self._verdict, self._life}
        while len(said) < MAX_VERDICT_BYTES and self._life in open_ends:
            left_seconds = deadline - time.monotonic()
            ready = select.select(list(open_ends), [], [], max(left_seconds, 0))[0]
            if not ready:
                return said, True
            for end in ready:
                data = os.read(end, MAX_VERDICT_BYTES)
                if not data:
                    open_ends.discard(end)
                elif end == self._verdict:
                    if b"\n" not in said:
                        deadline = time.monotonic() + self._job["limits"]["wall_seconds"]
                    said += data
        return said + self._rest(), False

    def _rest(self) -> bytes:
        """What lies in the pipe still: the end of init may be seen before its last words."""
        os.set_blocking(self._verdict, False)
        with suppress(BlockingIOError):
            return os.read(self._verdict, MAX_VERDICT_BYTES)
        return b""

    def _end(self, init: int) -> int:
        """Kill what is left; returns init's exit status, negative where a signal ended it."""
        with suppress(ProcessLookupError):
            os.kill(init, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(init, 0)[1])
        if not self._is_apart:
            _end_descendants()
        return status


def _own_files() -> None:
    """Mount a scratch folder in memory, and the list of processes as it is in here."""
    with suppress(OSError):
        private = kernel.MS_REC | kernel.MS_PRIVATE
        kernel.mount("none", "/", "none", private)
        folder, flags = os.getcwd(), kernel.MS_NOSUID | kernel.MS_NODEV  # noqa: PTH109 - 10 ms
        kernel.mount("tmpfs", folder, "tmpfs", flags, SCRATCH)
        os.chdir(folder)
        kernel.mount("proc", "/proc", "proc", flags | kernel.MS_NOEXEC)


def _end_descendants() -> None:
    deadline = time.monotonic() + KILL_SECONDS
    while _has_children() and time.monotonic() < deadline:
        own = os.getpid()
        descendants = list(_below(own))
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in descendants:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0] != 0:
                pass
        time.sleep(0.001)


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _below(ancestor: int) -> Iterator[int]:
    """Find all descendants, children before their own."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):  # noqa: PTH208 - pathlib costs 10 ms
        if name.isdigit():
            children.setdefault(_parent(name), []).append(int(name))
    found = list(children.get(ancestor, ()))
    for pid in found:
        found += children.get(pid, ())
    yield from found


def _parent(pid: str) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 - pathlib costs 10 ms
            # The name stands in brackets and may hold anything, brackets too.
            return int(file.read().rpartition(b")")[2].split()[1])
    except OSError:
        return 0


def _verdict(said: bytes, token: bytes, status: int, is_late: bool) -> dict[str, Any]:
    """Judge by what was said and how it ended."""
    first, _, last = said.partition(b"\n")
    # Written before the code ran; where not even that was, there is nothing to judge.
    layers = json.loads(first) if first.startswith(b"[") else None
    is_passed = last == inside.PASSED + token
    note = "" if is_passed else _why(last, status, is_late)
    return {"is_passed": is_passed, "note": note, "layers": layers}


def _why(last: bytes, status: int, is_late: bool) -> str:
    if last.startswith(inside.FAILED):
        return last.removeprefix(inside.FAILED).decode("utf-8", "replace")
    signals = {128 + number: number.name for number in signal.Signals}
    if is_late or signals.get(status) == "SIGXCPU":
        return "timed out"
    if status in signals:
        return f"killed by {signals[status]}"
    if last:
        return "wrote into the harness's pipe"
    return f"ended before its tests did, with status {status}"
