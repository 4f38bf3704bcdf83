"""vllm_rvec.checkpoint.cache: files by digest, and folders made of them, whole or not at all."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import blake3
import pytest

from vllm_rvec.checkpoint.cache import Blob, Cache
from vllm_rvec.errors import ConfigError

DIGEST = "d" * 64


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """An empty one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return Cache()


def keep(cache: Cache, data: bytes) -> Blob:
    """Put a file in as a finished download does."""
    blob = Blob(blake3.blake3(data).hexdigest(), len(data))
    cache.partial(blob).parent.mkdir(parents=True, exist_ok=True)
    cache.partial(blob).write_bytes(data)
    cache.keep(blob)
    return blob


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a container's random user."""
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(ConfigError, match="XDG_CACHE_HOME"):
        Cache()


def test_a_folder_shares_the_files_it_is_made_of(cache: Cache) -> None:
    """Two vectors with one shard take its room once, and none can be written through by mistake."""
    blob = keep(cache, b"shard")
    folders = [
        cache.assemble(digest * 64, {"a.safetensors": blob}, ("vector.json", b"{}"))
        for digest in "de"
    ]
    inodes = {(folder / "a.safetensors").stat().st_ino for folder in folders}
    assert inodes == {cache.blob(blob).stat().st_ino}
    assert not cache.blob(blob).stat().st_mode & 0o222
    assert (folders[0] / "vector.json").read_bytes() == b"{}"


@pytest.mark.parametrize("number", [errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP])
def test_without_hard_links_the_files_are_copied(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Some file systems have none; the reader follows no other links out of a vector's folder."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    blob = keep(cache, b"shard")
    folder = cache.assemble(DIGEST, {"a.safetensors": blob}, ("vector.json", b"{}"))
    assert (folder / "a.safetensors").read_bytes() == b"shard"
    assert not (folder / "a.safetensors").is_symlink()


def test_the_remains_of_a_killed_process_are_replaced(cache: Cache) -> None:
    """Of one that made a folder, and a folder that lost a file since."""
    blob = keep(cache, b"shard")
    making = cache.vector(DIGEST).with_name(f".{DIGEST}")
    for remains in (making, cache.vector(DIGEST)):
        remains.mkdir(parents=True)
        (remains / "old").write_bytes(b"")
    folder = cache.assemble(DIGEST, {"a.safetensors": blob}, ("vector.json", b"{}"))
    assert {path.name for path in folder.iterdir()} == {"a.safetensors", "vector.json"}
    assert not making.exists()


def test_a_folder_that_is_whole_is_left_alone(cache: Cache) -> None:
    """Another process may have just opened it."""
    blob = keep(cache, b"shard")
    files, first = {"a.safetensors": blob}, ("vector.json", b"{}")
    marker = cache.assemble(DIGEST, files, first) / "marker"
    marker.write_bytes(b"")
    cache.assemble(DIGEST, files, first)
    assert marker.exists()
    (marker.parent / "a.safetensors").unlink()
    cache.assemble(DIGEST, files, first)
    assert not marker.exists()


def test_a_folder_is_not_seen_before_it_is_whole(cache: Cache) -> None:
    """A file that is not here leaves no folder of that name."""
    with pytest.raises(FileNotFoundError):
        cache.assemble(DIGEST, {"a": Blob("0" * 64, 5)}, ("vector.json", b"{}"))
    assert not cache.vector(DIGEST).exists()


def test_missing_bytes_count_each_file_once_and_what_is_here_of_it(cache: Cache) -> None:
    """The same shard under two names is fetched once."""
    here, begun, absent = keep(cache, b"here"), Blob("1" * 64, 100), Blob("2" * 64, 1000)
    cache.partial(begun).write_bytes(bytes(30))
    assert cache.missing_bytes([here, begun, begun, absent]) == 70 + 1000
    assert cache.missing_bytes([here]) == 0
    cache.partial(begun).write_bytes(bytes(300))
    assert cache.missing_bytes([begun]) == 0


def test_what_a_url_named_is_remembered_with_its_time(cache: Cache) -> None:
    """Damaged memory is none."""
    assert cache.remembered("key") is None
    cache.remember("key", DIGEST, "https://host/v/")
    assert cache.remembered("key") == DIGEST
    assert cache.remembered("key", since_ns=2**63) is None
    (cache.root / "urls" / "key.json").write_text("[]")
    assert cache.remembered("key") is None


def test_a_lock_is_held_by_one_and_the_others_say_that_they_wait(cache: Cache) -> None:
    """Threads too: each gets it, one after the other."""
    inside, most, waited = 0, 0, threading.Event()

    def enter() -> None:
        nonlocal inside, most
        with cache.lock("name", waited.set):
            inside += 1
            most = max(most, inside)
            inside -= 1

    with cache.lock("name"):
        threads = [threading.Thread(target=enter) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert waited.wait(10)
        assert most == 0
    for thread in threads:
        thread.join(10)
    assert most == 1
