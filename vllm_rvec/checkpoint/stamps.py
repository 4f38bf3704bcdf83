"""Whether stored files are still those that were looked at before. Nothing is read of them.

What the kernel says of a file (size, time of change, inode) tells any two of them apart, but not
one that was written to at the same size with its times set back: whoever does that wants to.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

__all__ = ["FileStamps", "Stamp"]

PATTERNS = ("*.safetensors", "*.json")


class Stamp(NamedTuple):
    """What the kernel says of a file."""

    size_bytes: int
    modified_ns: int
    inode: int

    @classmethod
    def of(cls, file: Path | int) -> Stamp:
        """Look at a file by its path or descriptor; raises OSError where that can't be done."""
        stat = os.stat(file)  # noqa: PTH116 - descriptors too
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ino)

    def change(self, now: Stamp) -> str:
        """Say how a file has changed; empty where it has not."""
        if now == self:
            return ""
        if now.size_bytes != self.size_bytes:
            return f"it had {self.size_bytes} bytes, now {now.size_bytes}"
        return "it was replaced" if now.inode != self.inode else "it was written to"


@dataclass(frozen=True, slots=True)
class FileStamps:
    """The files of some folders, as they were at one moment."""

    folders: tuple[Path, ...]
    """Where they lie; weights and configuration at the top level only."""
    stamps: Mapping[Path, Stamp]
    """What the kernel said of each."""

    @classmethod
    def take(cls, folders: Iterable[Path]) -> FileStamps:
        """Note how the files of some folders are now.

        Args:
            folders: Of a checkpoint or a vector.

        Raises:
            OSError: One can't be looked at.
        """
        looked_at = tuple(folders)
        return cls(looked_at, _stamps(looked_at))

    def problems(self) -> list[str]:
        """Say what is no longer as it was; empty where all is."""
        try:
            now = _stamps(self.folders)
        except OSError as exc:
            return [f"{exc.filename}: {exc.strerror}"]
        found = [f"{path}: removed" for path in self.stamps.keys() - now.keys()]
        found += [f"{path}: new" for path in now.keys() - self.stamps.keys()]
        for path, stamp in now.items():
            if path in self.stamps and stamp != self.stamps[path]:
                found.append(f"{path}: changed")
            elif not os.access(path, os.R_OK):
                found.append(f"{path}: no permission to read it")
        return sorted(found)


def _stamps(folders: Iterable[Path]) -> dict[Path, Stamp]:
    paths = (path for folder in folders for kind in PATTERNS for path in _listed(folder, kind))
    # Of what a link leads to: the Hub's cache is made of links.
    return {path: Stamp.of(path) for path in paths}


def _listed(folder: Path, pattern: str) -> list[Path]:
    os.stat(folder)  # noqa: PTH116 - glob is silent about a folder that is gone
    return sorted(folder.glob(pattern))
