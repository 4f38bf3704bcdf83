"""vllm_rvec.vector.fetching: a URL becomes a folder in the cache, once, whole, the right one."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fsspec.registry import _registry

from tests.support.tiny_vectors import edit_manifest, redigest
from tests.support.web import Web, run_web
from vllm_rvec.checkpoint import download
from vllm_rvec.checkpoint.cache import Cache
from vllm_rvec.errors import (
    ConfigError,
    FetchError,
    VectorCorruptError,
    VectorFormatError,
    VectorNotFoundError,
)
from vllm_rvec.vector import Manifest, VectorReader, fetching
from vllm_rvec.vector.fetching import locate_vector
from vllm_rvec.vector.verification import verify

if TYPE_CHECKING:
    from collections.abc import Iterator

SHARD = "vector.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """An empty one, a process that is online, and no pauses between tries."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(download, "PAUSES_SECONDS", (0.0,))
    return Cache()


@pytest.fixture
def web() -> Iterator[Web]:
    """A server without files."""
    with run_web() as found:
        yield found


@pytest.fixture
def mine(vector: Path, tmp_path: Path) -> Path:
    """A copy of the family's vector, to be changed."""
    return shutil.copytree(vector, tmp_path / "mine")


def same_files(one: Path, other: Path) -> bool:
    names = {"vector.json", SHARD}
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


@pytest.mark.parametrize("end", ["", "/", "/vector.json"])
def test_a_url_becomes_a_folder_of_the_same_bytes(web: Web, vector: Path, end: str) -> None:
    """Which the reader takes, and which is named as the user named it."""
    url = web.add_folder("/team/v", vector)
    located = locate_vector(url + end)
    assert same_files(located.folder, vector)
    verify(VectorReader(located.folder))
    assert (located.id, located.revision) == (f"{url}/", None)
    assert len(web.requests) == 2


def test_folders_are_found_as_ever(vector: Path) -> None:
    """Nothing is copied."""
    assert locate_vector(str(vector)).folder == vector


def test_a_second_look_asks_for_the_manifest_only(web: Web, vector: Path) -> None:
    """So that a change would be seen."""
    url = web.add_folder("/v", vector)
    assert locate_vector(url) == locate_vector(url)
    assert [len(web.asked(name)) for name in ("vector.json", SHARD)] == [2, 1]


def test_a_changed_vector_is_seen(web: Web, mine: Path) -> None:
    """And its unchanged shards are not fetched again; the old one stays whole."""
    url = web.add_folder("/v", mine)
    old = locate_vector(url).folder
    edit_manifest(mine, tool="another")
    web.add_folder("/v", mine)
    new = locate_vector(url).folder
    assert Manifest.read(new).tool == "another"
    assert Manifest.read(old).tool != "another"
    assert len(web.asked(SHARD)) == 1
    assert (old / SHARD).stat().st_ino == (new / SHARD).stat().st_ino


def test_two_urls_with_one_vector_fetch_it_once(web: Web, vector: Path) -> None:
    """What is in it makes it the same, not where it is."""
    urls = [web.add_folder(path, vector) for path in ("/a", "/b")]
    assert len({locate_vector(url).folder for url in urls}) == 1
    assert len(web.asked(SHARD)) == 1


def test_a_pinned_vector_that_is_here_needs_no_request(web: Web, vector: Path) -> None:
    """Like a commit on the Hub; from any URL, online or not."""
    url = web.add_folder("/v", vector)
    pin = f"#blake3={Manifest.read(vector).digest}"
    first = locate_vector(url + pin)
    asked = len(web.requests)
    assert locate_vector(url + pin) == first
    assert locate_vector(f"https://nowhere.invalid/x{pin}").folder == first.folder
    assert len(web.requests) == asked == 2


