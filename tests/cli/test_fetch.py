"""`vllm-rvec fetch`, as processes: several at once, killed, interrupted, and over https."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.certificates import make_certificate
from tests.support.processes import until
from tests.support.tiny_vectors import redigest
from tests.support.web import Web, run_web
from vllm_rvec.vector import Manifest

if TYPE_CHECKING:
    from collections.abc import Iterator

SHARD = "vector.safetensors"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of a user who is online."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    return tmp_path / "cache" / "vllm_rvec"


@pytest.fixture
def web() -> Iterator[Web]:
    """A server that stops in the middle of each shard until it is told to go on."""
    with run_web() as found:
        found.stall = threading.Event()
        yield found


@pytest.fixture
def url(web: Web, vector: Path, tmp_path: Path, cache: Path) -> str:
    """A vector on that server whose shard is larger than any buffer."""
    mine = shutil.copytree(vector, tmp_path / "mine")
    whole = Path(__file__).parents[2] / "examples" / "reasoning_in_miniature" / "vector"
    shutil.copytree(whole, mine, dirs_exist_ok=True)
    return web.add_folder("/v", mine)


def start(url: str, log: Path, *flags: str) -> subprocess.Popen[str]:
    with log.open("w") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", "vllm_rvec", "fetch", url, *flags],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )


def run(url: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vllm_rvec", "fetch", url, *flags],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def kept_bytes(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.glob("blobs/*.partial"))


def test_several_processes_fetch_once(web: Web, url: str, tmp_path: Path) -> None:
    """As the ranks of an engine: one works, the others wait and say so, and all have it."""
    assert web.stall is not None
    logs = [tmp_path / f"{number}.log" for number in range(3)]
    ranks = [start(url, log, "--json") for log in logs]
    until(lambda: sum("waiting" in log.read_text() for log in logs) == 2, "two wait")
    web.stall.set()
    told = [json.loads(rank.communicate(timeout=60)[0]) for rank in ranks]
    assert told[0] == told[1] == told[2]
    assert Path(told[0]["folder"], SHARD).read_bytes() == web.files[f"/v/{SHARD}"]
    assert [len(web.asked(name)) for name in ("vector.json", SHARD)] == [1, 1]
    assert web.sent_bytes[f"/v/{SHARD}"] == told[0]["size_bytes"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_what_a_stopped_process_had_is_continued(
    web: Web, url: str, tmp_path: Path, cache: Path, number: signal.Signals
) -> None:
    """Nothing blocks the next, nothing half is taken for whole, and no byte comes twice."""
    assert web.stall is not None
    process = start(url, tmp_path / "log")
    half = len(web.files[f"/v/{SHARD}"]) // 2
    until(lambda: kept_bytes(cache) > half * 0.9, "half of it is here")
    process.send_signal(number)
    status = process.wait(10)
    assert status == (130 if number == signal.SIGINT else -signal.SIGKILL)
    if number == signal.SIGINT:
        assert (tmp_path / "log").read_text().strip() == "interrupted"
    assert not (cache / "vectors").exists()
    assert not [path for path in cache.glob("blobs/*") if path.suffix != ".partial"]
    kept = kept_bytes(cache)
    web.stall.set()
    done = run(url)
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.strip()) / SHARD).read_bytes() == web.files[f"/v/{SHARD}"]
    assert [request.begins for request in web.asked(SHARD)] == [0, kept]


def test_json_says_what_was_fetched(web: Web, url: str) -> None:
    """The digest is what a pin takes."""
    assert web.stall is not None
    web.stall.set()
    told = json.loads(run(url, "--json").stdout)
    folder = Path(told["folder"])
    assert told == {
        "vector": f"{url}/",
        "revision": None,
        "folder": str(folder),
        "digest": Manifest.read(folder).digest,
        "size_bytes": (folder / SHARD).stat().st_size,
    }
    again = run(f"{url}#blake3={told['digest']}", HF_HUB_OFFLINE="1")
    assert again.stdout.strip() == str(folder)


def test_a_folder_is_fetched_already(vector: Path) -> None:
    """Printed as it was given."""
    assert run(str(vector)).stdout.strip() == str(vector)


def test_exit_statuses(web: Web, url: str, tmp_path: Path) -> None:
    """A network that fails has one of its own, and no message repeats a secret."""
    secret = "?X-Amz-Signature=c0ffee77"
    web.files["/empty/vector.json"] = b"{}"
    damaged = shutil.copytree(tmp_path / "mine", tmp_path / "damaged")
    redigest(damaged)
    broken = web.add_folder("/damaged", damaged)
    del web.files[f"/damaged/{SHARD}"]
    expected = {
        f"http://me:sesame-7@127.0.0.1:9/v{secret}": 9,
        f"ftp://me:sesame-7@host/v{secret}": 3,
        f"{web.url}/none{secret}": 5,
        f"{web.url}/empty{secret}": 5,
        f"{broken}{secret}": 6,
    }
    for reference, status in expected.items():
        done = run(reference)
        assert done.returncode == status, done.stderr
        assert done.stderr.startswith("error: ")
        assert not {"c0ffee77", "sesame-7"} & set(done.stderr.replace("=", " ").split())
        assert "c0ffee" not in done.stdout + done.stderr
        assert "sesame" not in done.stdout + done.stderr


def test_https_with_a_certificate_of_ones_own(vector: Path, tmp_path: Path, cache: Path) -> None:
    """Refused as long as nobody vouches for it, and then taken."""
    certificate, key = make_certificate(tmp_path)
    with run_web((certificate, key)) as web:
        url = web.add_folder("/v", vector)
        assert url.startswith("https://")
        refused = run(url)
        assert refused.returncode == 9
        assert "SSL_CERT_FILE" in refused.stderr
        assert not web.requests
        done = run(url, SSL_CERT_FILE=str(certificate))
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.strip()) / SHARD).read_bytes() == (vector / SHARD).read_bytes()
