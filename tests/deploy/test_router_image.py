"""The router's image: its packages alone are enough, and a ConfigMap's change reaches it.

The packages are those of requirements/router.txt, taken from the tests' environment by links, so
that nothing else of that can be imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import distribution
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.deploy.rendered import pods
from tests.deploy.tools import ROOT, pins
from tests.support.hub import StandInHub, run_hub
from tests.support.miniature import MINIATURE
from tests.support.processes import until
from tests.support.web import run_web
from vllm_rvec.vector.manifest import Manifest

if TYPE_CHECKING:
    from collections.abc import Iterator

DEADLINE_SECONDS = 30


def top_names(package: str) -> set[str]:
    """Find what a package puts into site-packages."""
    names = {file.parts[0] for file in distribution(package).files or []}
    return names - {"..", "__pycache__"}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the image's site-packages."""
    folder = tmp_path_factory.mktemp("site")
    installed = Path(str(distribution("aiohttp").locate_file("")))
    for package in pins("router.txt"):
        for name in top_names(package):
            if not (folder / name).exists():
                (folder / name).symlink_to(installed / name)
    (folder / "vllm_rvec").symlink_to(ROOT / "vllm_rvec")
    return folder


def environment(packages: Path) -> dict[str, str]:
    """Nothing of the tests' own but what is given."""
    return {
        "PYTHONPATH": str(packages),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PATH": os.environ["PATH"],
        "HOME": "/nonexistent",
        "XDG_CACHE_HOME": str(packages.parent / "cache"),
        "VLLM_RVEC_API_KEY": "k",
        "ENGINE_KEY": "e",
    }


def run(packages: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python in there, without any other site-packages."""
    return subprocess.run(
        [sys.executable, "-S", *words],
        cwd=packages.parent,
        env=environment(packages),
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_SECONDS,
    )


def test_what_is_not_in_the_lock_is_not_there(packages: Path) -> None:
    """The folder says something only if it keeps things out."""
    names = ("torch", "vllm", "scipy", "transformers")
    code = f"from importlib.util import find_spec; print([n for n in {names} if find_spec(n)])"
    assert run(packages, "-c", code).stdout.strip() == "[]"


def test_commands_start(packages: Path) -> None:
    """Those that the image is for, and `hf download`, by the module behind that command."""
    code = (
        "import sys\n"
        "from vllm_rvec.cli.main import app\n"
        "for name in ('route', 'fetch', 'check-config', 'results', 'new-key'):\n"
        "    app([name, '--help'], standalone_mode=False)\n"
        "from huggingface_hub.cli.hf import main\n"
        "sys.argv[1:] = ['download', '--help']\n"
        "main()\n"
    )
    done = run(packages, "-c", code)
    assert done.returncode == 0, done.stderr
    assert {"--config", "--local-dir", "--revision"} <= set(done.stdout.split())


def test_a_vector_is_fetched_by_its_digest_into_a_volume(packages: Path) -> None:
    """As the init container does it; another digest is refused, and what is there stays."""
    digest = Manifest.read(MINIATURE / "vector").digest
    with run_web() as web:
        url = web.add_folder("/vector", MINIATURE / "vector")
        done = run(packages, "-m", "vllm_rvec", "fetch", f"{url}#blake3={digest}")
        wrong = run(packages, "-m", "vllm_rvec", "fetch", f"{url}#blake3={'0' * 64}")
    assert done.stdout.strip().endswith(f"/cache/vllm_rvec/vectors/{digest}"), done.stderr
    assert wrong.returncode == 6
    again = run(packages, "-m", "vllm_rvec", "fetch", f"{url}#blake3={digest}")
    assert again.stdout == done.stdout


def download(packages: Path, hub: StandInHub, volume: Path, commit: str) -> int:
    """Run the init container's own words, with another volume; returns its exit status."""
    (pod,) = [pod for pod in pods("base") if pod.name.startswith("engine-")]
    (container,) = [c for c in pod.containers if c["name"] == "target"]
    words = " ".join(container["args"])
    for name, value in {
        "$(TARGET)": "team/target",
        "$(TARGET_REVISION)": commit,
        "/weights": str(volume),
    }.items():
        words = words.replace(name, value)
    code = "import sys; from huggingface_hub.cli.hf import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, "download", *words.split()],
        env={
            **environment(packages),
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(volume / "home"),
            "HF_HUB_DISABLE_XET": "1",
        },
        capture_output=True,
        check=False,
        timeout=DEADLINE_SECONDS,
    )
    return done.returncode


