"""Bring one file here: continued where an earlier run stopped, checked, and then given its name.

What is unfinished is `BLAKE3.partial` in the cache; nothing stands under a file's own name that has
not its digest.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO

import blake3

from vllm_rvec.checkpoint.cache import PIECE_BYTES, Blob, Cache
from vllm_rvec.checkpoint.digest import file_digest
from vllm_rvec.checkpoint.transfer import Source, TransferError, Trouble
from vllm_rvec.errors import FetchError, RvecError, VectorCorruptError

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_rvec.checkpoint.remote import RemoteFolder

__all__ = ["Download", "Progress"]

PAUSES_SECONDS = (1.0, 2.0, 4.0)
"""Before each new try; counted anew once a megabyte more has come."""


@dataclass(slots=True)
class Progress:
    """Adds up what has come of several files."""

    total: int
    report: Callable[[int, int], None] | None = None
    done: int = 0

    def add(self, count: int) -> None:
        """Count bytes, fewer than none where a file begins again."""
        self.done += count
        if self.report is not None:
            self.report(self.done, self.total)


@dataclass(slots=True)
class Download:
    """Fetches files of one folder elsewhere into the cache."""

    remote: RemoteFolder
    source: Source
    cache: Cache
    progress: Progress
    notify: Callable[[str], None]
    _hasher: blake3.blake3 = field(init=False, repr=False)

    def fetch(self, name: str, blob: Blob) -> None:
        """Have a file in the cache; by one process, while others wait.

        Raises:
            VectorCorruptError: It is not there, or not what it must be.
            FetchError: It can't be fetched now; what came of it is kept.
            OSError: The disk is full, or refuses.
        """
        with self.cache.lock(blob.blake3, lambda: self.notify(f"waiting for {name}")):
            kept = self.cache.blob(blob)
            if self.cache.has(blob):
                if file_digest(kept) == blob.blake3:
                    self.progress.add(blob.size_bytes)
                    return
                # The disk's fault: a file's name here is its digest.
                self.notify(f"{kept} is damaged: it is fetched again")
                kept.unlink()
            kept.parent.mkdir(parents=True, exist_ok=True)
            self._fetch(name, blob)
            self.cache.keep(blob)

    def _fetch(self, name: str, blob: Blob) -> None:
        """Have the whole file in its partial, and its digest checked."""
        partial = self.cache.partial(blob)
        was_begun = partial.exists()
        found = self._fill(name, blob)
        if found != blob.blake3 and was_begun:
            # What an earlier run wrote may not have reached the disk before the power went.
            self.notify(f"{name}: what was here of it does not fit the rest; from the beginning")
            partial.unlink()
            self.progress.add(-blob.size_bytes)
            found = self._fill(name, blob)
        if found != blob.blake3:
            partial.unlink()
            raise VectorCorruptError(
                f"{name} of {self.remote} is not what its manifest says",
                why=f"blake3: expected {blob.blake3}, found {found}; nothing of it is kept",
                fix="it is damaged, or of another vector: have its owner upload the whole folder",
                path=self.cache.blob(blob),
            )

    def _fill(self, name: str, blob: Blob) -> str:
        """Have as many bytes as the file must have; return their digest."""
        partial = self.cache.partial(blob)
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        with open(descriptor, "r+b", buffering=0) as file:  # noqa: PTH123 - made if need be, never cut
            if partial.stat().st_size > blob.size_bytes:
                file.truncate(0)
            self._begin(file)
            best, failures = file.tell(), 0
            while file.tell() < blob.size_bytes:
                try:
                    self._receive(file, name, blob)
                except TransferError as exc:
                    if file.tell() >= best + PIECE_BYTES:
                        best, failures = file.tell(), 0
                    self._wait_or_raise(exc, name, failures)
                    failures += 1
            os.fsync(file.fileno())
        return self._hasher.hexdigest()

    def _begin(self, file: BinaryIO) -> None:
        """Take in what is here of a file."""
        self._hasher = blake3.blake3()
        while piece := file.read(PIECE_BYTES):
            self._hasher.update(piece)
            self.progress.add(len(piece))

    def _receive(self, file: BinaryIO, name: str, blob: Blob) -> None:
        """Take in what the server gives, from where the file ends."""
        here = file.tell()
        stream = self.source.stream(name, here, blob.size_bytes)
        if stream.start != here:
            self.notify(f"{name}: the server gives no parts of files; from the beginning")
            file.seek(0)
            file.truncate()
            self._hasher = blake3.blake3()
            self.progress.add(-here)
        for chunk in stream.chunks:
            _write_all(file, chunk)
            self._hasher.update(chunk)
            self.progress.add(len(chunk))

    def _wait_or_raise(self, exc: TransferError, name: str, failures: int) -> None:
        if exc.trouble is not Trouble.PASSING or failures >= len(PAUSES_SECONDS):
            raise self._error(exc, name) from None
        pause = PAUSES_SECONDS[failures]
        self.notify(f"{name}: {exc.why}; trying again in {pause:g} s")
        time.sleep(pause)

    def _error(self, exc: TransferError, name: str) -> RvecError:
        is_vectors_fault = exc.trouble in {Trouble.MISSING, Trouble.WRONG_SIZE}
        kind = VectorCorruptError if is_vectors_fault else FetchError
        fix = "have its owner upload the whole folder again" if is_vectors_fault else exc.fix
        return kind(f"{name} of {self.remote} can't be fetched", why=exc.why, fix=fix)


def _write_all(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
