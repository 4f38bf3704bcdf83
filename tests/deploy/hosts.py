"""The compose files' router before two engines, each on a host of its own.

Hosts are network namespaces joined by virtual cables, with the names that route.ab.yaml uses. To be
run in namespaces where one may make such things (see test_compose.py); prints what was seen:

    unshare -Urnm python -m tests.deploy.hosts FOLDER
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from aiohttp import web

from tests.support.processes import until

if TYPE_CHECKING:
    from collections.abc import Iterator

COMPOSE = Path(__file__).resolve().parents[2] / "deploy" / "compose"
ENGINES = {"base": "10.9.1", "enhanced": "10.9.2"}
"""Names, and the networks of their cables: .1 is the router's end, .2 theirs."""
ROUTER = "http://127.0.0.1:8000"


def run(*words: str) -> None:
    """Run one command of the system's."""
    subprocess.run(words, check=True)


@contextlib.contextmanager
def host(name: str, network: str) -> Iterator[int]:
    """Make a host with a cable to this one; gives the process that holds its namespace."""
    with subprocess.Popen(["unshare", "-n", "sleep", "infinity"]) as held:
        try:
            until(lambda: _namespace(held.pid) != _namespace("self"), f"{name} has a network")
            run("ip", "link", "add", name, "type", "veth", "peer", "name", "cable")
            run("ip", "link", "set", "cable", "netns", str(held.pid))
            run("ip", "addr", "add", f"{network}.1/24", "dev", name)
            run("ip", "link", "set", name, "up")
            on(held.pid, "ip", "addr", "add", f"{network}.2/24", "dev", "cable")
            on(held.pid, "ip", "link", "set", "cable", "up")
            yield held.pid
        finally:
            held.kill()


def on(pid: int, *words: str) -> None:
    """Run one on a host."""
    run("nsenter", "-t", str(pid), "-n", *words)


def engine(name: str) -> None:
    """Answer as an engine that wants the key of secrets/engine_key."""

    async def chat(request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != "Bearer of-engines":
            return web.json_response({"error": "Unauthorized"}, status=401)
        return web.json_response({"model": name, "choices": []})

    async def health(_: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    app.router.add_get("/health", health)
    web.run_app(app, host="0.0.0.0", port=8000, print=None)


def prepare(folder: Path) -> None:
    """Lay names, a home and keys where containers have them."""
    names = "".join(f"{network}.2 {name}\n" for name, network in ENGINES.items())
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
    run("mount", "--bind", str(folder / "hosts"), "/etc/hosts")
    run("mount", "-t", "tmpfs", "none", "/home")
    Path("/home/rvec").mkdir()
    run("ip", "link", "set", "lo", "up")
    for name, key in (("VLLM_RVEC_API_KEY", "of-clients"), ("ENGINE_KEY", "of-engines")):
        (folder / name).write_text(f"{key}\n")
    (folder / "not-a-variable").write_text("and so no key")


def ask(model: str, user: str = "u", key: str = "of-clients") -> dict[str, Any]:
    """Ask the router; what matters of its answer."""
    body = {"model": model, "user": user, "messages": [{"role": "user", "content": "hi"}]}
    headers = {"Authorization": f"Bearer {key}"}
    answer = httpx.post(f"{ROUTER}/v1/chat/completions", json=body, headers=headers, timeout=20)
    return {
        "status": answer.status_code,
        "reason": answer.headers.get("X-Rvec-Reason"),
        "who": answer.json().get("model"),
    }


def are_up(count: int) -> bool:
    """Whether so many engines can answer, by the router's word."""
    with contextlib.suppress(httpx.HTTPError):
        lines = httpx.get(f"{ROUTER}/metrics", timeout=5).text.splitlines()
        up = [line for line in lines if line.startswith("vllm_rvec_router_upstream_up{")]
        return sum(line.endswith(" 1.0") for line in up) == count
    return False


def observe(enhanced: int) -> dict[str, Any]:
    """Ask while both hosts are there, and after one has lost its cable."""
    until(lambda: are_up(2), "both engines are up")
    seen: dict[str, Any] = {
        "base": ask("base"),
        "enhanced@1": ask("enhanced@1"),
        "split": sorted({ask("assistant", f"user-{n}")["who"] for n in range(20)}),
        "stranger": ask("base", key="of-nobody")["status"],
    }
    on(enhanced, "ip", "link", "set", "cable", "down")
    until(lambda: are_up(1), "the loss is known")
    return seen | {"without its host": ask("enhanced@1")}


def main(folder: Path) -> None:
    """Start all, ask, end all."""
    prepare(folder)
    with contextlib.ExitStack() as held:
        hosts = {name: held.enter_context(host(name, ENGINES[name])) for name in ENGINES}
        for name, pid in hosts.items():
            command = [sys.executable, "-m", "tests.deploy.hosts", "engine", name]
            _start(held, ["nsenter", "-t", str(pid), "-n", *command])
        route = ["-m", "vllm_rvec", "route", "--config", str(COMPOSE / "route.ab.yaml")]
        secrets = ["env", f"SECRETS_DIR={folder}", str(COMPOSE / "with-secrets.sh")]
        _start(held, [*secrets, sys.executable, *route])
        sys.stdout.write(json.dumps(observe(hosts["enhanced"])) + "\n")


def _start(held: contextlib.ExitStack, command: list[str]) -> None:
    held.callback(subprocess.Popen(command).kill)


def _namespace(process: int | str) -> int:
    return Path(f"/proc/{process}/ns/net").stat().st_ino


if __name__ == "__main__":
    if sys.argv[1] == "engine":
        engine(sys.argv[2])
    else:
        main(Path(sys.argv[1]))
