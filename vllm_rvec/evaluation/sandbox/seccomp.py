"""A filter of system calls: no sockets, no further processes, no signals to others, no tracing.

A classic BPF program as in the kernel's Documentation/userspace-api/seccomp_filter.rst. It needs no
privilege, so it also holds in containers that refuse namespaces.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from typing import TYPE_CHECKING, Final

from .kernel import prctl

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["install"]

PR_SET_SECCOMP: Final = 22
MODE_FILTER: Final = 2
CLONE_THREAD: Final = 0x00010000
X32_BIT: Final = 0x40000000

LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
EQUALS: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
AT_LEAST: Final = 0x35  # BPF_JMP | BPF_JGE | BPF_K
HAS_BITS: Final = 0x45  # BPF_JMP | BPF_JSET | BPF_K
RETURN: Final = 0x06  # BPF_RET | BPF_K

NUMBER_OFFSET: Final = 0
ARCH_OFFSET: Final = 4
FIRST_ARGUMENT_OFFSET: Final = 16

ALLOW: Final = 0x7FFF0000
KILL: Final = 0x80000000
REFUSE: Final = 0x00050000 | errno.EPERM
ABSENT: Final = 0x00050000 | errno.ENOSYS

ARCHITECTURES: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""AUDIT_ARCH_* of linux/audit.h."""

REFUSED: Final = {
    "x86_64": {
        "socket": 41,
        "fork": 57,
        "vfork": 58,
        "kill": 62,
        "ptrace": 101,
        "rt_sigqueueinfo": 129,
        "mount": 165,
        "tkill": 200,
        "add_key": 248,
        "request_key": 249,
        "keyctl": 250,
        "unshare": 272,
        "rt_tgsigqueueinfo": 297,
        "perf_event_open": 298,
        "setns": 308,
        "process_vm_readv": 310,
        "process_vm_writev": 311,
        "bpf": 321,
        "userfaultfd": 323,
    },
    "aarch64": {
        "mount": 40,
        "unshare": 97,
        "ptrace": 117,
        "kill": 129,
        "tkill": 130,
        "rt_sigqueueinfo": 138,
        "socket": 198,
        "add_key": 217,
        "request_key": 218,
        "keyctl": 219,
        "rt_tgsigqueueinfo": 240,
        "perf_event_open": 241,
        "setns": 268,
        "process_vm_readv": 270,
        "process_vm_writev": 271,
        "bpf": 280,
        "userfaultfd": 282,
    },
}
"""Refused with EPERM, by the tables of each architecture."""

REFUSED_EVERYWHERE: Final = {
    "pidfd_send_signal": 424,
    "io_uring_setup": 425,
    "pidfd_open": 434,
    "pidfd_getfd": 438,
}
"""Since Linux 5.0 numbers are the same on all architectures. io_uring would open sockets."""

CLONE: Final = {"x86_64": 56, "aarch64": 220}
"""Allowed for threads only."""
TGKILL: Final = {"x86_64": 234, "aarch64": 131}
"""Allowed to this process only: `abort` and `raise_signal` use it."""
CLONE3: Final = 435
"""Its flags lie in memory, where no filter sees them: absent, so that libc takes `clone`."""


def install() -> None:
    """Filter this process from now on, and all that comes of it.

    Raises:
        OSError: The kernel refuses, or this architecture's numbers aren't known.
    """
    machine = os.uname().machine
    if machine not in ARCHITECTURES or sys.maxsize < 2**32:
        raise OSError(errno.ENOSYS, f"no table of system calls for {machine}")
    instructions = list(_program(machine, os.getpid()))
    code = ctypes.create_string_buffer(b"".join(instructions))
    program = struct.pack("HxxxxxxP", len(instructions), ctypes.addressof(code))
    prctl(PR_SET_SECCOMP, ctypes.c_ulong(MODE_FILTER), ctypes.create_string_buffer(program))


def _program(machine: str, own: int) -> Iterator[bytes]:
    yield _instruction(LOAD, ARCH_OFFSET)
    yield _instruction(EQUALS, ARCHITECTURES[machine], 1, 0)
    yield _instruction(RETURN, KILL)
    yield _instruction(LOAD, NUMBER_OFFSET)
    if machine == "x86_64":  # x32's numbers are x86_64's with a bit set
        yield _instruction(AT_LEAST, X32_BIT, 0, 1)
        yield _instruction(RETURN, KILL)
    for number in (*REFUSED[machine].values(), *REFUSED_EVERYWHERE.values()):
        yield _instruction(EQUALS, number, 0, 1)
        yield _instruction(RETURN, REFUSE)
    yield _instruction(EQUALS, CLONE3, 0, 1)
    yield _instruction(RETURN, ABSENT)
    yield from _only_if(CLONE[machine], HAS_BITS, CLONE_THREAD)
    yield from _only_if(TGKILL[machine], EQUALS, own)
    yield _instruction(RETURN, ALLOW)


def _only_if(number: int, test: int, value: int) -> Iterator[bytes]:
    """Let a system call through if its first argument passes a test."""
    yield _instruction(EQUALS, number, 0, 4)
    yield _instruction(LOAD, FIRST_ARGUMENT_OFFSET)
    yield _instruction(test, value, 0, 1)
    yield _instruction(RETURN, ALLOW)
    yield _instruction(RETURN, REFUSE)


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)
