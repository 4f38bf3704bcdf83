"""What reading a file elsewhere is, and the ways in which it fails, in our words.

The sources themselves stand in `transport`.
"""

from __future__ import annotations

from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, Protocol

from vllm_rvec.checkpoint.hub import harmless

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_rvec.checkpoint.remote import RemoteFolder

__all__ = ["Source", "Stream", "TransferError", "Trouble", "explained", "wrong_size"]

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

    def __init__(
        self, trouble: Trouble, why: str, fix: str = NETWORK, status: int | None = None
    ) -> None:
        super().__init__(why)
        self.trouble, self.why, self.fix, self.status = trouble, why, fix, status


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


def wrong_size(name: str, expected: int, found: str) -> TransferError:
    """Say that a file is not as long as it must be."""
    why = f"{name}: expected {expected} bytes, found {found}"
    return TransferError(Trouble.WRONG_SIZE, why)


@contextmanager
def explained(remote: RemoteFolder) -> Iterator[None]:
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
        return TransferError(trouble, f"the server answered {status}", status=status)
    passing = (OSError, aiohttp.ClientConnectionError, aiohttp.ClientPayloadError)
    is_passing = isinstance(exc, (TimeoutError, *passing))
    return TransferError(Trouble.PASSING if is_passing else Trouble.REFUSED, said)
