"""Folders elsewhere, by URL: what a reference names, and what of it may be shown.

How their files are read stands in `transport`. Imports no torch.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from vllm_rvec.errors import ConfigError, printable

if TYPE_CHECKING:
    from urllib.parse import SplitResult

__all__ = ["OBJECT_STORES", "RemoteFolder", "is_loopback", "is_url", "shown"]

OBJECT_STORES = ("s3", "gs")
"""Schemes of stores that give any range of an object."""

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
PIN = "#blake3="
DIGEST = re.compile(r"[0-9a-f]{64}")
SHORTEST_SECRET = 6
"""Shorter values of a query sign nothing, and may stand anywhere in a text."""

FORMS = "s3://bucket/path, gs://bucket/path or https://host/path"


@dataclass(frozen=True, slots=True)
class RemoteFolder:
    """A folder that a URL names, perhaps pinned to what it must hold."""

    scheme: str
    """`s3`, `gs`, `https` or `http`."""
    base: str = field(repr=False)
    """The URL without a slash at its end, as it was given; may hold a password."""
    query: str = field(default="", repr=False)
    """What follows the name of each file, with its question mark; may sign it."""
    pin: str | None = None
    """blake3 of what the folder must hold; None takes what is there."""

    @classmethod
    def parse(cls, reference: str, first: str) -> RemoteFolder:
        """Read a URL, with `#blake3=DIGEST` after it for a pin.

        Args:
            reference: What the user wrote.
            first: The file that makes the folder what it is; the URL may be this file's.

        Raises:
            ConfigError: Not such a URL, or one that nothing protects on its way.
        """
        location, hash_mark, pin = reference.partition(PIN)
        scheme = location.partition("://")[0].lower()
        if not location.isprintable() or " " in location:
            raise _malformed(reference, "it holds spaces or characters that are not printable")
        if hash_mark and not DIGEST.fullmatch(pin):
            raise _malformed(reference, "after #blake3= belong 64 hexadecimal digits")
        pinned = pin if hash_mark else None
        if scheme in OBJECT_STORES:
            path = _without(location.partition("://")[2], first)
            if not path:
                raise _malformed(reference, "it names no bucket")
            return cls(scheme, f"{scheme}://{path}", pin=pinned)
        if scheme not in {"https", "http"}:
            raise _malformed(reference, f"{scheme}:// is not read here")
        parts = _split(location, reference)
        if scheme == "http" and pinned is None and not is_loopback(parts.hostname):
            raise ConfigError(
                f"{shown(reference)} is not protected on its way",
                why="over http:// anybody in between can change what is fetched",
                fix=f"use https://, or pin the content: {PIN}DIGEST after the URL",
            )
        path = quote(_without(parts.path, first), safe="/%:@!$&'()*+,;=~")
        query = f"?{parts.query}" if parts.query else ""
        return cls(scheme, f"{scheme}://{parts.netloc}{path}", query, pinned)

    def __str__(self) -> str:
        return shown(self.base) + "/"

    @property
    def key(self) -> str:
        """A name for this URL; the password is no part of it."""
        authority, slash, path = self.base.partition("://")[2].partition("/")
        if self.scheme not in OBJECT_STORES:
            authority = authority.rpartition("@")[2]
        text = f"{self.scheme}://{authority}{slash}{path}{self.query}"
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @property
    def secrets(self) -> tuple[str, ...]:
        """What no message may show of it."""
        if self.scheme in OBJECT_STORES:
            return ()
        parts = urlsplit(self.base)
        values = [value for _, value in parse_qsl(self.query[1:])]
        values += [self.query, unquote(parts.password or "")]
        if "@" in parts.netloc:
            values.append(parts.netloc.rpartition("@")[0])
        return tuple(value for value in values if len(value) >= SHORTEST_SECRET)

    def file(self, name: str) -> str:
        """Return the URL of one of its files."""
        if self.scheme in OBJECT_STORES:
            return f"{self.base}/{name}"
        return f"{self.base}/{quote(name)}{self.query}"


def is_url(reference: str) -> bool:
    """Tell whether a reference is a URL, and neither folder nor Hub id.

    >>> [is_url(text) for text in ("https://host/v", "s3://bucket/v", "owner/name", "/a://b")]
    [True, True, False, False]
    """
    return URL.match(reference) is not None


def shown(reference: str) -> str:
    """Return a reference as it may be shown: a URL without password and query.

    >>> shown("https://me:sesame@host:8443/v/?X-Amz-Signature=0123#blake3=45")
    'https://host:8443/v/'
    >>> shown("owner/name@main")
    'owner/name@main'
    """
    if (match := URL.match(reference)) is None:
        return reference
    scheme, rest = match[1].lower(), reference[match.end() :]
    if scheme not in OBJECT_STORES:
        rest = re.split(r"[?#]", rest, maxsplit=1)[0]
        authority, slash, path = rest.partition("/")
        rest = authority.rpartition("@")[2] + slash + path
    return printable(f"{scheme}://{rest.partition(PIN)[0]}")


def is_loopback(host: str | None) -> bool:
    """Tell whether a host's name or address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def _split(location: str, reference: str) -> SplitResult:
    try:
        parts = urlsplit(location)
        _ = parts.port  # raises where it is none
    except ValueError as exc:
        raise _malformed(reference, str(exc)) from None
    if not parts.hostname:
        raise _malformed(reference, "it names no host")
    if parts.fragment:
        raise _malformed(reference, f"what follows # is no pin, {PIN}DIGEST")
    return parts


def _without(path: str, first: str) -> str:
    """Take the slashes and the first file's name off a path's end."""
    path = path.rstrip("/")
    folder, _, name = path.rpartition("/")
    return folder.rstrip("/") if name == first and (folder or path[:1] == "/") else path


def _malformed(reference: str, why: str) -> ConfigError:
    return ConfigError(
        f"{shown(reference)} is no URL that can be fetched from",
        why=why,
        fix=f"give {FORMS}, the folder that holds the files; {PIN}DIGEST after it pins it",
    )
