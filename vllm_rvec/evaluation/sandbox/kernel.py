"""System calls that Python 3.11 has no name for. Linux; standard library only."""

from __future__ import annotations

import ctypes
import os
from typing import Final

__all__ = [
    "become_subreaper",
    "die_with_parent",
    "drop_capabilities",
    "forbid_new_privileges",
    "hide_from_tracing",
    "map_own_user",
    "mount",
    "prctl",
    "syscall",
    "unshare",
]

CLONE_NEWNS: Final = 0x00020000
CLONE_NEWUTS: Final = 0x04000000
CLONE_NEWIPC: Final = 0x08000000
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWPID: Final = 0x20000000
CLONE_NEWNET: Final = 0x40000000

MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_NOEXEC: Final = 8
MS_REC: Final = 0x4000
MS_PRIVATE: Final = 1 << 18

SIGKILL: Final = 9
PR_SET_PDEATHSIG: Final = 1
PR_SET_DUMPABLE: Final = 4
PR_SET_CHILD_SUBREAPER: Final = 36
PR_SET_NO_NEW_PRIVS: Final = 38

CAPABILITY_VERSION_3: Final = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def syscall(number: int, *arguments: object) -> int:
    """Make a system call by its number."""
    return _checked(_libc.syscall(ctypes.c_long(number), *arguments), f"syscall {number}")


def prctl(option: int, *arguments: object) -> None:
    """Change something about this process; what isn't given is 0."""
    filled = (*arguments, *(ctypes.c_ulong(0) for _ in range(4 - len(arguments))))
    _checked(_libc.prctl(option, *filled), f"prctl {option}")


def unshare(flags: int) -> None:
    """Leave the namespaces that the flags name, for new ones."""
    _checked(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """Mount a file system."""
    texts = (text.encode() for text in (source, target, kind))
    _checked(_libc.mount(*texts, ctypes.c_ulong(flags), data.encode()), f"mount {target}")


def map_own_user(uid: int, gid: int) -> None:
    """Be the same user in a new user namespace, and the only one."""
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {uid} 1"),
        ("gid_map", f"{gid} {gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:  # noqa: PTH123 - pathlib costs 10 ms
            file.write(text)


def become_subreaper() -> None:
    """Be the parent of every descendant whose own parent ends."""
    prctl(PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1))


def die_with_parent(parent: int) -> None:
    """Be killed when the parent ends; end now if it has.

    Args:
        parent: Its id, taken before the fork; 0 where it is in another namespace.
    """
    prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(SIGKILL))
    if os.getppid() != parent:
        os._exit(1)


def hide_from_tracing() -> None:
    """Let no process of the same user look into this one."""
    prctl(PR_SET_DUMPABLE, ctypes.c_ulong(0))


def forbid_new_privileges() -> None:
    """Gain nothing by executing a file, whatever its owner: seccomp and Landlock ask for it."""
    prctl(PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1))


def drop_capabilities() -> None:
    """Keep none of root's rights, where this is root, or root of a namespace."""
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    empty = (ctypes.c_uint32 * 6)()
    _checked(_libc.capset(header, empty), "capset")
