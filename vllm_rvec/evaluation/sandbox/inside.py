"""The process in which the code runs, after its unit tests' harness gave up what it could.

Everything before `_judge` is ours; from there on nothing in this process can be trusted. It ends by
`os._exit`, so that nothing the code has registered runs afterwards.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import types
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NoReturn

from . import kernel, landlock, seccomp

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["BROKEN", "FAILED", "PASSED", "run"]

PASSED: Final = b"P"
FAILED: Final = b"F"
BROKEN: Final = 99
"""The exit status where the sandbox itself fails."""

MAX_NOTE_CHARACTERS: Final = 300
TOKEN_BYTES: Final = 32
MAX_FILES: Final = 64
MAX_PROCESSES: Final = 32
"""Threads count, too. Set only where this user has no processes elsewhere."""
FIRST_PRIVATE_USER: Final = 2_000_000_000
PRIVATE_USERS: Final = 1 << 24

READABLE: Final = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo")
DEVICES: Final = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
"""Where shared libraries and time zones are; the standard library is added."""

Layer = tuple[str, "Callable[[], None]"]


def run(job: dict[str, Any], verdict: int, token: int, *, is_apart: bool) -> NoReturn:
    """Run a program and its tests; never returns.

    Args:
        job: What `running` sent.
        verdict: Takes the layers that hold, and the verdict.
        token: Gives what makes a verdict believed.
        is_apart: Whether namespaces hold.
    """
    try:
        _keep_only(verdict, token)
        os.setsid()
        has_own_user = _become_nobody()
        kernel.prctl(kernel.PR_SET_DUMPABLE, _one())  # the sweep finds what is left by its environ
        kernel.die_with_parent(1 if is_apart else os.getppid())
        _limit(job["limits"], is_alone=has_own_user or (is_apart and os.geteuid() != 0))
        held = ["namespaces"] if is_apart else []
        held += [name for name, confine in _layers() if name in job["layers"] and _holds(confine)]
        os.write(verdict, json.dumps(held).encode() + b"\n")
    except BaseException:  # noqa: BLE001 - the process boundary: BROKEN says it
        os._exit(BROKEN)
    _judge(job["program"], job["tests"], verdict, token)


def _one() -> Any:
    import ctypes  # noqa: PLC0415 - kernel has it already

    return ctypes.c_ulong(1)


def _keep_only(*wanted: int) -> None:
    """Close everything else; read nothing, and write to nowhere."""
    nowhere = os.open("/dev/null", os.O_RDWR)
    for end in range(3):
        os.dup2(nowhere, end)
    first = 3
    for end in sorted(wanted):
        os.closerange(first, end)
        first = end + 1
    os.closerange(first, 4096)


def _become_nobody() -> bool:
    """As root: be a user that nothing belongs to. False where that can't be.

    An interpreter in root's own folder is one reason: another user couldn't import from it. Then
    root's rights are dropped, but what root owns is shielded by Landlock alone.
    """
    if os.geteuid() != 0 or not _is_readable_by_all(os.__file__):
        return False
    user = FIRST_PRIVATE_USER + int.from_bytes(os.urandom(3))
    with suppress(OSError):
        os.chmod(".", 0o777)  # noqa: PTH101, S103 - for a user without a name
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        return True
    return False


def _is_readable_by_all(path: str) -> bool:
    if not os.stat(path).st_mode & 0o004:  # noqa: PTH116 - pathlib costs 10 ms
        return False
    while (folder := os.path.dirname(path)) != path:  # noqa: PTH120
        if not os.stat(folder).st_mode & 0o001:  # noqa: PTH116
            return False
        path = folder
    return True


def _limit(limits: dict[str, Any], *, is_alone: bool) -> None:
    wanted = {
        resource.RLIMIT_CPU: max(1, round(limits["cpu_seconds"])),
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_FSIZE: limits["file_bytes"],
        resource.RLIMIT_NOFILE: MAX_FILES,
        resource.RLIMIT_CORE: 0,
    }
    if is_alone:
        # Else it counts all that this user has on the machine, and the first fork may fail.
        wanted[resource.RLIMIT_NPROC] = MAX_PROCESSES
    for kind, value in wanted.items():
        hardest = resource.getrlimit(kind)[1]
        least = value if hardest == resource.RLIM_INFINITY else min(value, hardest)
        resource.setrlimit(kind, (least, least))


def _layers() -> tuple[Layer, ...]:
    """In the order in which they can be put on."""
    return (
        ("unprivileged", _give_up_rights),
        ("landlock", _shut_files_off),
        ("seccomp", seccomp.install),
        ("audit", _refuse_sockets),
    )


def _holds(confine: Callable[[], None]) -> bool:
    try:
        confine()
    except OSError:
        return False
    return True


def _give_up_rights() -> None:
    kernel.forbid_new_privileges()
    kernel.drop_capabilities()


def _shut_files_off() -> None:
    library = os.path.dirname(os.__file__)  # noqa: PTH120 - pathlib costs 10 ms
    landlock.restrict((*READABLE, library, *DEVICES), (".",))


def _refuse_sockets() -> None:
    """Python's own sockets say in plain words what the other layers only refuse."""

    def hook(event: str, _: object) -> None:
        if event.startswith("socket."):
            raise PermissionError("there is no network here")

    sys.addaudithook(hook)


def _judge(program: str, tests: str, verdict: int, token: int) -> NoReturn:
    """Run both in one module, as if the tests stood below the program."""
    write, read, leave, execute = os.write, os.read, os._exit, exec
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    _forget_ourselves()
    try:
        # Compiled before the program can change anything.
        checks = compile(tests, "<tests>", "exec", dont_inherit=True)
        code = compile(program, "<answer>", "exec", dont_inherit=True)
        execute(code, module.__dict__)
        execute(checks, module.__dict__)
    except BaseException as exc:  # noqa: BLE001 - whatever the code raises is the finding
        said = FAILED + _told(exc)
    else:
        said = PASSED + read(token, TOKEN_BYTES)
    write(verdict, said)
    leave(0)


def _forget_ourselves() -> None:
    """Leave the code an interpreter as it would find it elsewhere."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "sandbox"]:
        del sys.modules[name]
    sys.path.remove(sys.argv[1])
    sys.argv[:] = ["solution.py"]


def _told(exc: BaseException) -> bytes:
    try:
        text = f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__
    except BaseException:  # noqa: BLE001 - __str__ is the code's, too
        text = "an exception that can't be shown"
    return text[:MAX_NOTE_CHARACTERS].encode("utf-8", "replace")
