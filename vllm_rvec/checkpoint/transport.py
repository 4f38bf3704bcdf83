"""Read the files of a folder elsewhere, through fsspec: bounded, checked, and in our words.

A server is not trusted: nothing is read beyond what was asked for, and nothing is followed to where
the user's URL would not be allowed to lead. So https is read as one stream a file (fsspec takes an
answer to a range whole, whatever its size); object stores are read in ranges, several at once.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from vllm_rvec.checkpoint.hub import harmless
from vllm_rvec.checkpoint.remote import OBJECT_STORES, RemoteFolder, is_loopback
from vllm_rvec.checkpoint.transfer import (
    Source,
    Stream,
    TransferError,
    Trouble,
    explained,
    wrong_size,
)
from vllm_rvec.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["open_source"]

CONNECT_SECONDS = 30
SILENCE_SECONDS = 60
"""A server that sends nothing for so long is given up."""
CHUNK_BYTES = 1 << 20
RANGE_BYTES = 8 << 20
RANGES_AT_ONCE = 8
"""Of an object; together the most that is held in memory."""

CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")

PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}


def open_source(remote: RemoteFolder) -> Source:
    """Open a folder elsewhere; nothing is asked of it yet.

    Raises:
        ConfigError: The package that speaks its protocol is not installed.
        TransferError: Logging in failed.
    """
    import fsspec  # noqa: PLC0415 - a tenth of a second

    if remote.scheme not in OBJECT_STORES:
        return _HttpSource(remote)
    try:
        with explained(remote):
            # A listing that another part of the process keeps may be old.
            files = fsspec.filesystem(
                remote.scheme, skip_instance_cache=True, use_listings_cache=False
            )
    except ImportError as exc:
        raise ConfigError(
            f"{remote} can't be fetched",
            why=f"{remote.scheme}:// needs the package {PACKAGES[remote.scheme]}",
            fix=f"pip install 'vllm-rvec[{remote.scheme}]'",
        ) from exc
    return _ObjectSource(remote, files)


class _HttpSource:
    def __init__(self, remote: RemoteFolder) -> None:
        import aiohttp  # noqa: PLC0415 - a fifth of a second
        import fsspec  # noqa: PLC0415 - as above

        self._remote = remote
        timeout = aiohttp.ClientTimeout(
            None, sock_connect=CONNECT_SECONDS, sock_read=SILENCE_SECONDS
        )
        client: dict[str, Any] = {
            "auto_decompress": False,
            "read_bufsize": CHUNK_BYTES,
            "timeout": timeout,
            "trust_env": True,  # proxies, ~/.netrc
        }
        self._files = fsspec.filesystem(
            "http", skip_instance_cache=True, encoded=True, client_kwargs=client
        )

    def read(self, name: str, limit: int) -> bytes:
        with explained(self._remote):
            file = self._open(name, 0)
        data = bytearray()
        for chunk in self._chunks(file):
            data += chunk
            if len(data) > limit:
                why = f"{name} is longer than {limit} bytes"
                raise TransferError(Trouble.WRONG_SIZE, why)
        return bytes(data)

    def stream(self, name: str, start: int, size_bytes: int) -> Stream:
        try:
            with explained(self._remote):
                file = self._open(name, start)
        except TransferError as exc:
            if start == 0 or exc.status != 416:
                raise
            return self.stream(name, 0, size_bytes)  # the file ends before that place
        begins, total = self._extent(file.r, start)
        if total not in {None, size_bytes}:
            file.close()
            raise wrong_size(name, size_bytes, str(total))
        return Stream(begins, self._checked(file, name, begins, size_bytes))

    def _open(self, name: str, start: int) -> Any:
        headers = {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        # Any size: without one, fsspec asks for it first.
        file = self._files.open(
            self._remote.file(name), "rb", block_size=0, size=1, headers=headers
        )
        try:
            self._check_answer(file.r)
        except TransferError:
            file.close()
            raise
        return file

    def _check_answer(self, answer: Any) -> None:
        for hop in (*answer.history, answer):
            url = hop.url
            if url.scheme != "https" and not (
                self._remote.scheme == "http"
                and (self._remote.pin is not None or is_loopback(url.host))
            ):
                why = f"the server leads on to {url.scheme}://{url.host}, which is not protected"
                raise TransferError(Trouble.REFUSED, why, "give the URL of a server that does not")
        if answer.status not in {200, 206}:
            raise TransferError(Trouble.REFUSED, f"the server answered {answer.status}")
        if (encoding := answer.headers.get("Content-Encoding", "identity")) not in {"identity", ""}:
            why = f"the server sends it compressed ({harmless(encoding)[:20]}), which was not asked"
            raise TransferError(Trouble.REFUSED, why, "have the server send files as they are")

    def _extent(self, answer: Any, start: int) -> tuple[int, int | None]:
        """Return where an answer begins in its file, and how long the file is if it says so."""
        if answer.status == 200:
            return 0, answer.content_length
        match = CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != start:
            answer.close()
            raise TransferError(Trouble.REFUSED, "the server gives another range than asked for")
        return start, None if match[2] == "*" else int(match[2])

    def _checked(self, file: Any, name: str, begins: int, size_bytes: int) -> Iterator[bytes]:
        done = begins
        for chunk in self._chunks(file):
            done += len(chunk)
            if done > size_bytes:
                raise wrong_size(name, size_bytes, "more")
            yield chunk
        if done < size_bytes:
            raise TransferError(Trouble.PASSING, f"{name} broke off after {done} bytes")

    def _chunks(self, file: Any) -> Iterator[bytes]:
        try:
            while True:
                with explained(self._remote):
                    chunk = file.read(CHUNK_BYTES)
                if not chunk:
                    return
                yield chunk
        finally:
            file.close()


class _ObjectSource:
    def __init__(self, remote: RemoteFolder, files: Any) -> None:
        self._remote, self._files = remote, files

    def read(self, name: str, limit: int) -> bytes:
        size_bytes = self._size(name)
        if size_bytes > limit:
            why = f"{name} is longer than {limit} bytes"
            raise TransferError(Trouble.WRONG_SIZE, why)
        if size_bytes == 0:
            return b""
        with explained(self._remote):
            found: bytes = self._files.cat_file(self._remote.file(name), start=0, end=size_bytes)
        return found

    def stream(self, name: str, start: int, size_bytes: int) -> Stream:
        if (found := self._size(name)) != size_bytes:
            raise wrong_size(name, size_bytes, str(found))
        return Stream(start, self._chunks(name, start, size_bytes))

    def _size(self, name: str) -> int:
        with explained(self._remote):
            info = self._files.info(self._remote.file(name))
        if info.get("type") != "file":
            raise TransferError(Trouble.MISSING, f"{name} is no file")
        return int(info["size"])

    def _chunks(self, name: str, start: int, size_bytes: int) -> Iterator[bytes]:
        batch_bytes = RANGES_AT_ONCE * RANGE_BYTES
        for begin in range(start, size_bytes, batch_bytes):
            end = min(begin + batch_bytes, size_bytes)
            starts = list(range(begin, end, RANGE_BYTES))
            ends = [min(place + RANGE_BYTES, end) for place in starts]
            paths = [self._remote.file(name)] * len(starts)
            with explained(self._remote):
                pieces = self._files.cat_ranges(paths, starts, ends, on_error="raise")
            for piece, first, last in zip(pieces, starts, ends, strict=True):
                if len(piece) != last - first:
                    raise TransferError(Trouble.PASSING, f"{name} broke off within a range")
                yield piece
