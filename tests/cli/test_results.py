"""vllm_rvec.cli.results: the command, on a file and on a router's answer."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING, Any

import pytest
import typer
from typer.testing import CliRunner

from vllm_rvec.cli.results import results_command
from vllm_rvec.errors import ConfigError, FetchError
from vllm_rvec.router.results import Exposure, ResultsConfig, ResultsStore
from vllm_rvec.router.results.report import VariantCounts, summarise
from vllm_rvec.router.results.statistics import Clusters

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from typer.testing import Result

app = typer.Typer()
app.command()(results_command)


def run(*arguments: object, **environment: str) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "80"} | environment)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Two experiments of 40 requests each."""
    path = tmp_path / "results.sqlite"
    store = ResultsStore(ResultsConfig(path=str(path)))
    store.start()
    for alias in ("assistant", "other"):
        store.note_split(alias, {"base": 50, "enhanced@1": 50})
        for i in range(40):
            variant = ("base", "enhanced@1")[i % 2]
            store.record(
                Exposure(f"r{i}", 0.0, alias, variant, "sticky", f"u{i}", 200, i == 0, 0.25, 1.5)
            )
        store.record(Exposure("f", 0.0, alias, "base", "fallback", "u", 200, False, None, 1.5))
    store.close()
    return path


def experiment(name: str = "assistant", variant: str = "enhanced@1") -> dict[str, object]:
    counts = [
        VariantCounts("base", 900, 900, 900, votes=Clusters.of([(1, 1.0), (1, 0.0)] * 450)),
        VariantCounts(variant, 900, 900, 900, votes=Clusters.of([(3, 2.0)] * 300)),
    ]
    split = {"base": 1.0, variant: 1.0}
    return summarise(name, counts, split, not_counted={}).as_json()


@contextmanager
def router(body: object, status: int = 200) -> Iterator[tuple[str, list[Any]]]:
    """Something that answers as a router does; gives its address and the requests it got."""
    seen: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, self.headers.get("Authorization")))
            self.send_response(status)
            self.send_header("Location", "http://127.0.0.1:1/")
            self.end_headers()
            self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

        def log_message(self, *_arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def listed(*data: object) -> dict[str, object]:
    return {"object": "list", "data": list(data)}


def test_the_tables_say_what_was_served_and_the_verdict(file: Path) -> None:
    """Requests, users, shares, errors, latencies; what is not counted; a warning."""
    done = run("--file", file)
    assert done.exit_code == 0, done.output
    for expected in (
        "assistant: traffic",
        "enhanced@1",
        "50.0/50.0",
        "5.00 %",
        "0.25/0.25",
        "can't tell yet: no request has been rated",
        "Looking again and again",
        "1 fallback",
        "other: ratings",
    ):
        assert expected in " ".join(done.output.split()), expected
    assert max(len(line) for line in done.output.splitlines()) <= 80


def test_json_is_what_the_router_answers(file: Path) -> None:
    """One list of summaries."""
    told = json.loads(run("--file", file, "--json", "--alias", "other").stdout)
    assert told["object"] == "list"
    (only,) = told["data"]
    assert only["experiment"] == "other"
    assert [one["exposures"] for one in only["variants"]] == [20, 20]


def test_a_running_router_is_asked_with_the_key() -> None:
    """By option or environment; the address with or without /v1."""
    with router(listed(experiment())) as (url, seen):
        done = run("--url", url, VLLM_RVEC_API_KEY="secret")
        again = run("--url", f"{url}/v1/", "--api-key", "other", "--json")
    assert done.exit_code == again.exit_code == 0, done.output
    assert seen == [
        ("/v1/rvec/experiments", "Bearer secret"),
        ("/v1/rvec/experiments", "Bearer other"),
    ]
    assert "enhanced@1 is better than base: +16.7 points" in " ".join(done.output.split())
    assert json.loads(again.stdout) == listed(experiment())
    assert "secret" not in done.output


def test_what_a_router_says_can_not_drive_the_terminal() -> None:
    """Markup and control characters of names are shown as text."""
    with router(listed(experiment("[bold]x[/nope]\x1b]0;owned\x07", "[red]\x1b[2J"))) as (url, _):
        done = run("--url", url)
    assert done.exit_code == 0, done.output
    assert "[bold]x[/nope]" in done.output
    assert "\x1b" not in done.output


def test_no_experiment_yet_is_said() -> None:
    """Not an empty screen."""
    with router(listed()) as (url, _):
        assert "no experiment yet" in run("--url", url).output


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 401, "status 401"),
        (b"", 404, "results file in the router's configuration"),
        (b"", 302, "status 302"),
        (b"<html>", 200, "something else"),
        ({"data": [{}]}, 200, "experiment: Field required"),
        ([], 200, "something else"),
    ],
)
def test_what_is_no_answer_is_a_clear_error(body: object, status: int, words: str) -> None:
    """Redirects aren't followed: they would take the key along."""
    with router(body, status) as (url, _):
        error = run("--url", url).exception
    assert isinstance(error, FetchError)
    assert words in str(error)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "nonsense", "http://[", "ftp://x"])
def test_an_address_that_does_not_answer_is_a_clear_error(url: str) -> None:
    """Refused connections and what is no address."""
    error = run("--url", url).exception
    assert isinstance(error, FetchError)
    assert "Can't ask the router" in str(error)


def test_an_unknown_alias_lists_those_there_are(file: Path) -> None:
    """A typo is found at once."""
    error = run("--file", file, "--alias", "asistant").exception
    assert isinstance(error, ConfigError)
    assert "assistant, other" in str(error)


@pytest.mark.parametrize("arguments", [(), ("--url", "http://x", "--file", "y")])
def test_one_source_is_wanted(arguments: tuple[str, ...]) -> None:
    """Neither none nor both: the usage error of a wrong command line."""
    assert run(*arguments).exit_code == 2


def test_a_file_that_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    """And none is made."""
    error = run("--file", tmp_path / "r.sqlite").exception
    assert isinstance(error, ConfigError)
    assert not list(tmp_path.iterdir())
