"""vllm_rvec.cli.route: the command as a user runs it, in front of engines on "other hosts"."""

from __future__ import annotations

import os
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx
import openai
import psutil
import pytest
import yaml

from tests.support.processes import ready_line, until
from vllm_rvec.router import hash_key

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

START_SECONDS = 30
USER: Any = [{"role": "user", "content": "hi"}]

ENGINE = """
import asyncio, sys
from aiohttp import web

async def chat(request):
    body = await request.json()
    await asyncio.sleep(body.get("seed", 0))
    message = {"role": "assistant", "content": sys.argv[2]}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    said = {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"]}
    return web.json_response(said | {"choices": [choice]})

async def health(request):
    return web.Response()

app = web.Application()
app.router.add_post("/v1/chat/completions", chat)
app.router.add_get("/health", health)
web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None)
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


@dataclass
class Engine:
    """A stand-in engine that can be killed and started again on its port."""

    name: str
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it; it takes a moment to answer."""
        command = [sys.executable, "-c", ENGINE, str(self.port), self.name]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)

    def wait(self) -> None:
        """Wait until it answers."""
        until(self._answers, f"engine {self.name}", START_SECONDS)

    def kill(self) -> None:
        """End it without warning."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def _answers(self) -> bool:
        try:
            return httpx.get(self.url + "/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False


@dataclass
class Router:
    """The running command."""

    process: subprocess.Popen[str]
    ready: dict[str, Any]
    log: Path

    def client(self, **options: Any) -> openai.OpenAI:
        """Return a real OpenAI client for it."""
        given: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": 20} | options
        return openai.OpenAI(base_url=self.ready["base_url"], **given)

    def metrics(self) -> str:
        """Return what Prometheus reads."""
        url = self.ready["base_url"].removesuffix("/v1") + "/metrics"
        return httpx.get(url, timeout=5).text


def environ() -> dict[str, str]:
    """This process's environment without anybody's keys."""
    return {name: value for name, value in os.environ.items() if "_KEY" not in name}


@contextmanager
def route(file: Path, *arguments: str, env: Mapping[str, str] | None = None) -> Iterator[Router]:
    command = [sys.executable, "-m", "vllm_rvec", "route", "--config", str(file), "--port", "0"]
    log = file.with_suffix(".log")
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*command, "--json", *arguments],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environ() | dict(env or {}),
        )
    try:
        yield Router(process, ready_line(process, log, START_SECONDS), log)
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def refused(*arguments: object, env: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Run the command where it ends by itself."""
    done = subprocess.run(
        [sys.executable, "-m", "vllm_rvec", "route", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
        env=environ() | dict(env or {}),
    )
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.returncode, " ".join(done.stderr.split())


@pytest.fixture(scope="module")
def engines() -> Iterator[tuple[Engine, Engine]]:
    """On other hosts, as far as the router knows."""
    started = (Engine("one"), Engine("two"))
    try:
        for engine in started:
            engine.start()
        for engine in started:
            engine.wait()
        yield started
    finally:
        for engine in started:
            engine.kill()


def configured(file: Path, engines: tuple[Engine, Engine], **settings: Any) -> Path:
    one, two = ({"url": engine.url} for engine in engines)
    values = {
        "variants": {"base": {"upstreams": [one, two]}, "enhanced@1": {"upstreams": [two]}},
        "aliases": {
            "assistant": {"split": {"base": 0, "enhanced@1": 1}},
            "default": "enhanced@1",
        },
        "health": {"interval_seconds": 0.2},
    }
    file.write_text(yaml.safe_dump(values | settings))
    return file


@pytest.fixture
def file(tmp_path: Path, engines: tuple[Engine, Engine]) -> Path:
    return configured(tmp_path / "route.yaml", engines)


def said(client: openai.OpenAI, model: str, **options: Any) -> str | None:
    answer = client.chat.completions.create(model=model, messages=USER, **options)
    content: str | None = answer.choices[0].message.content
    return content


def test_it_answers_by_name_and_by_alias_and_ends_on_ctrl_c(file: Path) -> None:
    """One line of JSON says where; Ctrl-C lets what is under way end, and the exit status is 0."""
    with route(file) as router:
        assert router.ready["models"] == ["base", "enhanced@1"]
        assert router.ready["aliases"] == ["assistant", "default"]
        client = router.client()
        assert said(client, "enhanced@1") == "two"
        assert said(client, "assistant", user="u") == "two"
        raw = client.chat.completions.with_raw_response.create(model="default", messages=USER)
        assert raw.headers["X-Rvec-Variant"] == "enhanced@1"
        assert raw.headers["X-Rvec-Reason"] == "alias"
        assert {model.id for model in client.models.list()} >= {"base", "enhanced@1"}
        with pytest.raises(openai.NotFoundError, match="assistant"):
            said(client, "nobody")
        got: list[str | None] = []
        slow = threading.Thread(target=lambda: got.append(said(client, "enhanced@1", seed=1)))
        slow.start()
        in_flight = 'requests_in_flight{variant="enhanced@1"} 1.0'
        until(lambda: in_flight in router.metrics(), "a request under way", 5)
        router.process.send_signal(signal.SIGINT)
        slow.join()
        assert got == ["two"]
        assert router.process.wait(20) == 0
        assert "Traceback" not in router.log.read_text()


def test_sighup_as_soon_as_it_is_ready(file: Path, engines: tuple[Engine, Engine]) -> None:
    """Who reads the line may send it at once: the file is read again, and nothing ends."""
    with route(file) as router:
        router.process.send_signal(signal.SIGHUP)
        generation = "vllm_rvec_router_configuration_generation 2.0"
        until(lambda: generation in router.metrics(), "a reload", 10)
        # Other keys by a change of the file, while it runs.
        configured(file, engines, keys={"team": {"sha256": hash_key("sesame")}})
        generation = generation.replace("2", "3")
        until(lambda: generation in router.metrics(), "the change", 10)
        with pytest.raises(openai.AuthenticationError):
            said(router.client(), "base")
        assert said(router.client(api_key="sesame"), "base") in {"one", "two"}
        assert "sesame" not in router.log.read_text()
        router.process.terminate()
        assert router.process.wait(20) == 0


def test_no_client_sees_that_one_of_two_engines_is_killed(
    file: Path, engines: tuple[Engine, Engine]
) -> None:
    """The other one answers; once it is back, it gets its part again."""
    one, _ = engines
    with route(file) as router:
        client = router.client()
        answers: list[str | None] = []
        faults: list[Exception] = []
        is_over = threading.Event()

        def keep_asking() -> None:
            while not is_over.is_set():
                try:
                    answers.append(said(client, "base"))
                except openai.OpenAIError as exc:
                    faults.append(exc)
                time.sleep(0.005)

        threads = [threading.Thread(target=keep_asking) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            until(lambda: {"one", "two"} <= {*answers}, "both", 10)
            one.kill()
            answers.clear()
            until(lambda: answers.count("two") >= 50, "the other alone", 10)
            assert "one" not in answers[20:]
            one.start()
            until(lambda: "one" in answers[50:], "it is taken back", START_SECONDS)
        finally:
            is_over.set()
            for thread in threads:
                thread.join()
        assert faults == []
        assert f"upstream {one.url} is up" in router.log.read_text()


def test_a_disk_without_room_for_results_keeps_nobody_from_answers(
    tmp_path: Path, engines: tuple[Engine, Engine]
) -> None:
    """Serving goes on, the log says why, and what waited is kept when there is room again."""
    database = tmp_path / "results.sqlite"
    file = configured(tmp_path / "route.yaml", engines, results={"path": str(database)})
    with route(file) as router:
        client = router.client()
        assert said(client, "assistant") == "two"
        kept = until_rows(database, 1)
        process = psutil.Process(router.process.pid)
        # Files as large as SQLite's log can't grow; the router's own log is far smaller.
        full = database.with_name(database.name + "-wal").stat().st_size
        process.rlimit(psutil.RLIMIT_FSIZE, (full, resource.RLIM_INFINITY))
        for _ in range(5):
            assert said(client, "assistant") == "two"
        deadline = time.monotonic() + 20
        while "results" not in router.log.read_text():
            assert time.monotonic() < deadline, router.log.read_text()
            time.sleep(0.05)
        assert "Traceback" not in router.log.read_text()
        process.rlimit(psutil.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        until_rows(database, kept + 5)
        assert said(client, "assistant") == "two"


def until_rows(database: Path, count: int) -> int:
    """Wait until so many exposures are kept."""
    deadline, found = time.monotonic() + 20, 0
    while found < count:
        assert time.monotonic() < deadline, f"{found} of {count}"
        time.sleep(0.05)
        if database.exists():
            with suppress(sqlite3.OperationalError), closing(sqlite3.connect(database)) as opened:
                found = opened.execute("SELECT count(*) FROM exposures").fetchone()[0]
    return found


def test_beyond_this_machine_only_with_a_key(file: Path) -> None:
    """Exit status 3 and both ways out."""
    code, text = refused("--config", file, "--host", "0.0.0.0")
    assert code == 3
    assert "0.0.0.0 would let anybody on the network in" in text
    assert "--insecure" in text
    assert "vllm-rvec new-key" in text


def test_beyond_this_machine_where_that_is_meant(
    tmp_path: Path, engines: tuple[Engine, Engine]
) -> None:
    """With `--insecure` all are let in. With a key: and no reload may take the last one away."""
    file = configured(tmp_path / "route.yaml", engines)
    with route(file, "--host", "0.0.0.0", "--insecure") as router:
        assert said(router.client(), "enhanced@1") == "two"
    keys = {"team": {"sha256": hash_key("sesame")}}
    configured(file, engines, keys=keys, host="0.0.0.0")
    with route(file) as router:
        assert said(router.client(api_key="sesame"), "enhanced@1") == "two"
        configured(file, engines, host="127.0.0.1")  # it goes on listening where it does
        until(lambda: 'reloads_total{result="failed"} 1.0' in router.metrics(), "refusal", 10)
        with pytest.raises(openai.AuthenticationError):
            said(router.client(), "base")
        assert "would let anybody on the network in" in router.log.read_text()


def test_a_port_in_use(file: Path) -> None:
    """Exit status 3, and what to do."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, text = refused("--config", file, "--port", port)
    assert code == 3
    assert f"port {port}" in text
    assert "another process listens there" in text


def test_a_bad_file(tmp_path: Path) -> None:
    """Exit status 3, all problems, and no value."""
    file = tmp_path / "route.yaml"
    file.write_text(
        "prot: 1\nkeys: {team: {sha256: sesame}}\nvariants: {base: {upstreams: [{ulr: x}]}}\n"
    )
    code, text = refused("--config", file)
    assert code == 3
    for part in (
        str(file),
        "`prot` is not a setting; did you mean `port`?",
        "`keys.team.sha256`",
        "`variants.base.upstreams.0.ulr` is not a setting; did you mean `url`?",
        "`variants.base.upstreams.0.url` is missing",
    ):
        assert part in text
    assert "sesame" not in text


def test_keys_that_can_not_be_had(tmp_path: Path, engines: tuple[Engine, Engine]) -> None:
    """Exit status 3: an engine's that is in no variable, an admin's that every client has."""
    file = tmp_path / "route.yaml"
    upstreams = [{"url": engines[0].url, "api_key_env": "NOT_THERE"}]
    configured(file, engines, variants={"base": {"upstreams": upstreams}}, aliases={})
    code, text = refused("--config", file, "--port", 0)
    assert (code, "NOT_THERE is not set" in text) == (3, True)
    both = {"VLLM_RVEC_API_KEY": "sesame", "VLLM_RVEC_ADMIN_KEY": "sesame"}
    code, text = refused("--config", configured(file, engines), "--port", 0, env=both)
    assert (code, "the admin key is the same as the API key" in text) == (3, True)
    assert "sesame" not in text
