"""Find a vector's folder: local, on the Hub, or by URL, fetched once into this package's cache.

A URL's manifest is asked for each time, so that a changed vector is seen; its shards are kept by
their digests, so that nothing is fetched twice. Imports no torch.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_rvec.checkpoint.cache import Blob, Cache
from vllm_rvec.checkpoint.download import Download, Progress
from vllm_rvec.checkpoint.fetch import VECTOR, Located, locate
from vllm_rvec.checkpoint.remote import RemoteFolder, is_url
from vllm_rvec.checkpoint.transfer import Source, TransferError, Trouble
from vllm_rvec.checkpoint.transport import open_source
from vllm_rvec.errors import (
    FetchError,
    RvecError,
    VectorCorruptError,
    VectorFormatError,
    VectorNotFoundError,
)
from vllm_rvec.vector.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

__all__ = ["locate_vector"]

logger = logging.getLogger(__name__)

SPARE_BYTES = 16 << 20
"""A disk that would have less left is too full to begin."""

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def locate_vector(
    reference: str,
    *,
    on_progress: Callable[[int, int], None] | None = None,
    notify: Callable[[str], None] = logger.info,
) -> Located:
    """Find a vector's folder; fetch it if it is not on this machine.

    Args:
        reference: A folder, a Hub id, as for `locate_checkpoint`; or the URL of a folder:
            `s3://bucket/path`, `gs://bucket/path`, `https://host/path`, with `#blake3=DIGEST` after
            it to take no other vector than the one with that digest in its manifest.
        on_progress: Called with the bytes of a URL's shards that are here and those in all.
        notify: Called with a line about what takes longer than one would expect.

    Returns:
        The folder: as it was given, or in a cache. A URL's shards have been compared with their
        digests; of other folders nothing is checked.

    Raises:
        ConfigError: No URL that is read here, or the package for its protocol is missing.
        VectorNotFoundError: There is no such folder, repository, revision or URL; or it is not in
            the cache, and HF_HUB_OFFLINE is set.
        VectorFormatError: There is something, but no vector; or the Hub gives no access to it, or
            the disk of the Hub's cache refuses.
        VectorCorruptError: A URL's files are not those that its manifest or the pin says.
        FetchError: The network or the server fails, or, of a URL, there is no access, or the disk
            refuses; what has come is kept.
    """
    if not is_url(reference):
        return locate(reference, VECTOR)
    remote = RemoteFolder.parse(reference, MANIFEST_NAME)
    return _Fetch(remote, Cache(), on_progress, notify).locate()


@dataclass(frozen=True, slots=True)
class _Fetch:
    remote: RemoteFolder
    cache: Cache
    on_progress: Callable[[int, int], None] | None
    notify: Callable[[str], None]

    def locate(self) -> Located:
        if _is_offline():
            digest = self.remote.pin or self.cache.remembered(self.remote.key)
            folder = self._kept(digest)
            if folder is None:
                raise self._not_kept()
        else:
            folder = self._kept(self.remote.pin) or self._fetch()
        return Located(folder, str(self.remote))

    def _kept(self, digest: str | None) -> Path | None:
        """Return a vector's folder in the cache, if it is there, whole."""
        if digest is None:
            return None
        folder = self.cache.vector(digest)
        try:
            manifest = Manifest.read(folder)
            sizes = {name: (folder / name).stat().st_size for name in manifest.files}
        except (RvecError, OSError):  # not there; or somebody has been at it
            return None
        is_whole = sizes == {name: file.size_bytes for name, file in manifest.files.items()}
        return folder if is_whole and manifest.digest == digest else None

    def _fetch(self) -> Path:
        asked_ns = time.time_ns()
        with (
            self._disk_errors(),
            self.cache.lock(self.remote.key, self._say_waiting),
        ):
            # What another process asked for while this one waited is as fresh as it could be.
            digest = self.remote.pin or self.cache.remembered(self.remote.key, asked_ns)
            if (folder := self._kept(digest)) is not None:
                return folder
            source, data, manifest = self._manifest()
            folder = self._kept(manifest.digest) or self._bring(source, data, manifest)
            self.cache.remember(self.remote.key, manifest.digest, str(self.remote))
            return folder

    def _say_waiting(self) -> None:
        self.notify(f"waiting for another process that fetches {self.remote}")

    def _manifest(self) -> tuple[Source, bytes, Manifest]:
        try:
            source = open_source(self.remote)
            data = source.read(MANIFEST_NAME, MAX_MANIFEST_BYTES)
        except TransferError as exc:
            raise self._no_manifest(exc) from None
        manifest = Manifest.parse(data, f"{self.remote}{MANIFEST_NAME}")
        if self.remote.pin not in {None, manifest.digest}:
            raise VectorCorruptError(
                f"{self.remote} is not the vector that was asked for",
                why=f"blake3: expected {self.remote.pin}, found {manifest.digest}",
                fix="it was replaced there: look at the new one, and pin its digest",
            )
        return source, data, manifest

    def _no_manifest(self, exc: TransferError) -> RvecError:
        match exc.trouble:
            case Trouble.MISSING:
                return VectorNotFoundError(
                    f"there is no vector at {self.remote}",
                    why=f"{MANIFEST_NAME}: {exc.why}",
                    fix="give the URL of the folder that holds it",
                )
            case Trouble.WRONG_SIZE:
                return VectorFormatError(f"{self.remote} is no stored vector", why=exc.why)
        offline = "HF_HUB_OFFLINE=1 takes what is in the cache"
        is_kept = self._kept(self.cache.remembered(self.remote.key)) is not None
        return FetchError(
            f"{self.remote}{MANIFEST_NAME} can't be fetched",
            why=exc.why,
            fix=f"{exc.fix}; {offline}" if is_kept else exc.fix,
        )

    def _bring(self, source: Source, data: bytes, manifest: Manifest) -> Path:
        """Have all shards in the cache, and make the vector's folder of them."""
        files = {name: Blob(f.blake3, f.size_bytes) for name, f in sorted(manifest.files.items())}
        self._check_room(files)
        blobs = {blob: name for name, blob in files.items()}  # each once, whatever its names
        progress = Progress(sum(blob.size_bytes for blob in blobs), self.on_progress)
        download = Download(self.remote, source, self.cache, progress, self.notify)
        for blob, name in blobs.items():
            download.fetch(name, blob)
        return self.cache.assemble(manifest.digest, files, (MANIFEST_NAME, data))

    def _check_room(self, files: Mapping[str, Blob]) -> None:
        missing, free = self.cache.missing_bytes(files.values()), self.cache.free_bytes()
        if missing and missing + SPARE_BYTES > free:
            why = f"{_mega(missing)} are missing, the disk has {_mega(free)} free"
            raise self._no_room(why)

    def _no_room(self, why: str) -> FetchError:
        return FetchError(
            f"there is no room for {self.remote}",
            why=why,
            fix=f"make room on the disk of {self.cache.root}, or name another folder for caches in "
            "XDG_CACHE_HOME",
            path=self.cache.root,
        )

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except RvecError:  # some are OSErrors too, and say it better
            raise
        except OSError as exc:
            if exc.errno in FULL:
                partial = sum(p.stat().st_size for p in self.cache.root.glob("blobs/*.partial"))
                why = f"{exc.strerror}; {_mega(partial)} are kept, and the next run goes on there"
                raise self._no_room(why) from exc
            raise FetchError(
                f"{self.remote} can't be kept",
                why=f"{exc.strerror or exc}: {exc.filename or self.cache.root}",
                fix="name a folder for caches that can be written in XDG_CACHE_HOME",
                path=self.cache.root,
            ) from exc

    def _not_kept(self) -> VectorNotFoundError:
        return VectorNotFoundError(
            f"{self.remote} is not in the cache",
            why=f"HF_HUB_OFFLINE is set, and {self.cache.root} does not hold it, or not whole",
            fix="unset HF_HUB_OFFLINE, or fetch it before with `vllm-rvec fetch`",
            path=self.cache.root,
        )


def _is_offline() -> bool:
    # As huggingface_hub reads it, whose import takes half a second.
    said = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return said.upper() in {"1", "ON", "YES", "TRUE"}


def _mega(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
