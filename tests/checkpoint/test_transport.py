"""vllm_rvec.checkpoint.transport: servers that misbehave get little, and one clear error."""

from __future__ import annotations

import gzip
import time
from typing import TYPE_CHECKING

import pytest

from tests.support.web import Web, run_web
from vllm_rvec.checkpoint import transport
from vllm_rvec.checkpoint.remote import RemoteFolder
from vllm_rvec.checkpoint.transfer import Source, TransferError, Trouble
from vllm_rvec.checkpoint.transport import open_source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from http.server import BaseHTTPRequestHandler

    Answer = Callable[[BaseHTTPRequestHandler], None]

NAME = "v.safetensors"
DATA = bytes(range(256)) * 400


@pytest.fixture
def web() -> Iterator[Web]:
    """A server with one file."""
    with run_web() as found:
        found.files[f"/v/{NAME}"] = DATA
        yield found


def source_of(web: Web, path: str = "/v") -> Source:
    return open_source(RemoteFolder.parse(web.url + path, "vector.json"))


def received(web: Web, start: int = 0, size: int = len(DATA)) -> tuple[int, bytes]:
    stream = source_of(web).stream(NAME, start, size)
    return stream.start, b"".join(stream.chunks)


def failure(read: Callable[[], object]) -> TransferError:
    with pytest.raises(TransferError) as caught:
        read()
    return caught.value


def answer(status: int = 200, body: bytes = b"", **headers: str) -> Answer:
    """Make an answer that says and sends exactly this, and hangs up."""

    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.write(body)
        handler.close_connection = True

    return send


def endless(handler: BaseHTTPRequestHandler) -> None:
    """Send for as long as anybody reads."""
    handler.send_response(200)
    handler.end_headers()
    handler.close_connection = True
    while True:
        handler.wfile.write(bytes(1 << 16))


def test_a_file_comes_whole_or_from_some_place_on(web: Web) -> None:
    """The place is asked for, not read over."""
    assert received(web) == (0, DATA)
    assert received(web, 1000) == (1000, DATA[1000:])
    assert [request.begins for request in web.requests] == [0, 1000]


def test_a_server_without_ranges_begins_at_the_beginning(web: Web) -> None:
    """And that is told, not taken for the rest."""
    web.has_ranges = False
    assert received(web, 1000) == (0, DATA)


def test_a_file_that_ends_before_that_place_is_of_another_size(web: Web) -> None:
    """The server's 416 is no riddle for the user."""
    error = failure(lambda: received(web, len(DATA) + 5, len(DATA) + 9))
    assert error.trouble is Trouble.WRONG_SIZE
    assert f"expected {len(DATA) + 9} bytes, found {len(DATA)}" in error.why


def test_another_length_is_seen_before_anything_is_read(web: Web) -> None:
    """Expected and found are named."""
    error = failure(lambda: source_of(web).stream(NAME, 0, 7))
    assert error.trouble is Trouble.WRONG_SIZE
    assert f"expected 7 bytes, found {len(DATA)}" in error.why


def test_an_endless_body_is_cut(web: Web) -> None:
    """Of a shard, which has its size, and of a manifest, which has a limit."""
    web.special[f"/v/{NAME}"] = endless
    stream = source_of(web).stream(NAME, 0, 1 << 20)
    got = 0

    def drain() -> None:
        nonlocal got
        for chunk in stream.chunks:
            got += len(chunk)

    assert failure(drain).trouble is Trouble.WRONG_SIZE
    assert got <= 1 << 20
    error = failure(lambda: source_of(web).read(NAME, 1 << 20))
    assert "longer than 1048576 bytes" in error.why


def test_a_body_that_breaks_off_may_be_asked_for_again(web: Web) -> None:
    """With and without a length that says so."""
    web.breaks_after = [5000]
    assert failure(lambda: received(web)).trouble is Trouble.PASSING
    web.special[f"/v/{NAME}"] = answer(body=DATA[:-1])
    error = failure(lambda: received(web))
    assert error.trouble is Trouble.PASSING
    assert f"broke off after {len(DATA) - 1} bytes" in error.why


