"""Run a model's code with its unit tests, in a sandbox of the kernel's means; from any thread.

What holds, layer by layer (`Layer`): wall-clock, CPU, memory, file-size and output limits, an
environment and an input without anything in them, and the end of every process always;
namespaces, seccomp and Landlock where the kernel gives them. `isolation` says which it gives.

What it is not: a defence against code that was written to break out. There is one kernel, and a
hole in it is a hole in here. Neither is a verdict proof against code that was written to deceive:
it runs in one interpreter with its tests, and could find the harness in it. A container or a
virtual machine around the sweep answers the first; nothing but reading the code answers the second.
What it does stop is what models write: endless loops, fork bombs, memory, `sys.exit` before the
tests, downloads, `rm -r`.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil

from vllm_rvec.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

__all__ = ["Layer", "Limits", "Outcome", "isolation", "run_tests"]


class Layer(StrEnum):
    """What shuts the code off, each by itself."""

    NAMESPACES = "namespaces"
    """No network, no other processes to be seen, a scratch folder of 64 MB in memory; nothing
    survives, whatever it forked."""
    UNPRIVILEGED = "unprivileged"
    """No capabilities, and no file that would give some."""
    LANDLOCK = "landlock"
    """No file but the standard library and the scratch folder."""
    SECCOMP = "seccomp"
    """No sockets, no further processes, no signals to others, no tracing."""
    AUDIT = "audit"
    """Python's own sockets refused in plain words. Not a barrier: for the message."""


ALL_LAYERS: Final = frozenset(Layer)

BOOT: Final = (
    "import sys; sys.path.append(sys.argv[1]); from sandbox.guard import main; sys.exit(main())"
)
"""The sandbox as a package of its own: nothing above it is imported, which takes 30 ms here."""
EVALUATION: Final = Path(__file__).parent.parent
MARKER: Final = "RVEC_SANDBOX"
"""In the environment: by its value what is left is found, should the guard be killed."""
GRACE_SECONDS: Final = 90.0
"""What the guard gets, beyond the code's own time, to start and to end everything."""
KILL_SECONDS: Final = 10.0
"""When to give up on processes that the kernel does not let go."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a program may use."""

    wall_seconds: float = 10.0
    cpu_seconds: float = 10.0
    """Of each process, rounded to whole seconds, 1 at least."""
    memory_bytes: int = 512 << 20
    """Of addresses, in each process; the interpreter takes some 30 MB of it."""
    file_bytes: int = 16 << 20
    """Of each file that is written."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a run."""

    is_passed: bool
    """The tests ran to their end, and none failed."""
    note: str
    """Why not: `timed out`, `killed by SIGSEGV`, or the exception, shortened."""
    layers: frozenset[Layer] = frozenset()
    """What held."""


def run_tests(
    program: str,
    tests: str,
    limits: Limits | None = None,
    *,
    layers: Collection[Layer] = ALL_LAYERS,
) -> Outcome:
    """Run a program, then its tests in the same module; wait until nothing of them is left.

    It passes if the tests run to their end without an exception. Ending early, by whatever means
    and status, does not pass: only the harness can say so, after the tests, with a token that comes
    into the process then.

    Args:
        program: Python; sees the standard library of this interpreter only.
        tests: Python, such as some `assert` statements.
        limits: How much both may use; None for the usual.
        layers: What to put on, as far as the kernel gives it. For tests of one layer alone.

    Raises:
        ConfigError: The sandbox itself doesn't work here.
    """
    limits = limits or Limits()
    job = {
        "program": program,
        "tests": tests,
        "parent": os.getpid(),
        "limits": asdict(limits),
        "layers": sorted(layers),
    }
    with _scratch_folder() as folder:
        said = _guarded(json.dumps(job).encode(), folder, limits.wall_seconds + GRACE_SECONDS)
    return _outcome(said)


def isolation() -> frozenset[Layer]:
    """Find out which layers hold on this machine, by running a program in all of them.

    Raises:
        ConfigError: The sandbox doesn't work here at all.
    """
    outcome = run_tests("x = 1", "assert x == 1")
    if not outcome.is_passed:
        raise _broken(f"`assert 1 == 1` did not pass in it: {outcome.note}")
    return outcome.layers


def _guarded(job: bytes, folder: str, timeout_seconds: float) -> bytes:
    """Run the guard; returns what it says, nothing if it was killed."""
    marker = secrets.token_hex(16)
    command = [sys.executable, "-P", "-s", "-S", "-B", "-c", BOOT, str(EVALUATION)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=_environment(marker, folder),
        cwd=folder,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(job, timeout_seconds)
    except subprocess.TimeoutExpired as exc:
        raise _broken(f"its guard has not answered for {timeout_seconds:g} s") from exc
    finally:
        if process.poll() != 0:
            process.kill()
            process.communicate()
            _end_marked(marker)
    if process.returncode > 0:
        raise _broken(f"its guard ended with status {process.returncode}")
    return said


def _environment(marker: str, folder: str) -> Mapping[str, str]:
    # Sets of strings have one order: the same answer gets the same grade.
    return {
        MARKER: marker,
        "PYTHONHASHSEED": "0",
        "LC_ALL": "C.UTF-8",
        "HOME": folder,
        "TMPDIR": folder,
        "PATH": "/nonexistent",
    }


def _end_marked(marker: str) -> None:
    """Kill what carries the marker, until nothing does: forks inherit it."""
    deadline = time.monotonic() + KILL_SECONDS
    while marked := [p for p in psutil.process_iter() if _is_marked(p, marker)]:
        if time.monotonic() > deadline:
            return
        for process in marked:
            with suppress(psutil.Error):
                process.kill()
        time.sleep(0.01)


def _is_marked(process: psutil.Process, marker: str) -> bool:
    with suppress(psutil.Error, OSError):
        if process.status() != psutil.STATUS_ZOMBIE:
            return process.environ().get(MARKER) == marker
    return False


@contextmanager
def _scratch_folder() -> Iterator[str]:
    folder = tempfile.TemporaryDirectory(prefix="rvec-sandbox-", ignore_cleanup_errors=True)
    try:
        yield folder.name
    finally:
        # Where it isn't in memory, folders may lie in it deeper than Python recurses.
        with suppress(RecursionError):
            folder.cleanup()


def _outcome(said: bytes) -> Outcome:
    if not said:
        return Outcome(False, "killed its guard")
    verdict = json.loads(said)
    if verdict["layers"] is None:
        raise _broken(f"it ended before the code was run: {verdict['note']}")
    layers = frozenset(map(Layer, verdict["layers"]))
    return Outcome(verdict["is_passed"], verdict["note"], layers)


def _broken(why: str) -> ConfigError:
    return ConfigError(
        "the sandbox for a model's code does not work on this machine",
        why=why,
        fix="leave tasks with the python scorer out, or run the sweep on another machine",
    )
