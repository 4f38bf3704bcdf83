"""vllm_rvec.checkpoint.transport with the real clients of S3 and Google's store."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import blake3
import pytest

from tests.support.object_stores import BUCKET, SECRET, run_gs, run_s3
from vllm_rvec.checkpoint import transport
from vllm_rvec.checkpoint.cache import Blob, Cache
from vllm_rvec.checkpoint.download import Download, Progress
from vllm_rvec.checkpoint.remote import RemoteFolder
from vllm_rvec.checkpoint.transfer import Source, TransferError, Trouble
from vllm_rvec.checkpoint.transport import open_source
from vllm_rvec.errors import VectorCorruptError
from vllm_rvec.vector import VectorReader
from vllm_rvec.vector.fetching import locate_vector
from vllm_rvec.vector.verification import verify

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAME = "v.safetensors"
DATA = os.urandom(300_000)
BLOB = Blob(blake3.blake3(DATA).hexdigest(), len(DATA))


@pytest.fixture(scope="module", params=["s3", "gs"])
def store(request: pytest.FixtureRequest) -> Iterator[tuple[str, Any]]:
    """A scheme, and a client for a store of that kind with one file."""
    scheme = str(request.param)
    with run_s3() if scheme == "s3" else run_gs() as files:
        files.pipe_file(f"{BUCKET}/v/{NAME}", DATA)
        yield scheme, files


@pytest.fixture
def source(store: tuple[str, Any], monkeypatch: pytest.MonkeyPatch) -> Source:
    """The folder of that file, read in small ranges."""
    monkeypatch.setattr(transport, "RANGE_BYTES", 30_000)
    return open_source(remote(store))


def remote(store: tuple[str, Any], path: str = "v") -> RemoteFolder:
    return RemoteFolder.parse(f"{store[0]}://{BUCKET}/{path}/", "vector.json")


def test_a_file_comes_in_ranges(source: Source) -> None:
    """From any place on; whole where it is small."""
    for start in (0, 1, 299_999, 240_000):
        stream = source.stream(NAME, start, len(DATA))
        assert stream.start == start
        assert b"".join(stream.chunks) == DATA[start:]
    assert source.read(NAME, len(DATA)) == DATA


def test_sizes_are_compared_before_anything_is_read(source: Source) -> None:
    """Expected and found are named."""
    with pytest.raises(TransferError, match=f"expected 5 bytes, found {len(DATA)}") as caught:
        source.stream(NAME, 0, 5)
    assert caught.value.trouble is Trouble.WRONG_SIZE
    with pytest.raises(TransferError, match="longer than 5 bytes"):
        source.read(NAME, 5)


def test_what_is_not_there_is_missing(store: tuple[str, Any], source: Source) -> None:
    """A file, a folder, a bucket."""
    for folder, name in (("v", "none"), ("none", NAME), ("", "v")):
        with pytest.raises(TransferError) as caught:
            open_source(remote(store, folder)).read(name, 10)
        assert caught.value.trouble is Trouble.MISSING, (folder, name)
    elsewhere = open_source(RemoteFolder.parse(f"{store[0]}://no-such-bucket", "vector.json"))
    with pytest.raises(TransferError) as caught:
        elsewhere.read(NAME, 10)
    assert caught.value.trouble is Trouble.MISSING


def test_a_beginning_is_continued(
    store: tuple[str, Any], source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As over https."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache, reports = Cache(), list[int]()
    cache.partial(BLOB).parent.mkdir(parents=True)
    cache.partial(BLOB).write_bytes(DATA[:100_001])
    progress = Progress(len(DATA), lambda done, _: reports.append(done))
    Download(remote(store), source, cache, progress, lambda _: None).fetch(NAME, BLOB)
    assert cache.blob(BLOB).read_bytes() == DATA
    assert reports[0] == 100_001
    assert reports[1] == 130_001


def test_a_vector_is_fetched(
    store: tuple[str, Any], vector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last byte; and offline from the cache; and a damaged one is not kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    scheme, files = store
    for path in vector.iterdir():
        files.pipe_file(f"{BUCKET}/team/{path.name}", path.read_bytes())
    located = locate_vector(f"{scheme}://{BUCKET}/team")
    verify(VectorReader(located.folder))
    assert located.id == f"{scheme}://{BUCKET}/team/"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert locate_vector(f"{scheme}://{BUCKET}/team") == located
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    data = bytearray((vector / "vector.safetensors").read_bytes())
    data[-1] ^= 1
    files.pipe_file(f"{BUCKET}/team/vector.safetensors", bytes(data))
    with pytest.raises(VectorCorruptError, match="expected"):
        locate_vector(f"{scheme}://{BUCKET}/team")


# An emulator of Google's store asks for none.
@pytest.mark.parametrize("store", ["s3"], indirect=True, scope="module")
def test_without_credentials_the_message_says_how_to_log_in(
    store: tuple[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And for a public bucket, how not to."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(TransferError, match="no access") as caught:
        open_source(remote(store)).read(NAME, len(DATA))
    assert "AWS_PROFILE" in caught.value.fix
    assert "FSSPEC_S3_ANON=true" in caught.value.fix
    assert SECRET not in str(caught.value)
