"""A web server for files, which counts what it is asked and can be told to misbehave."""

from __future__ import annotations

import re
import ssl
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = ["Request", "Web", "run_web"]

PIECE_BYTES = 1 << 14


@dataclass(frozen=True, slots=True)
class Request:
    """One request."""

    path: str
    """With its query."""
    begins: int
    """Where the range begins that was asked for; 0 without one."""
    authorization: str | None


@dataclass(slots=True)
class Web:
    """What the server holds, what it was asked, and what it shall do wrong."""

    url: str = ""
    """Its address, without a slash at the end."""
    files: dict[str, bytes] = field(default_factory=dict)
    """By path, with a slash at its beginning."""
    requests: list[Request] = field(default_factory=list)
    sent_bytes: dict[str, int] = field(default_factory=dict)
    """By path, how much of its bodies was handed to the system."""
    has_ranges: bool = True
    breaks_after: list[int] = field(default_factory=list)
    """For each of the next requests for a shard, after how many bytes the server hangs up."""
    pause_seconds: float = 0.0
    """Between pieces of a shard."""
    stall: threading.Event | None = None
    """If there is one, a shard's bodies stop in their middle until it is set."""
    special: dict[str, Callable[[BaseHTTPRequestHandler], None]] = field(default_factory=dict)
    """Answers by path, instead of the right one."""

    def add_folder(self, path: str, folder: Path) -> str:
        """Serve a folder's files below a path; return its URL."""
        self.files |= {f"{path}/{file.name}": file.read_bytes() for file in folder.iterdir()}
        return f"{self.url}{path}"

    def asked(self, name: str) -> list[Request]:
        """Return the requests for files of a name."""
        return [r for r in self.requests if urlsplit(r.path).path.endswith(f"/{name}")]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    web: Web

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        begins = int(match[1]) if match else 0
        self.web.requests.append(Request(self.path, begins, self.headers.get("Authorization")))
        # A client that goes away is no error of the server's.
        with suppress(ConnectionError, ssl.SSLError):
            if path in self.web.special:
                self.web.special[path](self)
            elif path not in self.web.files:
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()
            else:
                self._send(path, begins if self.web.has_ranges else 0)

    def _send(self, path: str, begins: int) -> None:
        data = self.web.files[path]
        if begins >= len(data) > 0:
            self.send_response(416)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if begins else 200)
        if begins:
            self.send_header("Content-Range", f"bytes {begins}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - begins))
        self.end_headers()
        self._send_body(path, data[begins:])

    def _send_body(self, path: str, body: bytes) -> None:
        is_shard = path.endswith(".safetensors")
        end = len(body)
        if is_shard and self.web.breaks_after:
            end = min(end, self.web.breaks_after.pop(0))
        for start in range(0, end, PIECE_BYTES):
            if is_shard and self.web.stall is not None and start >= end // 2:
                self.web.stall.wait(60)
            piece = body[start : min(start + PIECE_BYTES, end)]
            self.wfile.write(piece)
            self.web.sent_bytes[path] = self.web.sent_bytes.get(path, 0) + len(piece)
            if is_shard:
                time.sleep(self.web.pause_seconds)
        self.close_connection = end < len(body)


@contextmanager
def run_web(certificate: tuple[Path, Path] | None = None) -> Iterator[Web]:
    """Run a server on the loopback while the block runs.

    Args:
        certificate: Files of a certificate and its key; with them it speaks https.
    """
    web = Web()
    handler = type("Handler", (_Handler,), {"web": web})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    scheme = "http"
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        scheme = "https"
    web.url = f"{scheme}://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield web
    finally:
        if web.stall is not None:
            web.stall.set()
        server.shutdown()
        server.server_close()
        thread.join()