def test_another_vector_than_the_pinned_one_is_refused(web: Web, mine: Path, cache: Cache) -> None:
    """Before its shards are fetched; expected and found are named."""
    pinned = Manifest.read(mine).digest
    edit_manifest(mine, tool="another")
    url = web.add_folder("/v", mine)
    with pytest.raises(VectorCorruptError) as caught:
        locate_vector(f"{url}#blake3={pinned}")
    assert f"expected {pinned}, found {Manifest.read(mine).digest}" in caught.value.why
    assert not web.asked(SHARD)
    assert not (cache.root / "vectors").exists()


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_the_cache_is_taken(
    web: Web, vector: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """By the URL as it was fetched, with the same variables as for the Hub."""
    url = web.add_folder("/v", vector)
    first = locate_vector(url)
    asked = len(web.requests)
    monkeypatch.setenv(variable, "1")
    assert locate_vector(f"{url}/vector.json") == first
    assert len(web.requests) == asked


def test_offline_and_not_in_the_cache(
    web: Web, vector: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never there, or not whole since: the message names the variable."""
    url = web.add_folder("/v", vector)
    folder = locate_vector(url).folder
    monkeypatch.setenv("HF_HUB_OFFLINE", "yes")
    with pytest.raises(VectorNotFoundError, match="HF_HUB_OFFLINE is set"):
        locate_vector(f"{url}/other")
    (folder / SHARD).unlink()
    with pytest.raises(VectorNotFoundError, match="HF_HUB_OFFLINE is set"):
        locate_vector(url)
    assert len(web.requests) == 2


def test_a_folder_that_lost_a_file_is_made_anew(web: Web, vector: Path) -> None:
    """Of what the cache still has."""
    url = web.add_folder("/v", vector)
    folder = locate_vector(url).folder
    (folder / SHARD).unlink()
    assert same_files(locate_vector(url).folder, vector)
    assert len(web.asked(SHARD)) == 1


def test_a_server_that_is_gone_is_an_error_that_names_the_way_out(web: Web, vector: Path) -> None:
    """What is in the cache may be old: it is taken when the user says so."""
    url = web.add_folder("/v", vector)
    locate_vector(url)
    web.special["/v/vector.json"] = lambda handler: handler.send_error(503)
    with pytest.raises(FetchError, match="answered 503") as caught:
        locate_vector(url)
    assert "HF_HUB_OFFLINE=1 takes what is in the cache" in caught.value.fix
    with pytest.raises(FetchError) as caught:
        locate_vector("http://127.0.0.1:9/v")
    assert "HF_HUB_OFFLINE" not in caught.value.fix


def test_what_is_no_vector_is_refused_by_its_url(web: Web) -> None:
    """A page, another JSON, too long a text, nothing."""
    web.files |= {"/page/vector.json": b"<html>", "/json/vector.json": b"{}"}
    web.files["/long/vector.json"] = b" " * ((64 << 20) + 1)
    for path, why in (
        ("page", "Expecting value"),
        ("json", "Field required"),
        ("long", "longer than"),
    ):
        with pytest.raises(VectorFormatError, match=why) as caught:
            locate_vector(f"{web.url}/{path}")
        assert f"{web.url}/{path}/" in str(caught.value)
    with pytest.raises(VectorNotFoundError, match="there is no vector at"):
        locate_vector(f"{web.url}/nothing")


def test_a_manifest_that_was_edited_is_refused(web: Web, mine: Path) -> None:
    """Its own digest tells, before any shard is asked for."""
    text = (mine / "vector.json").read_text()
    (mine / "vector.json").write_text(text.replace("qwen2", "qwen3"))
    url = web.add_folder("/v", mine)
    with pytest.raises(VectorCorruptError, match="its own digest"):
        locate_vector(url)
    assert not web.asked(SHARD)


@pytest.mark.parametrize("name", ["../../x.safetensors", "/etc/x.safetensors", "a/b.safetensors"])
def test_a_shard_outside_its_folder_is_never_asked_for(web: Web, mine: Path, name: str) -> None:
    """Nor written anywhere."""
    files = json.loads((mine / "vector.json").read_text())["files"]
    edit_manifest(mine, files={name: files[SHARD]})
    url = web.add_folder("/v", mine)
    with pytest.raises(VectorFormatError, match="no name of a safetensors file"):
        locate_vector(url)
    assert len(web.requests) == 1


def test_wrong_bytes_never_become_a_vector(web: Web, mine: Path, cache: Cache) -> None:
    """And the next run, once the server has the right ones, is not troubled by them."""
    url = web.add_folder("/v", mine)
    right = web.files[f"/v/{SHARD}"]
    web.files[f"/v/{SHARD}"] = right[:-1] + bytes([right[-1] ^ 1])
    with pytest.raises(VectorCorruptError, match=r"expected [0-9a-f]{64}, found [0-9a-f]{64}"):
        locate_vector(url)
    assert not (cache.root / "vectors").exists()
    web.files[f"/v/{SHARD}"] = right
    assert same_files(locate_vector(url).folder, mine)


def test_a_vector_of_zeros_has_no_shards(web: Web, tmp_path: Path) -> None:
    """Its manifest is all of it."""
    golden = Path(__file__).parents[1] / "golden" / "version-1" / "zero"
    located = locate_vector(web.add_folder("/v", golden))
    assert VectorReader(located.folder).shards == []


def test_one_shard_under_two_names_comes_once(web: Web, mine: Path) -> None:
    """The reader refuses such a vector; fetching it must not wait for itself."""
    shutil.copyfile(mine / SHARD, mine / "x.safetensors")
    manifest = json.loads((mine / "vector.json").read_text())
    edit_manifest(mine, files=manifest["files"] | {"x.safetensors": manifest["files"][SHARD]})
    redigest(mine)
    folder = locate_vector(web.add_folder("/v", mine)).folder
    assert (folder / "x.safetensors").read_bytes() == (folder / SHARD).read_bytes()
    assert len(web.asked(SHARD)) + len(web.asked("x.safetensors")) == 1


def test_progress_ends_with_all(web: Web, vector: Path) -> None:
    """In bytes of shards."""
    reports: list[tuple[int, int]] = []
    locate_vector(
        web.add_folder("/v", vector), on_progress=lambda done, total: reports.append((done, total))
    )
    size = (vector / SHARD).stat().st_size
    assert reports[-1] == (size, size)


def test_a_disk_without_room_is_told_before_the_first_byte(
    web: Web, vector: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what is missing and what is free."""
    monkeypatch.setattr(fetching, "SPARE_BYTES", 1 << 60)
    with pytest.raises(FetchError, match="there is no room") as caught:
        locate_vector(web.add_folder("/v", vector))
    assert "free" in caught.value.why
    assert "XDG_CACHE_HOME" in caught.value.fix
    assert not web.asked(SHARD)


def test_a_file_that_may_not_grow_is_told_and_what_has_come_is_kept(
    web: Web, mine: Path, cache: Cache
) -> None:
    """The system stops it in the middle; without the limit the next run goes on there."""
    big_shard(mine)
    url = web.add_folder("/v", mine)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        with pytest.raises(FetchError, match="there is no room") as caught:
            locate_vector(url)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.strerror(errno.EFBIG) in caught.value.why
    assert "0.5 MB are kept" in caught.value.why
    assert not (cache.root / "vectors").exists()
    assert same_files(locate_vector(url).folder, mine)
    assert [request.begins for request in web.asked(SHARD)] == [0, 500_000]


def test_a_disk_that_fills_up_is_told(web: Web, mine: Path, tmp_path: Path) -> None:
    """A real one of a megabyte, where this user may mount it."""
    big_shard(mine)
    url = web.add_folder("/v", mine)
    code = (
        "import sys; from vllm_rvec.errors import FetchError; "
        "from vllm_rvec.vector import fetching\n"
        "fetching.SPARE_BYTES = -10**9\n"
        "try: fetching.locate_vector(sys.argv[1])\n"
        "except FetchError as exc: print(exc)"
    )
    (tmp_path / "cache").mkdir()
    script = 'mount -t tmpfs -o size=1m none "$XDG_CACHE_HOME" && exec "$@"'
    unshare = ("unshare", "-rm", "sh", "-c")
    if subprocess.run([*unshare, "mount -t tmpfs none /mnt"], check=False).returncode:
        pytest.skip("this user may not mount anything, not even in a namespace")
    done = subprocess.run(
        [*unshare, script, "sh", sys.executable, "-c", code, url],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "there is no room" in done.stdout
    assert os.strerror(errno.ENOSPC) in done.stdout
    assert "MB are kept" in done.stdout


def test_a_cache_that_can_not_be_written_is_told(
    web: Web, vector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the system's words."""
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(FetchError, match=os.strerror(errno.ENOTDIR)) as caught:
        locate_vector(web.add_folder("/v", vector))
    assert "XDG_CACHE_HOME" in caught.value.fix


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_package_is_named(
    scheme: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the line that installs it."""
    monkeypatch.setitem(sys.modules, package, None)
    # fsspec remembers what an earlier test has imported.
    monkeypatch.delitem(_registry, scheme, raising=False)
    with pytest.raises(ConfigError, match=f"needs the package {package}") as caught:
        locate_vector(f"{scheme}://bucket/v")
    assert caught.value.fix == f"pip install 'vllm-rvec[{scheme}]'"


def big_shard(folder: Path) -> None:
    """Give a vector's folder a shard of 1.5 MB; nobody opens it."""
    (folder / SHARD).write_bytes(os.urandom(1_500_000))
    redigest(folder)
