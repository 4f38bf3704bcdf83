"""vllm_rvec.checkpoint.download: continued, checked, and never half under its own name."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import blake3
import pytest

from tests.support.web import Web, run_web
from vllm_rvec.checkpoint import download
from vllm_rvec.checkpoint.cache import Blob, Cache
from vllm_rvec.checkpoint.download import Download, Progress
from vllm_rvec.checkpoint.remote import RemoteFolder
from vllm_rvec.checkpoint.transport import open_source
from vllm_rvec.errors import FetchError, VectorCorruptError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAME = "v.safetensors"
PATH = f"/v/{NAME}"
DATA = os.urandom(3 << 20)
BLOB = Blob(blake3.blake3(DATA).hexdigest(), len(DATA))


@pytest.fixture
def web() -> Iterator[Web]:
    """A server with one file."""
    with run_web() as found:
        found.files[PATH] = DATA
        yield found


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """An empty one; and no pauses between tries."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(download, "PAUSES_SECONDS", (0.0, 0.0, 0.0))
    return Cache()


class Run:
    """One process's download, with what it told."""

    def __init__(self, web: Web, cache: Cache) -> None:
        self.lines: list[str] = []
        self.reports: list[tuple[int, int]] = []
        remote = RemoteFolder.parse(f"{web.url}/v", "vector.json")
        progress = Progress(len(DATA), lambda done, total: self.reports.append((done, total)))
        self.download = Download(remote, open_source(remote), cache, progress, self.lines.append)

    def fetch(self, blob: Blob = BLOB) -> None:
        """Have the file in the cache."""
        self.download.fetch(NAME, blob)


def begin(cache: Cache, data: bytes) -> None:
    """Leave what a killed process leaves."""
    cache.partial(BLOB).parent.mkdir(parents=True, exist_ok=True)
    cache.partial(BLOB).write_bytes(data)


def is_whole(cache: Cache) -> bool:
    return cache.blob(BLOB).read_bytes() == DATA and not cache.partial(BLOB).exists()


def test_a_file_comes_with_its_progress(web: Web, cache: Cache) -> None:
    """Counted to the end, by one request."""
    run = Run(web, cache)
    run.fetch()
    assert is_whole(cache)
    assert run.reports[-1] == (len(DATA), len(DATA))
    assert run.reports == sorted(run.reports)
    assert len(web.requests) == 1
    assert not run.lines


def test_a_file_that_is_here_is_not_asked_for(web: Web, cache: Cache) -> None:
    """And it counts as done."""
    Run(web, cache).fetch()
    run = Run(web, cache)
    run.fetch()
    assert len(web.requests) == 1
    assert run.reports == [(len(DATA), len(DATA))]


def test_a_beginning_is_continued(web: Web, cache: Cache) -> None:
    """Only the rest comes over the wire."""
    begin(cache, DATA[:2_000_000])
    Run(web, cache).fetch()
    assert is_whole(cache)
    assert [request.begins for request in web.requests] == [2_000_000]
    assert web.sent_bytes[PATH] == len(DATA) - 2_000_000


def test_all_but_the_name_needs_no_request(web: Web, cache: Cache) -> None:
    """Killed between the last byte and the renaming."""
    begin(cache, DATA)
    Run(web, cache).fetch()
    assert is_whole(cache)
    assert not web.requests


def test_a_beginning_that_does_not_fit_is_fetched_anew(web: Web, cache: Cache) -> None:
    """After a power cut, say; and it is told."""
    begin(cache, bytes(2_000_000))
    run = Run(web, cache)
    run.fetch()
    assert is_whole(cache)
    assert [request.begins for request in web.requests] == [2_000_000, 0]
    assert any("from the beginning" in line for line in run.lines)
    assert run.reports[-1] == (len(DATA), len(DATA))