def test_a_target_is_fetched_into_a_volume(packages: Path, tmp_path: Path) -> None:
    """As the init container does it: without pickles; what is there whole needs no Hub any more."""
    files = dict.fromkeys(("config.json", "a.safetensors", "b.bin", "original/c.pth"), b"{}")
    with run_hub() as hub:
        commit = hub.add("team/target", files)
        assert download(packages, hub, tmp_path, commit) == 0
    folder = tmp_path / "targets" / commit
    assert {file.name for file in folder.glob("[!.]*")} == {"config.json", "a.safetensors"}
    assert download(packages, hub, tmp_path, commit) == 0
    (folder / "a.safetensors").unlink()
    assert download(packages, hub, tmp_path, commit) != 0


class Engine(BaseHTTPRequestHandler):
    """An engine's stand-in, which answers with its own name."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Be well."""
        self._answer(b"{}")

    def do_POST(self) -> None:
        """Complete a chat, for who has the engine's key."""
        self.rfile.read(int(self.headers["Content-Length"]))
        assert self.headers["Authorization"] == "Bearer e"
        self._answer(json.dumps({"model": "enhanced-1", "choices": []}).encode())

    def _answer(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def engine() -> Iterator[str]:
    """Run one on a free port; gives its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Engine) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def mount(folder: Path, version: str, text: str) -> Path:
    """Put a ConfigMap's file there as the kubelet does: behind a link that is swapped at once."""
    (folder / f"..{version}").mkdir()
    (folder / f"..{version}" / "route.yaml").write_text(text)
    (folder / "..data_tmp").symlink_to(f"..{version}")
    (folder / "..data_tmp").rename(folder / "..data")
    path = folder / "route.yaml"
    if not path.is_symlink():
        path.symlink_to("..data/route.yaml")
    return path


def route_text(url: str, weight: int) -> str:
    """The ab overlay's file, in short, for this machine."""
    upstreams = f'[{{url: "{url}", api_key_env: ENGINE_KEY}}]'
    return (
        f"host: 127.0.0.1\nport: 0\nvariants:\n  base: {{alpha: 0, upstreams: {upstreams}}}\n"
        f"  enhanced-1: {{alpha: 1, upstreams: {upstreams}}}\n"
        f"aliases: {{assistant: {{split: {{base: {weight}, enhanced-1: 50}}}}}}\n"
    )


def get(url: str, body: object = None) -> str:
    """Ask with the client's key; with a body, POST it."""
    headers = {"Authorization": "Bearer k", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)  # noqa: S310 - our own address
    with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310
        return str(answer.read().decode())


@contextmanager
def routing(packages: Path, config: Path) -> Iterator[str]:
    """Run the router, as the image does; gives its address."""
    words = ["-S", "-m", "vllm_rvec", "route", "--config", str(config), "--json"]
    with subprocess.Popen(
        [sys.executable, *words], env=environment(packages), stdout=subprocess.PIPE, text=True
    ) as router:
        try:
            assert router.stdout
            yield json.loads(router.stdout.readline())["base_url"].removesuffix("/v1")
        finally:
            router.terminate()
    assert router.returncode == 0


def test_it_routes_and_takes_a_changed_configmap(packages: Path, tmp_path: Path) -> None:
    """With the lock's packages alone; without a restart; and it ends when it is told to."""
    weight = 'configured_weight{alias="assistant",variant="base"} 0.75'
    with engine() as upstream:
        path = mount(tmp_path, "1", route_text(upstream, 50))
        with routing(packages, path) as url:
            until(lambda: '"enhanced-1"' in get(f"{url}/v1/models"), "an engine", DEADLINE_SECONDS)
            answer = get(f"{url}/v1/chat/completions", {"model": "enhanced-1", "messages": []})
            assert json.loads(answer)["model"] == "enhanced-1"
            assert weight not in get(f"{url}/metrics")
            mount(tmp_path, "2", route_text(upstream, 150))
            until(lambda: weight in get(f"{url}/metrics"), "the weight", DEADLINE_SECONDS)