@pytest.mark.parametrize(
    ("location", "why"),
    [
        ("file:///etc/passwd", "NonHttpUrlRedirect"),
        ("http://127.0.0.1:{port}/loop", "TooManyRedirects"),
        ("http://0.0.0.0:{port}/elsewhere", "leads on to http://0.0.0.0"),
    ],
)
def test_a_redirect_leads_nowhere_that_a_url_may_not(web: Web, location: str, why: str) -> None:
    """No local file, no circle, no unprotected host."""
    where = location.format(port=web.url.rpartition(":")[2])
    web.special[f"/v/{NAME}"] = answer(302, Location=where, Content_Length="0")
    web.special["/loop"] = answer(302, Location="/loop", Content_Length="0")
    web.files["/elsewhere"] = DATA
    error = failure(lambda: received(web))
    assert error.trouble is Trouble.REFUSED
    assert why in error.why


def test_a_redirect_on_the_same_terms_is_followed(web: Web) -> None:
    """As of stores that sign an address for each request."""
    web.special[f"/v/{NAME}"] = answer(302, Location="/store/x", Content_Length="0")
    web.files["/store/x"] = DATA
    assert received(web) == (0, DATA)


def test_a_compressed_body_is_refused(web: Web) -> None:
    """A small file could become any amount, and no range of it would mean anything."""
    bomb = gzip.compress(bytes(1 << 20))
    web.special[f"/v/{NAME}"] = answer(body=bomb, Content_Encoding="gzip")
    error = failure(lambda: received(web, 0, 1 << 20))
    assert error.trouble is Trouble.REFUSED
    assert "compressed (gzip)" in error.why


@pytest.mark.parametrize(
    "content_range", ["", "bytes 0-99/100", f"bytes 1001-{len(DATA) - 1}/{len(DATA)}", "items 1"]
)
def test_another_range_than_asked_for_is_refused(web: Web, content_range: str) -> None:
    """Its bytes would be put in the wrong place."""
    web.special[f"/v/{NAME}"] = answer(206, DATA[1000:], Content_Range=content_range)
    error = failure(lambda: received(web, 1000))
    assert error.trouble is Trouble.REFUSED
    assert "another range" in error.why


@pytest.mark.parametrize(
    ("status", "trouble", "why"),
    [
        (404, Trouble.MISSING, "no such file"),
        (410, Trouble.MISSING, "no such file"),
        (401, Trouble.REFUSED, "no access"),
        (403, Trouble.REFUSED, "no access"),
        (418, Trouble.REFUSED, "answered 418"),
        (204, Trouble.REFUSED, "answered 204"),
        (429, Trouble.PASSING, "answered 429"),
        (500, Trouble.PASSING, "answered 500"),
        (503, Trouble.PASSING, "answered 503"),
    ],
)
def test_a_status_says_whether_to_ask_again(
    web: Web, status: int, trouble: Trouble, why: str
) -> None:
    """And where access is missing, how to log in."""
    web.special[f"/v/{NAME}"] = answer(status)
    error = failure(lambda: received(web))
    assert error.trouble is trouble
    assert why in error.why
    if status in {401, 403}:
        assert "netrc" in error.fix


def test_a_silent_server_is_given_up(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a time, in the middle of a body too."""
    monkeypatch.setattr(transport, "SILENCE_SECONDS", 0.2)

    def slow(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(DATA)))
        handler.end_headers()
        handler.wfile.write(DATA[:100])
        time.sleep(2)

    web.special[f"/v/{NAME}"] = slow
    error = failure(lambda: received(web))
    assert error.trouble is Trouble.PASSING
    assert "Timeout" in error.why


def test_nobody_listens() -> None:
    """It may be there another time."""
    source = open_source(RemoteFolder.parse("http://127.0.0.1:9/v", "vector.json"))
    assert failure(lambda: source.read("vector.json", 9)).trouble is Trouble.PASSING


def test_name_and_password_are_sent_and_never_told(web: Web) -> None:
    """Not even where the server's own address for the file repeats them."""
    web.url = web.url.replace("//", "//me:sesame-7@")
    assert received(web) == (0, DATA)
    assert web.requests[0].authorization == "Basic bWU6c2VzYW1lLTc="
    web.special[f"/v/{NAME}"] = answer(418)
    web.special["/v/teapot"] = answer(
        302, Location="file:///sesame-7?X-Amz-Signature=c0ffee77", Content_Length="0"
    )
    for name in (NAME, "teapot"):
        source = open_source(RemoteFolder.parse(f"{web.url}/v?sig=c0ffee77", "vector.json"))
        error = failure(lambda source=source, name=name: source.read(name, 9))  # type: ignore[misc]
        assert "sesame" not in error.why + error.fix
        assert "c0ffee" not in error.why + error.fix
