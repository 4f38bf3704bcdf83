"""The digest by which files are told apart. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import blake3

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["file_digest"]

DIGEST_CHUNK_BYTES: Final = 1 << 18


def file_digest(path: Path) -> str:
    """Compute a file's blake3 in small memory, in hexadecimal."""
    hasher = blake3.blake3()
    buffer = memoryview(bytearray(DIGEST_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            hasher.update(buffer[:count])
    return hasher.hexdigest()