def test_more_than_the_file_is_no_beginning(web: Web, cache: Cache) -> None:
    """It is thrown away."""
    begin(cache, DATA + b"x")
    Run(web, cache).fetch()
    assert is_whole(cache)


def test_a_server_without_ranges_gives_it_from_the_beginning(web: Web, cache: Cache) -> None:
    """And it is told."""
    web.has_ranges = False
    begin(cache, DATA[:2_000_000])
    run = Run(web, cache)
    run.fetch()
    assert is_whole(cache)
    assert run.lines == [f"{NAME}: the server gives no parts of files; from the beginning"]
    assert run.reports[-1] == (len(DATA), len(DATA))


def test_wrong_bytes_are_not_kept(web: Web, cache: Cache) -> None:
    """Of the right number; expected and found are named."""
    wrong = bytes([DATA[0] ^ 1]) + DATA[1:]
    web.files[PATH] = wrong
    with pytest.raises(VectorCorruptError) as caught:
        Run(web, cache).fetch()
    assert f"expected {BLOB.blake3}, found {blake3.blake3(wrong).hexdigest()}" in caught.value.why
    assert list((cache.root / "blobs").iterdir()) == []
    assert len(web.requests) == 1


def test_another_size_keeps_the_beginning(web: Web, cache: Cache) -> None:
    """A page of some proxy must not cost what has come already."""
    begin(cache, DATA[:2_000_000])
    web.files[PATH] = b"please log in"
    web.has_ranges = False
    with pytest.raises(VectorCorruptError, match=f"expected {len(DATA)} bytes, found 13"):
        Run(web, cache).fetch()
    assert cache.partial(BLOB).stat().st_size == 2_000_000


def test_a_connection_that_breaks_is_taken_up_again(web: Web, cache: Cache) -> None:
    """More often than there are tries, as long as each brings a megabyte."""
    web.breaks_after = [1_100_000, 1_100_000, 0, 0]
    run = Run(web, cache)
    run.fetch()
    assert is_whole(cache)
    # What a broken connection had under way may be lost, a buffer's worth; not what had come.
    assert 0 <= web.sent_bytes[PATH] - len(DATA) < 500_000
    assert sum("trying again" in line for line in run.lines) == 4


@pytest.mark.parametrize("has_ranges", [True, False])
def test_a_server_that_never_gets_on_is_given_up(web: Web, cache: Cache, has_ranges: bool) -> None:
    """When three tries after a break brought no megabyte more; what has come stays."""
    web.has_ranges = has_ranges
    web.breaks_after = [1_500_000] + [1000 if has_ranges else 1_500_000] * 50
    with pytest.raises(FetchError, match="can't be fetched") as caught:
        Run(web, cache).fetch()
    assert len(web.requests) == 4
    assert 1_400_000 < cache.partial(BLOB).stat().st_size < 1_600_000
    assert not cache.blob(BLOB).exists()
    assert "what is here is kept" in caught.value.fix


def test_a_missing_file_is_the_vectors_fault(web: Web, cache: Cache) -> None:
    """Asking again would not bring it."""
    web.files.clear()
    with pytest.raises(VectorCorruptError, match="no such file"):
        Run(web, cache).fetch()
    assert len(web.requests) == 1


def test_a_file_that_was_damaged_here_is_fetched_again(web: Web, cache: Cache) -> None:
    """Its name is its digest: another vector that asks for it is not given something else."""
    Run(web, cache).fetch()
    blob = cache.blob(BLOB)
    blob.chmod(0o644)
    blob.write_bytes(bytes(len(DATA)))
    run = Run(web, cache)
    run.fetch()
    assert is_whole(cache)
    assert any("damaged" in line for line in run.lines)


def test_an_empty_file_needs_no_request(web: Web, cache: Cache) -> None:
    """No server can give a range of nothing."""
    empty = Blob(blake3.blake3(b"").hexdigest(), 0)
    Run(web, cache).fetch(empty)
    assert cache.has(empty)
    assert not web.requests
