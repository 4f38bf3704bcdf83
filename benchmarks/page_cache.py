"""Cold and warm files: drop their pages, read them back, count what is read from the disk.

No privilege is needed: `posix_fadvise(DONTNEED)` drops the clean pages of one file that no process
has mapped, and `/proc/self/io` counts the bytes that a process had fetched from the disk. `mincore`
tells whether it was so.

Which pages a warm file has makes a difference by itself. What `write` leaves in the page cache are
small pages, mapped 64 KiB at a fault; what was read from the disk are large ones (readahead; where
the filesystem has them), with a tenth of the faults or less. A file that is served was read, so
warm here means: dropped, then read from its beginning to its end.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["cached_share", "drop", "files_of", "read_back", "read_from_disk_bytes"]

CHUNK_BYTES = 4 << 20
IO = Path("/proc/self/io")

_libc = ctypes.CDLL(None, use_errno=True)


def files_of(*folders: Path) -> list[Path]:
    """Return the weights' files of checkpoints and vectors."""
    return [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]


def drop(files: Iterable[Path]) -> None:
    """Take files out of the page cache, written back first.

    Raises:
        RuntimeError: Something still holds their pages: a mapping, or a filesystem in memory.
    """
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
        if (share := cached_share(file)) > 0.01:
            raise RuntimeError(f"{share:.0%} of {file} stays in the page cache: it can't be cold")


def read_back(files: Iterable[Path]) -> None:
    """Have files in the page cache as a read from the disk leaves them."""
    buffer = bytearray(CHUNK_BYTES)
    for file in files:
        drop([file])
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def cached_share(file: Path) -> float:
    """Return the share of a file's pages that are in the page cache."""
    size = file.stat().st_size
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY) as pages:
        marks = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        first = ctypes.c_char.from_buffer(pages)
        address = ctypes.c_void_p(ctypes.addressof(first))
        failed = _libc.mincore(address, ctypes.c_size_t(size), marks)
        del first
    if failed:
        raise OSError(ctypes.get_errno(), "mincore", str(file))
    return sum(mark & 1 for mark in bytes(marks)) / len(marks)


def read_from_disk_bytes() -> int:
    """Return what this process has had fetched from the disk so far."""
    fields = dict(line.split(": ") for line in IO.read_text().splitlines())
    return int(fields["read_bytes"])
