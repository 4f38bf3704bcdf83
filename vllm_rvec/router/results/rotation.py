"""The files of the results: NAME, which is written, and NAME.1 (newest), NAME.2, ... before it.

Moves and removes files; knows nothing of what is in them.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from vllm_rvec.router.results.schema import seal

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["bytes_of", "result_files", "rotate", "rotated_files"]


def rotated_files(path: Path) -> list[Path]:
    """The files before this one, newest first."""
    prefix = f"{path.name}."
    numbered = [
        (int(number), found)
        for found in path.parent.iterdir()
        if found.name.startswith(prefix)
        and (number := found.name[len(prefix) :]).isascii()
        and number.isdigit()
    ]
    return [found for _, found in sorted(numbered)]


def result_files(path: Path) -> list[Path]:
    """All files, newest first, beginning with the one that is written."""
    return [path, *rotated_files(path)] if path.parent.is_dir() else [path]


def bytes_of(path: Path) -> int:
    """What a file takes, with what is not yet checkpointed."""
    total = 0
    for part in (path, path.with_name(f"{path.name}-wal")):
        with suppress(FileNotFoundError):
            total += part.stat().st_size
    return total


def rotate(path: Path, keep_files: int) -> None:
    """Move a file out of the way, the older ones by one number, and remove the oldest.

    Args:
        path: The file that is written. No connection of this process has it open.
        keep_files: How many to keep beside the one that is written.

    Raises:
        sqlite3.Error: A file is open elsewhere; nothing was moved then, for SQLite finds the -wal
            by the file's name, and moving it from under a connection damages it.
    """
    files = result_files(path)
    kept = files[:keep_files]
    for file in kept or files[:1]:
        seal(file)
    for file in reversed(files[keep_files:]):
        _remove(file)
    for number, file in reversed(list(enumerate(kept, start=1))):
        file.rename(path.with_name(f"{path.name}.{number}"))


def _remove(path: Path) -> None:
    # First the file: -wal and -shm without it are nothing, it without -wal lacks its last rows.
    for part in (path, *(path.with_name(f"{path.name}{end}") for end in ("-wal", "-shm"))):
        part.unlink(missing_ok=True)
