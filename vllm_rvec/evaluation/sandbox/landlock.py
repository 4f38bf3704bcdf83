"""Landlock: which files can be read and written, whoever owns them.

As in the kernel's Documentation/userspace-api/landlock.rst; no privilege needed. The numbers of its
system calls are the same on all architectures.
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import TYPE_CHECKING, Final

from .kernel import syscall

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["restrict"]

CREATE_RULESET: Final = 444
ADD_RULE: Final = 445
RESTRICT_SELF: Final = 446
ASK_VERSION: Final = 1
PATH_BENEATH: Final = 1

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
TRUNCATE: Final = 1 << 14
OF_FILES: Final = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE
READ: Final = EXECUTE | READ_FILE | READ_DIR

RIGHTS_BY_VERSION: Final = {1: 13, 2: 14, 3: 15, 4: 15}
"""How many rights over files each version knows; later ones 16."""
TCP_BOTH_WAYS: Final = 0b11
"""Bind and connect, from version 4 on."""
SCOPED: Final = 0b11
"""No abstract sockets and no signals out of here, from version 6 on."""


def restrict(readable: Sequence[str], writable: Sequence[str]) -> None:
    """Shut this process off from all files but these, from now on.

    Args:
        readable: Folders and files to read and execute; one that isn't there is passed over.
        writable: Folders and files to use in every way.

    Raises:
        OSError: The kernel has no Landlock, or refuses.
    """
    version = syscall(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint(ASK_VERSION))
    everything = (1 << RIGHTS_BY_VERSION.get(version, 16)) - 1
    ruleset = _ruleset(version, everything)
    try:
        for paths, rights in ((readable, READ), (writable, everything)):
            for path in paths:
                _allow(ruleset, path, rights & everything)
        syscall(RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint(0))
    finally:
        os.close(ruleset)


def _ruleset(version: int, files: int) -> int:
    attributes = [files]
    if version >= 4:
        attributes.append(TCP_BOTH_WAYS)
    if version >= 6:
        attributes.append(SCOPED)
    packed = struct.pack(f"={len(attributes)}Q", *attributes)
    return syscall(CREATE_RULESET, packed, ctypes.c_size_t(len(packed)), ctypes.c_uint(0))


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not os.path.isdir(path):  # noqa: PTH112 - pathlib costs 10 ms
            rights &= OF_FILES
        rule = struct.pack("=Qi", rights, beneath)
        syscall(ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(PATH_BENEATH), rule, ctypes.c_uint(0))
    finally:
        os.close(beneath)
