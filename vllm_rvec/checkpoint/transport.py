"""Read the files of a folder elsewhere, through fsspec: bounded, checked, and in our words.

A server is not trusted: nothing is read beyond what was asked for, and nothing is followed to where
the user's URL would not be allowed to lead. So https is read as one stream a file (fsspec takes an
answer to a range whole, whatever its size); object stores are read in ranges, several at once.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from vllm_rvec.checkpoint.hub import harmless
from vllm_rvec.checkpoint.remote import OBJECT_STORES, RemoteFolder, is_loopback
from vllm_rvec.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Source", "Stream", "TransferError", "Trouble", "open_source"]

CONNECT_SECONDS = 30
SILENCE_SECONDS = 60
"""A server that sends nothing for so long is given up."""
CHUNK_BYTES = 1 << 20
RANGE_BYTES = 8 << 20
RANGES_AT_ONCE = 8
"""Of an object; together the most that is held in memory."""

CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")

PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}
CREDENTIALS = {
    "s3": "log in as for the aws command (AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY); for a public bucket set FSSPEC_S3_ANON=true",
    "gs": "log in with `gcloud auth application-default login`, or set "
    "GOOGLE_APPLICATION_CREDENTIALS; for a public bucket set FSSPEC_GS_TOKEN=anon",
    "https": "check the URL, and name and password for the host in ~/.netrc",
}
NETWORK = "check the URL, the network and the proxy, then run it again: what is here is kept"


class Trouble(Enum):
    """How a transfer can fail."""

    MISSING = "there is no such file"
    REFUSED = "asking again will not help"
    PASSING = "asking again may help"
    WRONG_SIZE = "the file is not as long as it must be"


class TransferError(Exception):
    """A file was not read; the text says why, without any secret."""

    def __init__(self, trouble: Trouble, why: str, fix: str = NETWORK) -> None:
        super().__init__(why)
        self.trouble, self.why, self.fix = trouble, why, fix


class Stream(NamedTuple):
    """A file's bytes, from some place on."""

    start: int
    """Where they begin: 0 where the server gives no other beginning."""
    chunks: Iterator[bytes]
    """Raises TransferError where they end too soon, or don't."""


class Source(Protocol):
    """Where files are read from."""

    def read(self, name: str, limit: int) -> bytes:
        """Return a whole file, if it is no longer than the limit.

        Raises:
            TransferError: It is, or can't be read.
        """

    def stream(self, name: str, start: int, size_bytes: int) -> Stream:
        """Begin to read a file of a known size.

        Raises:
            TransferError: It is of another size, or can't be read.
        """


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
        with _explained(remote):
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
        with _explained(self._remote):
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
            with _explained(self._remote):
                file = self._open(name, start)
        except TransferError as exc:
            if start == 0 or not exc.why.startswith("the server answered 416"):
                raise
            return self.stream(name, 0, size_bytes)  # the file ends before that place
        begins, total = self._extent(file.r, start)
        if total not in {None, size_bytes}:
            file.close()
            raise _wrong_size(name, size_bytes, str(total))
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
                raise _wrong_size(name, size_bytes, "more")
            yield chunk
        if done < size_bytes:
            raise TransferError(Trouble.PASSING, f"{name} broke off after {done} bytes")

    def _chunks(self, file: Any) -> Iterator[bytes]:
        try:
            while True:
                with _explained(self._remote):
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
        with _explained(self._remote):
            found: bytes = self._files.cat_file(self._remote.file(name), start=0, end=size_bytes)
        return found

    def stream(self, name: str, start: int, size_bytes: int) -> Stream:
        if (found := self._size(name)) != size_bytes:
            raise _wrong_size(name, size_bytes, str(found))
        return Stream(start, self._chunks(name, start, size_bytes))

    def _size(self, name: str) -> int:
        with _explained(self._remote):
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
            with _explained(self._remote):
                pieces = self._files.cat_ranges(paths, starts, ends, on_error="raise")
            for piece, first, last in zip(pieces, starts, ends, strict=True):
                if len(piece) != last - first:
                    raise TransferError(Trouble.PASSING, f"{name} broke off within a range")
                yield piece


def _wrong_size(name: str, expected: int, found: str) -> TransferError:
    why = f"{name}: expected {expected} bytes, found {found}"
    return TransferError(Trouble.WRONG_SIZE, why)


@contextmanager
def _explained(remote: RemoteFolder) -> Iterator[None]:
    """Turn what a transport raises into a TransferError."""
    try:
        yield
    except (TransferError, ImportError):
        raise
    except Exception as exc:  # noqa: BLE001 - aiohttp, botocore and google have no common errors
        # No cause: its text may show the URL with its password.
        raise _explain(exc, remote) from None


def _explain(exc: Exception, remote: RemoteFolder) -> TransferError:
    import aiohttp  # noqa: PLC0415 - it is there by now

    # gcsfs has a code; aiohttp's is deprecated.
    status = getattr(
        exc, "status" if isinstance(exc, aiohttp.ClientResponseError) else "code", None
    )
    said = harmless(f"{type(exc).__name__}: {exc}", *remote.secrets)
    if isinstance(exc, FileNotFoundError) or status in {404, 410}:
        return TransferError(Trouble.MISSING, "there is no such file", "check the URL")
    log_in = CREDENTIALS.get(remote.scheme, CREDENTIALS["https"])
    if isinstance(exc, PermissionError) or status in {401, 403} or "Credentials" in said:
        return TransferError(Trouble.REFUSED, f"no access: {said}", log_in)
    if isinstance(exc, aiohttp.ClientSSLError):
        fix = "if the certificate's authority is your own, name its file in SSL_CERT_FILE"
        return TransferError(Trouble.REFUSED, said, fix)
    if isinstance(status, int) and status >= 400:
        is_passing = status in {408, 425, 429} or status >= 500
        trouble = Trouble.PASSING if is_passing else Trouble.REFUSED
        return TransferError(trouble, f"the server answered {status}")
    passing = (OSError, aiohttp.ClientConnectionError, aiohttp.ClientPayloadError)
    is_passing = isinstance(exc, (TimeoutError, *passing))
    return TransferError(Trouble.PASSING if is_passing else Trouble.REFUSED, said)
