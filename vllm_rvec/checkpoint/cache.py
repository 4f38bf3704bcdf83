"""Where this package keeps what can be made again: files by their digest, folders made of them.

    blobs/BLAKE3            a file, under the digest of its bytes; with .partial, its beginning
    vectors/DIGEST/         a vector: its manifest, and hard links to blobs
    urls/KEY.json           which vector a URL named when it was last asked
    locks/NAME.lock         held by the one process that fetches it

All of it may be removed while nothing is being fetched; a link's bytes stay as long as one of its
names does. Imports no torch.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vllm_rvec.checkpoint.output import replace_durably, sync_folder, write_durably
from vllm_rvec.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

__all__ = ["Blob", "Cache", "cache_folder"]

PIECE_BYTES = 1 << 20


class Blob(NamedTuple):
    """A file by what is in it."""

    blake3: str
    size_bytes: int


class Cache:
    """The store of fetched files, shared by all processes of a user.

    Raises:
        ConfigError: The user has no folder for it.
    """

    def __init__(self) -> None:
        found = cache_folder()
        if found is None:
            raise ConfigError(
                "there is no place to keep what is fetched",
                why="this user has no home folder",
                fix="name a folder for caches in XDG_CACHE_HOME",
            )
        self.root = found

    def blob(self, blob: Blob) -> Path:
        """Return where a file is kept, or would be."""
        return self.root / "blobs" / blob.blake3

    def partial(self, blob: Blob) -> Path:
        """Return where a file's beginning is kept, or would be."""
        return self.root / "blobs" / f"{blob.blake3}.partial"

    def has(self, blob: Blob) -> bool:
        """Tell whether a file is here, whole."""
        return _size(self.blob(blob)) == blob.size_bytes

    def missing_bytes(self, blobs: Iterable[Blob]) -> int:
        """Count what is still to be fetched of some files."""
        return sum(
            max(0, blob.size_bytes - (_size(self.partial(blob)) or 0))
            for blob in set(blobs)
            if not self.has(blob)
        )

    def free_bytes(self) -> int:
        """Return how much more the disk takes."""
        self.root.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self.root).free

    def vector(self, digest: str) -> Path:
        """Return the folder that holds a vector, or would."""
        return self.root / "vectors" / digest

    def assemble(self, digest: str, files: Mapping[str, Blob], first: tuple[str, bytes]) -> Path:
        """Make a vector's folder of files that are here, all at once.

        Args:
            digest: The vector's.
            files: What each of its files holds, by name.
            first: Name and bytes of the file that names the others.
        """
        folder = self.vector(digest)
        making = folder.with_name(f".{digest}")
        with self.lock(digest):
            if _is_whole(folder, files, first):  # of another URL; it may be in use
                return folder
            for remains in (making, folder):  # of a killed process; of a folder not whole
                shutil.rmtree(remains, ignore_errors=True)
            making.mkdir(parents=True)
            for name, blob in files.items():
                _link(self.blob(blob), making / name)
            write_durably(making / first[0], first[1])
            sync_folder(making)
            making.rename(folder)
            sync_folder(folder.parent)
        return folder

    def remember(self, key: str, digest: str, url: str) -> None:
        """Keep which vector a URL named.

        Args:
            key: The URL's.
            digest: The vector's.
            url: For people who look into the folder; without secrets.
        """
        path = self._url(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"url": url, "digest": digest, "asked_ns": time.time_ns()})
        replace_durably(path, text.encode())

    def remembered(self, key: str, since_ns: int = 0) -> str | None:
        """Return the digest of the vector that a URL named, if it was asked since then."""
        try:
            found = json.loads(self._url(key).read_bytes())
            return str(found["digest"]) if found["asked_ns"] >= since_ns else None
        except (OSError, ValueError, TypeError, KeyError):  # none, or damaged: as none
            return None

    @contextmanager
    def lock(self, name: str, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
        """Be the only process and thread that holds a name while the block runs.

        Args:
            name: What is to be done by one only.
            on_wait: Called once if another holds it.
        """
        from filelock import FileLock, Timeout  # noqa: PLC0415 - not for those who fetch nothing

        path = self.root / "locks" / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        # The system frees it when its holder dies, however that comes.
        lock = FileLock(path)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            if on_wait is not None:
                on_wait()
            lock.acquire(poll_interval=0.1)
        try:
            yield
        finally:
            lock.release()

    def keep(self, blob: Blob) -> None:
        """Give a file whose beginning has become the whole its name."""
        partial = self.partial(blob)
        partial.chmod(0o444)  # many vectors may share it
        partial.replace(self.blob(blob))
        sync_folder(partial.parent)

    def _url(self, key: str) -> Path:
        return self.root / "urls" / f"{key}.json"


def cache_folder() -> Path | None:
    """Return where this package keeps what can be made again: `$XDG_CACHE_HOME/vllm_rvec`.

    None for a user without a home, as a container's random one.
    """
    if root := os.environ.get("XDG_CACHE_HOME"):
        return Path(root) / "vllm_rvec"
    try:
        return Path.home() / ".cache" / "vllm_rvec"
    except RuntimeError:
        return None


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _is_whole(folder: Path, files: Mapping[str, Blob], first: tuple[str, bytes]) -> bool:
    try:
        is_same = (folder / first[0]).read_bytes() == first[1]
    except OSError:
        return False
    return is_same and all(_size(folder / name) == blob.size_bytes for name, blob in files.items())


def _link(blob: Path, path: Path) -> None:
    try:
        path.hardlink_to(blob)
    except OSError:  # a file system without hard links, or too many of them
        shutil.copyfile(blob, path)
